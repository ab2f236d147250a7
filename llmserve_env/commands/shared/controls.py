"""Controls as options of a command, as the fields of ServeAction declare them."""

from __future__ import annotations

from dataclasses import field, make_dataclass
from typing import Annotated, Any

import tyro

from llmserve_env.controls import SPECS, ControlSpec


def flag(name: str) -> str:
    """What a command calls a control."""
    return SPECS[name].declared.flag or name


def options(title: str, *, flags: bool = False, unset: frozenset[str] = frozenset(SPECS)) -> Any:
    """A dataclass with a field for each control.

    Args:
        title: name of the class.
        flags: whether fields have the names of `flag` rather than those of the controls.
        unset: controls that are None unless they are given; the others begin with ServeAction's default.
    """
    fields: list[Any] = []
    for name, spec in SPECS.items():
        kind: Any = spec.type | None if spec.optional or name in unset else spec.type
        default = None if name in unset else spec.default
        hint = Annotated[kind, tyro.conf.arg(help=_help(spec))]
        fields.append((flag(name) if flags else name, hint, field(default=default)))
    return make_dataclass(title, fields, frozen=True)


def _help(spec: ControlSpec) -> str:
    """The meaning of a control and the numbers that it takes."""
    if spec.options:
        return spec.meaning
    numbers = f"Up to {spec.high:g}" if spec.optional else f"{spec.low:g} to {spec.high:g}"
    return f"{spec.meaning} {numbers}."
