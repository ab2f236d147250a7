"""The parser of a command's arguments."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from inspect import signature
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import tyro

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def parse(command: Callable[..., Any], prog: str, args: Sequence[str]) -> Any:
    """What a command's function returns for the arguments that its signature and docstring declare.

    Args:
        command: the function.
        prog: name of the command.
        args: the arguments after it.
    """
    _say_defaults_once(command)
    return tyro.cli(command, prog=prog, args=args)


def _say_defaults_once(kind: Any) -> None:
    """Leave the default of an option to its text where it is None or nothing, which would say less."""
    if is_dataclass(kind):
        defaults = {field.name: field.default for field in fields(kind)}
    else:
        defaults = {name: parameter.default for name, parameter in signature(kind).parameters.items()}
    hints = get_type_hints(kind, include_extras=True)
    for name, default in defaults.items():
        for each in (hints[name], *get_args(hints[name])):
            if isinstance(each, type) and is_dataclass(each):
                _say_defaults_once(each)
        if default is None or default == ():
            hints[name] = Annotated[hints[name], tyro.conf.arg(help_behavior_hint="")]
    kind.__annotations__ = hints
