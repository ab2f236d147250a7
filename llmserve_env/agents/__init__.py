"""Reference agents: what a learned one has to beat.

>>> task = load_task("bursty_workload")
>>> play(load_agent("reactive", task), task, range(8)).scores
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llmserve_env.agents.agent import Agent
from llmserve_env.agents.aimd import AIMDAgent, AIMDRule
from llmserve_env.agents.constant import ConstantAgent
from llmserve_env.agents.mpc import MPCAgent
from llmserve_env.agents.play import Played, play
from llmserve_env.agents.random import RandomAgent
from llmserve_env.agents.reactive import ReactiveAgent, ReactiveRule
from llmserve_env.agents.shield import Shield, ShieldSettings, shield_settings
from llmserve_env.agents.tuned import tuned_constant, tuned_rule
from llmserve_env.errors import InputError

if TYPE_CHECKING:
    from llmserve_env.tasks import Task

__all__ = [
    "AGENTS",
    "CONTROLLERS",
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


_SHIELDED = "shielded:"


def load_agent(name: str, task: Task) -> Agent:
    """An agent by its name.

    Args:
        name: random, defaults (vLLM's, what the cell starts in), best-constant, reactive (`AGENTS`); aimd,
            mpc (`CONTROLLERS`); shielded:NAME, any of them in a `Shield`.
        task: what it will play; best-constant, reactive and aimd rest on what was tuned to the shipped task
            of this id.

    Raises:
        InputError: there is no such agent, or nothing was tuned to the task.
    """
    if name.startswith(_SHIELDED):
        return Shield(load_agent(name[len(_SHIELDED) :], task))
    known = {**CONTROLLERS, **AGENTS}
    if name not in known:
        raise InputError(
            f"expected one of {_SHIELDED}NAME, {', '.join(known)}, found '{name}'", field="agent"
        )
    return known[name](task)
