"""LLMServe: a research environment in which an agent runs an LLM inference service.

The names below are imported when they are first used, so `import llmserve_env` itself loads no library:

    >>> import llmserve_env
    >>> llmserve_env.__version__
    '0.1.0'
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmserve_env.errors import InputError
    from llmserve_env.hardware import load_profile
    from llmserve_env.schema import ServeAction
    from llmserve_env.sim.simulator import Simulator
    from llmserve_env.workloads import open_workload
    from llmserve_env.workloads.workload import Tenant, Workload

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "ServeAction",
    "Simulator",
    "Tenant",
    "Workload",
    "__version__",
    "load_profile",
    "open_workload",
]

_HOMES = {
    "InputError": "llmserve_env.errors",
    "ServeAction": "llmserve_env.schema",
    "Simulator": "llmserve_env.sim.simulator",
    "Tenant": "llmserve_env.workloads.workload",
    "Workload": "llmserve_env.workloads.workload",
    "load_profile": "llmserve_env.hardware",
    "open_workload": "llmserve_env.workloads",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
