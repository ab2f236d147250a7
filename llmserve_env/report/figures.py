"""The look of every picture, and how it becomes a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmserve_env.errors import InputError
from llmserve_env.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = ("png", "svg", "pdf")

BLUE, ORANGE, GREY, INK = "#2b6ca3", "#d9772b", "#6b7280", "#111827"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": "#374151",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "svg.hashsalt": "llmserve",
}


def check_suffix(path: Path) -> str:
    """The format that a picture's file name asks for.

    Raises:
        InputError: it is none of `SUFFIXES`.
    """
    form = path.suffix.lstrip(".").lower()
    if form not in SUFFIXES:
        raise InputError(
            f"expected a file name ending in {', '.join(SUFFIXES)}, found {path}", field="picture"
        )
    return form


@contextmanager
def new_figure(size: tuple[float, float]) -> Iterator[Figure]:
    """An empty figure of a size (inches) in the look of all pictures, which holds until the block ends."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


@contextmanager
def picture_file(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """An empty figure of a size (inches), written to `path` when the block ends.

    Raises:
        InputError: the suffix is none of `SUFFIXES`, or the file cannot be written.
    """
    form = check_suffix(path)
    with new_figure(size) as figure:
        yield figure
        buffer = BytesIO()
        date = {"png": "Software", "svg": "Date", "pdf": "CreationDate"}[form]
        figure.savefig(buffer, format=form, dpi=150, metadata={date: None})
    write_atomic(path, buffer.getvalue())
