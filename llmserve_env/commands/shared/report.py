"""What the commands print and write in the same way: tables, latency statistics, JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmserve_env.errors import InputError
from llmserve_env.files import write_atomic

if TYPE_CHECKING:
    from numpy.typing import NDArray

STATISTICS = ("mean", "p50", "p90", "p99")
UNDEFINED = "–"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Rows under a header, the first `left` columns flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in [header, *rows]:
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def statistics(values: NDArray[np.float64]) -> dict[str, float | None]:
    """Mean, median, p90 and p99 of the values that are not nan, interpolated linearly; None without any."""
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return dict.fromkeys(STATISTICS)
    found = [values.mean(), *np.percentile(values, (50, 90, 99))]
    return {name: float(value) for name, value in zip(STATISTICS, found, strict=True)}


def number(value: float | None, digits: int) -> str:
    """A number for a table, or a dash."""
    return UNDEFINED if value is None else f"{value:,.{digits}f}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share for a table, or a dash."""
    return UNDEFINED if share is None else f"{share:.{digits}%}"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write figures as JSON, atomically."""
    write_atomic(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def check_folders(*paths: Path | None) -> None:
    """Refuse files that cannot be written later because their folder is missing, before any work is done.

    Raises:
        InputError: names the file.
    """
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise InputError(f"cannot be written: there is no folder {path.parent}", file=str(path))
