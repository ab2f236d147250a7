"""Requests: traces, generators, tenants.

The names below are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmserve_env.workloads.description import Description, describe
    from llmserve_env.workloads.lengths import length_law
    from llmserve_env.workloads.loaders import LoadReport, load, load_lengths
    from llmserve_env.workloads.scenario import Scenario, parse_scenario
    from llmserve_env.workloads.sources import open_reported, open_workload
    from llmserve_env.workloads.tenants import TenantMix, tenant_mix
    from llmserve_env.workloads.workload import Tenant, Workload

__all__ = [
    "Description",
    "LoadReport",
    "Scenario",
    "Tenant",
    "TenantMix",
    "Workload",
    "describe",
    "length_law",
    "load",
    "load_lengths",
    "open_reported",
    "open_workload",
    "parse_scenario",
    "tenant_mix",
]

_HOMES = {
    "Description": "description",
    "LoadReport": "loaders",
    "Scenario": "scenario",
    "Tenant": "workload",
    "TenantMix": "tenants",
    "Workload": "workload",
    "describe": "description",
    "length_law": "lengths",
    "load": "loaders",
    "load_lengths": "loaders",
    "open_reported": "sources",
    "open_workload": "sources",
    "parse_scenario": "scenario",
    "tenant_mix": "tenants",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
