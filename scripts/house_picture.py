"""The picture of docs/architecture.md: the flow of an episode, and the rooms with the imports between them.

The rooms are those of the page's table, the imports those of the code. An import that follows from others
(a room imports one that imports it, too) has no arrow.

    python scripts/house_picture.py
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import permutations
from typing import TYPE_CHECKING, Any

from rooms import ROOT, import_graph, module_files, room_of, storeys

from llmserve_env.report.figures import BLUE, GREY, INK, ORANGE, picture_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE = ROOT / "docs" / "images" / "house.png"
_SIZE_IN = (9.0, 11.2)
_WIDTH = 100.0
"""Width of both drawings, in their own unit; heights are in it, too."""
_LINE_HEIGHT, _BOX = 8.0, 3.0
"""Height of a line of rooms, and of the box of a room."""
_MOST_IN_LINE, _SWEEPS = 5, 4
_LEFT = 15.0
"""Where rooms begin, right of the names of the storeys."""
_PALE_BLUE, _PALE, _GREY = "#e8f0f8", "#f6f7f9", "#9aa3af"
_FLOW = {
    "llmserve_env.workloads",
    "llmserve_env.backend",
    "llmserve_env.sim",
    "llmserve_env.live",
    "llmserve_env.observation",
    "llmserve_env.agents",
    "llmserve_env.rewards",
    "llmserve_env.recording",
    "llmserve_env.grading",
    "llmserve_env.episode",
    "llmserve_env.play",
}
"""Rooms that the flow passes through."""


def room_imports() -> dict[str, set[str]]:
    """Rooms that the modules of each room import."""
    graph = import_graph(module_files())
    rooms = {room: set[str]() for rows in storeys().values() for row in rows for room in row}
    for module, imported in graph.items():
        room = room_of(module, rooms)
        rooms[room] |= {room_of(name, rooms) for name in imported} - {room}
    return rooms


def essential(imports: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """Imports between rooms without those that follow from others."""
    behind = {room: _behind(room, imports) for room in imports}
    return [
        (room, other)
        for room, others in imports.items()
        for other in sorted(others)
        if not any(other in behind[between] for between in others)
    ]


def _behind(room: str, imports: Mapping[str, set[str]]) -> set[str]:
    """All rooms that a room imports, straight or through others."""
    reached: set[str] = set()
    waiting = [room]
    while waiting:
        fresh = imports[waiting.pop()] - reached
        reached |= fresh
        waiting += fresh
    return reached


def _box(ax: Axes, x: float, y: float, width: float, text: str, *, below: str = "", tint: bool) -> None:
    from matplotlib.patches import FancyBboxPatch

    height = _BOX + (2.4 if below else 0.0)
    ax.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.7",
            facecolor=_PALE_BLUE if tint else "white",
            edgecolor=BLUE if tint else _GREY,
            linewidth=0.9,
            zorder=3,
        )
    )
    style: dict[str, Any] = {"ha": "center", "va": "center", "zorder": 4}
    ax.text(x, y + (1.1 if below else -0.1), text, color=INK, fontsize=7.6 if not below else 8.6, **style)
    if below:
        ax.text(x, y - 1.3, below, color=GREY, fontsize=6.8, **style)


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, **style: Any) -> None:
    look = {
        "arrowstyle": "-|>,head_length=0.28,head_width=0.12",
        "linewidth": 0.8,
        "shrinkA": 0,
        "shrinkB": 0,
    }
    ax.annotate(
        "", end, start, arrowprops={**look, "shrinkA": 0, "shrinkB": 0, "color": colour, **style}, zorder=2
    )


def draw_flow(ax: Axes) -> None:
    """The flow of an episode: requests, windows, actions, and the log that is graded."""
    from matplotlib.patches import FancyBboxPatch

    top, bottom, over = 20.0, 6.5, 28.0
    places = {
        "workloads": (7.5, top, "requests of a seed"),
        "backend": (29.0, top, "simulator | live engines"),
        "observation": (53.0, top, "features"),
        "agent": (74.0, top, "reset, act"),
        "shield": (92.5, top, "rules, if wanted"),
        "rewards": (53.0, bottom, "goodput within SLO"),
        "log": (74.0, bottom, "actions and records"),
        "grading": (92.5, bottom, "replays the log"),
    }
    for corner, width, height in (((18.5, 1.8), 44.7, 23.2), ((18.5, 1.8), 64.8, 9.4)):
        look = "round,pad=0,rounding_size=1"
        ax.add_patch(FancyBboxPatch(corner, width, height, boxstyle=look, facecolor=_PALE, edgecolor="none"))
    episode = "episode.py: step, end, score, info, log"
    ax.text(19.7, 3.0, episode, color=GREY, fontsize=7.4, style="italic", va="bottom")
    for name, (x, y, below) in places.items():
        _box(ax, x, y, 15.6 if x > 80 or x < 10 else 17.6, name, below=below, tint=True)
    style = {"linewidth": 1.5}
    _arrow(ax, (15.3, top), (20.2, top), GREY, **style)
    _arrow(ax, (37.8, top), (44.2, top), BLUE, **style)
    _arrow(ax, (61.8, top), (65.2, top), GREY, **style)
    _arrow(ax, (82.8, top), (84.7, top), ORANGE, **style)
    ax.plot([92.5, 92.5, 29.0], [top + 2.7, over, over], color=ORANGE, linewidth=1.5)
    _arrow(ax, (29.0, over), (29.0, top + 2.7), ORANGE, **style)
    ax.plot([41.0, 41.0], [top, bottom], color=BLUE, linewidth=1.5)
    _arrow(ax, (41.0, bottom), (44.2, bottom), BLUE, **style)
    _arrow(ax, (61.8, bottom), (65.2, bottom), GREY, **style)
    _arrow(ax, (82.8, bottom), (84.7, bottom), GREY, **style)
    words = {"fontsize": 7.8, "weight": "bold", "zorder": 5}
    ax.text(
        60.0, over, " ACTION[n] ", color=ORANGE, ha="center", va="center", backgroundcolor="white", **words
    )
    ax.text(40.2, (top + bottom) / 2, "WINDOW[n]", color=BLUE, ha="right", va="center", **words)
    ax.set(xlim=(-0.4, _WIDTH + 0.6), ylim=(0, 30))


def draw_rooms(ax: Axes) -> None:
    """Storeys from the ground up, and what each room imports."""
    imports = room_imports()
    drawn = essential(imports)
    lines = _arranged([line for _, line in _lines()], drawn)
    at = _places(lines)
    floors: dict[str, list[int]] = {}
    for number, (storey, _) in enumerate(_lines()):
        floors.setdefault(storey, []).append(number)
    for number, (storey, heights) in enumerate(floors.items()):
        low, high = heights[0] * _LINE_HEIGHT, (heights[-1] + 1) * _LINE_HEIGHT
        if number % 2 == 0:
            ax.axhspan(low, high, color=_PALE, zorder=0, linewidth=0)
        ax.text(1.2, (low + high) / 2, storey, color=GREY, fontsize=8.6, weight="bold", va="center")
    for room, (x, y) in at.items():
        _box(ax, x, y, _width(room), _label(room), tint=room in _FLOW)
    for room, other in drawn:
        (x, y), (to_x, to_y) = at[room], at[other]
        side = 1 if to_x > x else -1
        if y == to_y:
            bend = -side * min(0.34, 5.5 / abs(x - to_x))
            start = (x + side * _width(room) * 0.2, y + _BOX / 2)
            end = (to_x - side * _width(other) * 0.2, y + _BOX / 2)
            _arrow(ax, start, end, _GREY, connectionstyle=f"arc3,rad={bend}")
        else:
            shift = side * min(abs(to_x - x) * 0.2, _width(other) * 0.36)
            start = (x + side * min(abs(to_x - x) * 0.1, _width(room) * 0.3), y - _BOX / 2)
            _arrow(ax, start, (to_x - shift, to_y + _BOX / 2), _GREY)
    every = sum(len(others) for others in imports.values())
    ax.set_title(
        f"The rooms, and what they import ({len(drawn)} of {every}; the others follow). Blue: the flow", pad=4
    )
    ax.set(xlim=(0, _WIDTH), ylim=(0, len(lines) * _LINE_HEIGHT + 1))


def _lines() -> list[tuple[str, list[str]]]:
    """Lines of rooms from the ground up, with the storey of each; a storey of many rooms has several."""
    lines = []
    for storey, rows in storeys().items():
        rooms = [room for row in rows for room in row]
        count = -(-len(rooms) // _MOST_IN_LINE)
        size = -(-len(rooms) // count)
        lines += [(storey, rooms[low : low + size]) for low in range(0, len(rooms), size)]
    return lines


def _arranged(lines: list[list[str]], arrows: list[tuple[str, str]]) -> list[list[str]]:
    """The same rooms in each line, in an order that makes arrows short and has few behind other rooms."""
    for _ in range(_SWEEPS):
        for number, line in enumerate(lines):
            orders = [[*lines[:number], list(order), *lines[number + 1 :]] for order in permutations(line)]
            lines = min(orders, key=lambda order: _length(_places(order), arrows))
    return lines


def _length(at: Mapping[str, tuple[float, float]], arrows: list[tuple[str, str]]) -> float:
    """Breadth of all arrows, with an addition for each room that one passes behind."""
    total = 0.0
    for room, other in arrows:
        (x, y), (to_x, to_y) = at[room], at[other]
        total += abs(x - to_x)
        for between, (centre, height) in at.items():
            if to_y < height < y:
                passing = x + (to_x - x) * (y - height) / (y - to_y)
                total += 25.0 * (abs(passing - centre) < _width(between) / 2 + 0.5)
            elif height == y == to_y and between not in (room, other):
                total += 12.0 * (min(x, to_x) < centre < max(x, to_x))
    return total


def _places(lines: list[list[str]]) -> dict[str, tuple[float, float]]:
    """Centres of the rooms' boxes, spread over each line."""
    at = {}
    for number, rooms in enumerate(lines):
        gap = (_WIDTH - _LEFT - sum(map(_width, rooms))) / (len(rooms) + 1)
        x = _LEFT
        for room in rooms:
            x += gap + _width(room)
            at[room] = x - _width(room) / 2, (number + 0.42) * _LINE_HEIGHT
    return at


def _width(room: str) -> float:
    return 2.4 + 1.02 * len(_label(room))


@cache
def _label(room: str) -> str:
    """A room as the page has it."""
    path = ROOT.joinpath(*room.split("."))
    short = room.removeprefix("llmserve_env.").replace(".", "/")
    if room == "llmserve_env":
        return "__init__.py"
    return f"{short}/" if path.is_dir() else f"{short}.py"


def main() -> None:
    """Write the picture."""
    with picture_file(PICTURE, _SIZE_IN) as figure:
        above, below = figure.subplots(2, 1, height_ratios=[30, len(_lines()) * _LINE_HEIGHT])
        for ax in (above, below):
            ax.set_axis_off()
        above.set_title("The flow of an episode, n of them side by side", pad=6)
        draw_flow(above)
        draw_rooms(below)
    print(PICTURE.relative_to(ROOT))


if __name__ == "__main__":
    main()
