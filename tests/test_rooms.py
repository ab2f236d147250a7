"""The rooms of docs/architecture.md: imports go up its table only and never round, and no room overflows."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("llmserve_env", "server", "evaluate", "train")
MOST_FILES = 16


def module_name(path: Path) -> str:
    """Its dotted name; a package's `__init__.py` goes by the package's."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(path): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
    if "__pycache__" not in path.parts
}


def imports(name: str) -> set[str]:
    """Modules of this project that a module imports: at its top, in functions, or for type checkers."""
    tree = ast.parse(FILES[name].read_bytes())
    return {found for node in ast.walk(tree) for found in _targets(node)} - {name}


def _targets(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in FILES)
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, "imports name the whole module"
        for alias in node.names:
            submodule = f"{node.module}.{alias.name}"
            if submodule in FILES or node.module in FILES:
                yield submodule if submodule in FILES else str(node.module)


GRAPH = {name: imports(name) for name in FILES}


def rooms() -> list[list[str]]:
    """Rows of the table in docs/architecture.md: the modules and packages that each names."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| room \|.*\n\|[-| ]+\n((?:\|.*\n)+)", text, re.M)
    return [
        [_room(name) for name in re.findall(r"`([^`]+)`", row.split("|")[1])] for row in table.splitlines()
    ]


def _room(name: str) -> str:
    """A room's dotted name; paths begin in llmserve_env/, or in one of the folders beside it."""
    path = ROOT / name if name.partition("/")[0] in PACKAGES else ROOT / "llmserve_env" / name
    assert path.exists(), f"docs/architecture.md: there is no {name}"
    return module_name(path)


def row_of(name: str, rows: dict[str, int]) -> int:
    """Row of the nearest room around a module; the package's face, its `__init__.py`, has none in it."""
    room = name
    while room not in rows or (room == "llmserve_env" and name != room):
        room, dot, _ = room.rpartition(".")
        assert dot, f"docs/architecture.md: {name} is in no room"
    return rows[room]


def test_rooms_import_from_their_own_row_and_those_above():
    rows = {room: row for row, names in enumerate(rooms()) for room in names}
    row = {name: row_of(name, rows) for name in FILES}
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
