"""The published parameters in `data/`: one TOML file a kind, each entry with its source."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from llmserve_env.errors import InputError
from llmserve_env.files import read_toml

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
