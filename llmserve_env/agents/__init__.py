"""Agents: what a learned one has to beat, and the learned ones that come with the package.

>>> task = load_task("bursty_workload")
>>> play(load_agent("reactive", task), task, range(8)).scores
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from llmserve_env.agents.agent import Agent
from llmserve_env.agents.aimd import AIMDAgent, AIMDRule
from llmserve_env.agents.constant import ConstantAgent
from llmserve_env.agents.mpc.mpc import MPCAgent
from llmserve_env.agents.random import RandomAgent
from llmserve_env.agents.reactive import ReactiveAgent, ReactiveRule
from llmserve_env.agents.shield import Shield, ShieldSettings, shield_settings
from llmserve_env.agents.trained import FOLDERS, trained_agent, trained_tasks
from llmserve_env.agents.tuned import tuned_constant, tuned_rule
from llmserve_env.errors import InputError
from llmserve_env.play import Played, play

if TYPE_CHECKING:
    from llmserve_env.tasks import Task

__all__ = [
    "AGENTS",
    "CONTROLLERS",
    "TRAINED",
    "AIMDAgent",
    "AIMDRule",
    "Agent",
    "ConstantAgent",
    "MPCAgent",
    "Played",
    "RandomAgent",
    "ReactiveAgent",
    "ReactiveRule",
    "Shield",
    "ShieldSettings",
    "lacks_weights",
    "load_agent",
    "play",
    "shield_settings",
]

AGENTS: dict[str, Callable[[Task], Agent]] = {
    "random": lambda task: RandomAgent(),
    "defaults": lambda task: ConstantAgent(task.start, "defaults"),
    "best-constant": lambda task: ConstantAgent(tuned_constant(task.id), "best-constant"),
    "reactive": lambda task: ReactiveAgent(tuned_rule(task.id)),
}
"""The reference agents by name, in the order of every table: how to make one for a task."""

CONTROLLERS: dict[str, Callable[[Task], Agent]] = {
    "aimd": lambda task: AIMDAgent(AIMDRule(), tuned_constant(task.id)),
    "mpc": lambda task: MPCAgent(),
}
"""Further agents by name: to compare with, in no table of the reference agents."""

TRAINED: dict[str, Callable[[Task], Agent]] = {name: partial(trained_agent, name) for name in FOLDERS}
"""Policies that come with the package, for the tasks that they were trained on: PPO of three training seeds,
the clone of the reactive rule, and ppo, which is ppo-1."""

_SHIELDED = "shielded:"


def load_agent(name: str, task: Task) -> Agent:
    """An agent by its name.

    Args:
        name: random, defaults (vLLM's, what the cell starts in), best-constant, reactive (`AGENTS`); aimd,
            mpc (`CONTROLLERS`); ppo-1, ppo-2, ppo-3, bc, ppo (`TRAINED`); shielded:NAME, any of them in a
            `Shield`.
        task: what it will play; best-constant, reactive and aimd rest on what was tuned to the shipped task
            of this id, policies were trained on it.

    Raises:
        InputError: there is no such agent, nothing was tuned to the task or trained on it, or a policy's
            files cannot be used; names them.
    """
    if name.startswith(_SHIELDED):
        return Shield(load_agent(name[len(_SHIELDED) :], task))
    known = {**TRAINED, **CONTROLLERS, **AGENTS}
    if name not in known:
        raise InputError(
            f"expected one of {_SHIELDED}NAME, {', '.join(known)}, found '{name}'", field="agent"
        )
    return known[name](task)


def lacks_weights(name: str, task_id: str) -> bool:
    """Whether a name means a trained policy, shielded or not, that did not come with one for this task."""
    name = name.removeprefix(_SHIELDED)
    return name in TRAINED and task_id not in trained_tasks(name)
