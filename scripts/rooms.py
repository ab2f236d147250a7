"""The rooms of docs/architecture.md, and the imports between them as the code has them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("llmserve_env", "server", "evaluate", "train")
_PAGE = "docs/architecture.md"


def module_files() -> dict[str, Path]:
    """Files of this project's packages by dotted name; an `__init__.py` goes by its package's name."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {_module_name(path): path for path in paths if "__pycache__" not in path.parts}


def import_graph(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """Modules of this project that each imports: at its top, in functions, or for type checkers."""
    return {name: set(_imported(path, files)) - {name} for name, path in files.items()}


def storeys() -> dict[str, list[list[str]]]:
    """Rows of the page's table by the storey that they stand under: the dotted names of their rooms."""
    text = (ROOT / _PAGE).read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| room \|.*\n\|[-| ]+\n((?:\|.*\n)+)", text, re.M)
    house: dict[str, list[list[str]]] = {}
    for line in table.splitlines():
        cell = line.split("|")[1].strip()
        if cell.startswith("**"):
            house[cell.strip("*")] = []
        else:
            next(reversed(house.values())).append([_room(name) for name in re.findall(r"`([^`]+)`", cell)])
    return house


def room_rows() -> list[list[str]]:
    """Rows of the page's table, from the ground up: the dotted names of their rooms."""
    return [row for rows in storeys().values() for row in rows]


def room_of(module: str, rooms: Mapping[str, object]) -> str:
    """Nearest room around a module; the package's face, its `__init__.py`, has none in it.

    Raises:
        ValueError: the module is in no room.
    """
    room = module
    while room not in rooms or (room == "llmserve_env" and module != room):
        room, dot, _ = room.rpartition(".")
        if not dot:
            raise ValueError(f"{_PAGE}: {module} is in no room")
    return room


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(name: str) -> str:
    """A room's dotted name; paths begin in llmserve_env/, or in one of the folders beside it."""
    path = ROOT / name if name.partition("/")[0] in PACKAGES else ROOT / "llmserve_env" / name
    if not path.exists():
        raise ValueError(f"{_PAGE}: there is no {name}")
    return _module_name(path)


def _imported(path: Path, files: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}: imports name the whole module")
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if submodule in files or node.module in files:
                    yield submodule if submodule in files else str(node.module)
