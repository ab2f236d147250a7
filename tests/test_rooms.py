"""The rooms of docs/architecture.md: imports go up its table only and never round, and no room overflows."""

from __future__ import annotations

from graphlib import TopologicalSorter

import pytest

from scripts.rooms import PACKAGES, ROOT, import_graph, module_files, room_of, room_rows

MOST_FILES = 16
FILES = module_files()
GRAPH = import_graph(FILES)


def test_rooms_import_from_their_own_row_and_those_above():
    rows = {room: row for row, rooms in enumerate(room_rows()) for room in rooms}
    row = {name: rows[room_of(name, rows)] for name in FILES}
    wrong = [
        f"{name} imports {other}" for name in FILES for other in sorted(GRAPH[name]) if row[other] > row[name]
    ]
    assert not wrong


def test_no_imports_go_round():
    TopologicalSorter(GRAPH).prepare()  # a CycleError names the modules


@pytest.mark.parametrize("package", PACKAGES)
def test_no_folder_overflows(package):
    folders = {path.parent for path in FILES.values() if path.is_relative_to(ROOT / package)}
    crowded = {str(folder.relative_to(ROOT)): len(list(folder.glob("*.py"))) for folder in folders}
    assert {folder: files for folder, files in crowded.items() if files > MOST_FILES} == {}
