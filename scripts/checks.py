"""Checks that each end with a note or a problem, and the table of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

Check = tuple[str, Callable[[], str]]
"""Its name, and what runs it: returns a note, or raises."""


class Problem(Exception):
    """A check has failed, and why."""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    passed: bool
    note: str
    seconds: float

    def __str__(self) -> str:
        note = " ".join(self.note.split())
        return f"{'pass' if self.passed else 'FAIL'}  {self.name:<34} {self.seconds:6.1f} s  {note}"


def expect(true: object, otherwise: str) -> None:
    """Raise a problem unless something holds."""
    if not true:
        raise Problem(otherwise)


def run_checks(checks: list[Check]) -> list[Row]:
    """Run checks, each to its end whatever became of the others, and print their lines."""
    rows = []
    for name, check in checks:
        begun = time.monotonic()
        try:
            note, passed = check(), True
        except Exception as error:  # a check that breaks has failed
            note = str(error) if isinstance(error, Problem) else f"{type(error).__name__}: {error}"
            passed = False
        rows.append(Row(name, passed, note, time.monotonic() - begun))
        print(rows[-1], flush=True)
    return rows
