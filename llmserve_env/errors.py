"""Errors that a user can act on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


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


def as_input_error(error: ValidationError, file: str | None = None) -> InputError:
    """The first fault that pydantic found in a record, by its field."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or None
    found = f", found {first['input']!r}" if isinstance(first["input"], (str, int, float)) else ""
    return InputError(f"{first['msg'].removeprefix('Value error, ')}{found}", file=file, field=field)


def missing_package(error: ImportError, extra: str = "server") -> InputError:
    """What to say where a package of an extra is not installed."""
    return InputError(f"the {error.name} package is missing: pip install -e '.[{extra}]' in the checkout")


def _error(reason: str, file: str | None, line: int | None, field: str | None) -> InputError:
    return InputError(reason, file=file, line=line, field=field)
