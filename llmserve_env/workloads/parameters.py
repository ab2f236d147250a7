"""Parameters of generators: declared once as dataclass fields, checked there, and read from URIs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar

from llmserve_env.errors import InputError

P = TypeVar("P", bound="Parameters")


@dataclass(frozen=True)
class Bounds:
    """What a parameter accepts.

    Attributes:
        name: its name in a URI, without the unit.
        meaning: one line, with the unit.
        above: it must be greater.
        at_least: it must not be smaller.
        at_most: it must not be greater.
    """

    name: str
    meaning: str
    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    def expected(self, kind: str) -> str:
        """What to give, such as "a number > 0"."""
        noun = {"float": "a number", "int": "a whole number", "str": "a text"}.get(kind, "numbers")
        limits = [
            f"{sign} {limit:,.15g}"
            for sign, limit in ((">", self.above), (">=", self.at_least), ("<=", self.at_most))
            if limit is not None
        ]
        text = f"{noun} {' and '.join(limits)}".strip()
        return f"{text}, comma-separated" if noun == "numbers" else text

    def admits(self, value: float) -> bool:
        """Whether a number is finite and within the bounds."""
        return (
            math.isfinite(value)
            and (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
        )


def parameter(
    name: str,
    default: Any,
    meaning: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A dataclass field of a `Parameters` class; None as default makes it optional."""
    return field(default=default, metadata={"bounds": Bounds(name, meaning, above, at_least, at_most)})


@dataclass(frozen=True)
class Parameters:
    """Base of the parameter records: fields of float, int, str or tuple[float, ...], or one of them | None.

    Raises:
        InputError: a value is out of bounds; names the parameter and what was expected.
    """

    def __post_init__(self) -> None:
        for entry in declared(type(self)):
            value = getattr(self, entry.name)
            kind, bounds = _kind(entry), _bounds(entry)
            if value is None or kind == "str":
                continue
            numbers = value if isinstance(value, tuple) else (value,)
            if not numbers or not all(bounds.admits(number) for number in numbers):
                raise InputError(f"expected {bounds.expected(kind)}, found {value}", field=bounds.name)


def declared(cls: type[Parameters]) -> list[Field[Any]]:
    """The fields that are parameters, in order."""
    return [entry for entry in fields(cls) if "bounds" in entry.metadata]


def names(cls: type[Parameters]) -> list[str]:
    """Their names in a URI."""
    return [_bounds(entry).name for entry in declared(cls)]


def table(cls: type[Parameters]) -> list[tuple[str, str, str]]:
    """Name, default and meaning of each, as the documentation shows them."""
    return [(_bounds(entry).name, written(entry.default), _bounds(entry).meaning) for entry in declared(cls)]


def written(value: object) -> str:
    """A value as a URI holds it; "" for None."""
    if value is None:
        return ""
    if isinstance(value, (tuple, list)):
        return ",".join(map(written, value))
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def is_number(value: object) -> bool:
    """Whether TOML gave a number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read(cls: type[P], given: Mapping[str, str], **others: object) -> P:
    """Build a record from URI parameters; those of other records are left alone.

    Args:
        cls: the record.
        given: texts by the parameters' URI names.
        others: fields that are no parameters, such as a path.

    Raises:
        InputError: a value cannot be read or is out of bounds.
    """
    values = dict(others)
    for entry in declared(cls):
        bounds, kind = _bounds(entry), _kind(entry)
        if bounds.name not in given:
            continue
        text = given[bounds.name]
        try:
            values[entry.name] = _value(text, kind)
        except ValueError:
            raise InputError(f"expected {bounds.expected(kind)}, found {text!r}", field=bounds.name) from None
    return cls(**values)


def _bounds(entry: Field[Any]) -> Bounds:
    bounds: Bounds = entry.metadata["bounds"]
    return bounds


def _kind(entry: Field[Any]) -> str:
    return str(entry.type).removesuffix(" | None")


def _value(text: str, kind: str) -> object:
    if kind == "float":
        return float(text)
    if kind == "int":
        return int(text)
    if kind == "str":
        return text
    return tuple(float(part) for part in text.split(","))
