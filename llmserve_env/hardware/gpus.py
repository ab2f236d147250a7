"""GPUs by the name that the driver gives them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from llmserve_env.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FILE = Path(__file__).parent / "data" / "gpus.toml"


@dataclass(frozen=True)
class GpuFacts:
    """A GPU model.

    Attributes:
        name: as the driver reports it.
        memory_bytes: as a process sees it.
        bandwidth_gb_per_s: bandwidth of the memory (GB/s).
        usd_per_hour: rent of one (USD).
        source: where the figures come from.
    """

    name: str
    memory_bytes: int
    bandwidth_gb_per_s: float
    usd_per_hour: float
    source: str


@lru_cache(maxsize=1)
def known_gpus() -> Mapping[str, GpuFacts]:
    """All GPUs of the shipped list by name."""
    table = tomllib.loads(_FILE.read_text(encoding="utf-8"))
    return MappingProxyType({name: GpuFacts(name=name, **facts) for name, facts in table.items()})


def gpu_facts(name: str) -> GpuFacts:
    """Facts of a GPU.

    Raises:
        InputError: the list does not have it.
    """
    known = known_gpus()
    if name not in known:
        raise InputError(f"unknown GPU '{name}': known are {', '.join(known)}", field="gpu")
    return known[name]
