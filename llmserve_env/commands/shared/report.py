"""What the commands print and write in the same way: tables, latency statistics, JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
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


def check_outputs(outputs: Mapping[str, Path | None], **inputs: Path | str | None) -> None:
    """Refuse files that cannot be written later, before any work is done.

    Args:
        outputs: the files by the option that names them; None for one that is not wanted.
        inputs: what is read, by what it is: paths, URIs or names; those of no file are left out.

    Raises:
        InputError: a file's folder is missing or cannot be written to, something else than a file has its
            name, or it is read, too, or named by another option.
    """
    named: dict[Path, str] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        real = _real(path)
        if not real.parent.is_dir():
            raise InputError(f"cannot be written: there is no folder {path.parent}", file=str(path))
        if real.exists() and not real.is_file():
            raise InputError("cannot be written: not a regular file", file=str(path))
        if not os.access(real.parent, os.W_OK | os.X_OK):
            raise InputError(f"cannot be written: no permission to write in {path.parent}", file=str(path))
        for what, given in inputs.items():
            if given is not None and real.exists() and _is_file(source := _source(given), real):
                raise InputError(f"is the {what} itself: give another file", file=str(source), field=option)
        if real in named:
            raise InputError(
                f"is the file of --{named[real]} too: give another", file=str(path), field=option
            )
        named[real] = option


def _real(path: Path) -> Path:
    """Where a path leads."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"cannot be written: {reason}", file=str(path)) from error


def _source(given: Path | str) -> Path:
    """The file of a path or of a URI."""
    return Path(str(given).partition("://")[2].partition("?")[0] or given)


def _is_file(source: Path, real: Path) -> bool:
    try:
        return source.is_file() and source.samefile(real)
    except (OSError, ValueError):
        return False
