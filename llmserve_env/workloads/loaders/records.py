"""The rows of a file as checked columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llmserve_env.errors import InputError
from llmserve_env.workloads.loaders.hints import Hints

MAX_TOKENS = 2**31 - 1
"""A workload's token counts are int32."""

_KEPT_FAULTS = 5


@dataclass
class Records:
    """Rows of a file, column by column.

    A row that cannot be used is marked, never dropped at once, so that all columns keep their length;
    `usable` says in the end which rows are left, or refuses the file.

    Attributes:
        file: name for messages.
        names: columns of the header, or keys that some JSON object has.
        lines: int64[n], 1-based line of each row.
        values: the raw column of a name: str in tables, decoded JSON otherwise; None where there is none.
        number_types: types that a raw number may have.
        bad: bool[n], rows that cannot be used.
        kind: what the file is: "table", "JSON", or "JSON document" with a list for each column.
        hints: what the reader was told.
        faults: (line, message) of the first fault of each check that failed.
        notes: what was changed.
        guesses: what was guessed, and how to overrule it.
        clock: what its times are, for the report.
        absolute: whether its times are of a clock of their own, so that the first request arrives at 0.
    """

    file: str
    names: frozenset[str]
    lines: NDArray[np.int64]
    values: Callable[[str], list[object]]
    number_types: frozenset[type]
    bad: NDArray[np.bool_]
    kind: str = "table"
    hints: Hints = field(default_factory=Hints)
    faults: list[tuple[int, InputError]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    guesses: list[str] = field(default_factory=list)
    clock: str = ""
    absolute: bool = False

    def __len__(self) -> int:
        return len(self.lines)

    def mark(
        self, rows: NDArray[np.bool_], reason: str | Callable[[int], str], name: str | None = None
    ) -> None:
        """Mark rows (bool[n]) as unusable, for a reason that may depend on the row."""
        fresh = np.flatnonzero(rows & ~self.bad)
        for row in fresh[:_KEPT_FAULTS].tolist():
            text = reason if isinstance(reason, str) else reason(row)
            line = int(self.lines[row])
            self.faults.append((line, InputError(text, file=self.file, line=line, field=name)))
        self.bad |= rows

    def mark_each(self, faults: dict[int, str]) -> None:
        """Mark rows, each with its own fault."""
        rows = np.zeros(len(self), bool)
        rows[list(faults)] = True
        self.mark(rows, faults.__getitem__)

    def usable(self, skip_bad_rows: bool) -> NDArray[np.bool_]:
        """bool[n], the rows that passed every check.

        Raises:
            InputError: the first fault in the file, unless bad rows are to be skipped.
        """
        self.faults.sort(key=lambda fault: fault[0])
        if self.faults and not skip_bad_rows:
            raise self.faults[0][1]
        return ~self.bad

    def numbers(self, name: str, expected: str = "a number >= 0") -> NDArray[np.float64]:
        """A column as float64[n]; rows without a finite number >= 0 are marked and hold 0."""
        raw = self.values(name)
        found, readable = _to_floats(raw, self.number_types)
        if not readable.all():
            missing = np.fromiter((value is None or value == "" for value in raw), bool, len(raw))
            self.mark(missing, "is missing", name)
        wrong = ~readable | ~np.isfinite(found) | (found < 0)
        self.mark(wrong, lambda row: f"expected {expected}, found {_shown(raw[row])}", name)
        return np.where(wrong, 0.0, found)

    def tokens(self, name: str, at_least: int = 1) -> NDArray[np.int64]:
        """A column of token counts as int64[n]; rows without one in range are marked and hold 1."""
        return self.whole(name, f"a whole number of tokens >= {at_least}", at_least)

    def whole(self, name: str, expected: str, at_least: int = 0) -> NDArray[np.int64]:
        """A column of whole numbers below 2**31 as int64[n]; rows without one are marked and hold 1."""
        found = self.numbers(name, expected)
        wrong = (found != np.floor(found)) | (found < at_least) | (found > MAX_TOKENS)
        raw = self.values(name)
        self.mark(wrong, lambda row: f"expected {expected}, found {_shown(raw[row])}", name)
        return np.where(wrong, 1, found).astype(np.int64)

    def texts(self, name: str, missing: str | None = None) -> list[str]:
        """A column as text; rows without a text or whole number are marked and hold "".

        Args:
            name: the column.
            missing: what a JSON row has that lacks the key, or has null there (default: it is marked).
        """
        raw = [missing if value is None else value for value in self.values(name)]
        texts = [str(value).strip() if type(value) in (str, int) else "" for value in raw]
        empty = np.fromiter((not text for text in texts), bool, len(texts))
        self.mark(empty, lambda row: f"expected a name, found {_shown(raw[row])}", name)
        return texts


def _to_floats(
    raw: Sequence[object], number_types: frozenset[type]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """float64[n] and bool[n]: the values, and where one was readable."""
    if set(map(type, raw)) <= number_types:
        try:
            return np.array(raw, dtype=np.float64), np.ones(len(raw), bool)
        except (ValueError, OverflowError):
            pass  # at least one value is unreadable: find out which
    found = np.zeros(len(raw))
    readable = np.zeros(len(raw), bool)
    for row, value in enumerate(raw):
        if type(value) in number_types:
            try:
                found[row] = float(value)  # type: ignore[arg-type]
                readable[row] = True
            except (ValueError, OverflowError):
                continue
    return found, readable


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
