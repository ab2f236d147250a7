"""The published parameters in `data/`: one TOML file a kind, each entry with its source."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

from llmserve_env.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_DATA = Path(__file__).parent / "data"


@cache
def presets(kind: str) -> dict[str, Any]:
    """The entries of `data/<kind>.toml`: "generators", "lengths", "slos" or "tenants"."""
    return read_toml(_DATA / f"{kind}.toml")


def preset(kind: str, name: str, *, field: str) -> dict[str, Any]:
    """One entry by name.

    Args:
        kind: the data file.
        name: the entry.
        field: the parameter that named it, for the message.

    Raises:
        InputError: no such entry; the message lists them.
    """
    known = presets(kind)
    if name not in known:
        raise InputError(f"expected one of {', '.join(known)}, found {name!r}", field=field)
    entry: dict[str, Any] = known[name]
    return entry


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a dictionary.

    Raises:
        InputError: it cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise InputError(f"cannot be read as TOML: {error}", file=str(path)) from error
