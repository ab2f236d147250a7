"""Errors that a user can act on."""

from __future__ import annotations

from typing import Any


class InputError(ValueError):
    """Something the user gave cannot be used: a file, a line, a field, an argument.

    The message names the place (file, line, field), what was found and what was expected.
    Commands print it without a traceback and exit with status 2.

    Args:
        reason: what is wrong and what was expected.
        file: the file that holds the fault.
        line: its 1-based line number.
        field: the column, key or argument.
    """

    def __init__(
        self,
        reason: str,
        *,
        file: str | None = None,
        line: int | None = None,
        field: str | None = None,
    ) -> None:
        place = ":".join(str(part) for part in (file, line) if part is not None)
        where = [place] if place else []
        if field is not None:
            where.append(f"field '{field}'")
        super().__init__(": ".join([*where, reason]))
        self.reason = reason
        self.file = file
        self.line = line
        self.field = field

    def __reduce__(self) -> tuple[Any, ...]:
        """Whole when it crosses to another process."""
        return _error, (self.reason, self.file, self.line, self.field)


def missing_package(error: ImportError, extra: str = "server") -> InputError:
    """What to say where a package of an extra is not installed."""
    return InputError(f"the {error.name} package is missing: install llmserve-env[{extra}]")


def _error(reason: str, file: str | None, line: int | None, field: str | None) -> InputError:
    return InputError(reason, file=file, line=line, field=field)
