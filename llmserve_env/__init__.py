"""LLMServe: a research environment in which an agent runs an LLM inference service.

Importing it registers the environments with Gymnasium; their code, and the names below, are imported when
they are first used:

    >>> import gymnasium as gym
    >>> import llmserve_env
    >>> llmserve_env.__version__
    '0.1.0'
    >>> env = gym.make("LLMServe-v0", task_id="static_workload")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from llmserve_env.report.version import __version__

if TYPE_CHECKING:
    from llmserve_env.client import LLMServeEnv
    from llmserve_env.envs.tool_env import ServeToolEnv
    from llmserve_env.episode import Episode
    from llmserve_env.errors import InputError
    from llmserve_env.grading import grade
    from llmserve_env.hardware import load_profile
    from llmserve_env.schema import ServeAction
    from llmserve_env.sim.simulator import Simulator
    from llmserve_env.tasks import list_tasks, load_task
    from llmserve_env.workloads import open_workload
    from llmserve_env.workloads.workload import Tenant, Workload

__all__ = [
    "Episode",
    "InputError",
    "LLMServeEnv",
    "ServeAction",
    "ServeToolEnv",
    "Simulator",
    "Tenant",
    "Workload",
    "__version__",
    "grade",
    "list_tasks",
    "load_profile",
    "load_task",
    "open_workload",
]

_HOMES = {
    "Episode": "llmserve_env.episode",
    "InputError": "llmserve_env.errors",
    "LLMServeEnv": "llmserve_env.client",
    "ServeAction": "llmserve_env.schema",
    "ServeToolEnv": "llmserve_env.envs.tool_env",
    "Simulator": "llmserve_env.sim.simulator",
    "Tenant": "llmserve_env.workloads.workload",
    "Workload": "llmserve_env.workloads.workload",
    "grade": "llmserve_env.grading",
    "list_tasks": "llmserve_env.tasks",
    "load_profile": "llmserve_env.hardware",
    "load_task": "llmserve_env.tasks",
    "open_workload": "llmserve_env.workloads",
}

_ENVIRONMENTS = {
    "LLMServe-v0": ("serve_env:LLMServeEnv", "vector_env:LLMServeVectorEnv"),
    "LLMServeContinuous-v0": ("wrappers:continuous_env", "wrappers:continuous_vector_env"),
    "LLMServeDict-v0": ("wrappers:dict_env", None),
    "LLMServeMO-v0": ("mo_env:LLMServeMOEnv", "mo_env:LLMServeMOVectorEnv"),
    "LLMServeRemote-v0": ("remote_env:LLMServeRemoteEnv", None),
    "LLMServeLive-v0": ("live_env:LLMServeLiveEnv", None),
}
"""For each id what makes one environment, and many at once, in llmserve_env.envs."""


def _register() -> None:
    try:
        import gymnasium
    except ModuleNotFoundError as error:
        if error.name != "gymnasium":
            raise
        return  # vLLM's environment, where live.vllm_scheduler is all that is wanted
    for name, (one, many) in _ENVIRONMENTS.items():
        if name not in gymnasium.registry:  # a module can be imported anew
            gymnasium.register(
                name,
                entry_point=f"llmserve_env.envs.{one}",
                vector_entry_point=many and f"llmserve_env.envs.{many}",
                nondeterministic="live_env" in one,
            )


_register()


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
