"""What the agents that were tuned to a task found, from data/tuned.toml."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from llmserve_env.agents.reactive import ReactiveRule
from llmserve_env.errors import InputError
from llmserve_env.schema import ServeAction

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PATH = Path(__file__).parent / "data" / "tuned.toml"


class Tuning(BaseModel):
    """Where tuned values come from.

    Attributes:
        episodes: played to find them.
        seeds: training seeds that they were chosen on, as "first..last".
        score: mean over those seeds; chosen as the best, it is a little better than what comes after.
        source: the command.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    episodes: int
    seeds: str
    score: float
    source: str


def tuned_constant(task_id: str) -> ServeAction:
    """The best constant action that was found for a task.

    Raises:
        InputError: the task is none of the shipped ones.
    """
    return ServeAction(**_values(task_id, "best_constant"))


def tuned_rule(task_id: str) -> ReactiveRule:
    """The best reactive rule that was found for a task.

    Raises:
        InputError: the task is none of the shipped ones.
    """
    return ReactiveRule(**_values(task_id, "reactive"))


def tuning(task_id: str, agent: str) -> Tuning:
    """How the values of `best_constant` or `reactive` were found."""
    return Tuning(**{name: _table(task_id)[agent][name] for name in Tuning.model_fields})


def _values(task_id: str, agent: str) -> dict[str, Any]:
    table = _table(task_id)[agent]
    return {name: value for name, value in table.items() if name not in Tuning.model_fields}


def _table(task_id: str) -> dict[str, Any]:
    tables = _tables()
    if task_id not in tables:
        raise InputError(
            f"nothing was tuned to '{task_id}': expected one of {', '.join(sorted(tables))}; for other tasks "
            "make a ConstantAgent or a ReactiveAgent with values of your own",
            field="task_id",
        )
    table: dict[str, Any] = tables[task_id]
    return table


@lru_cache(maxsize=1)
def _tables() -> dict[str, Any]:
    return tomllib.loads(PATH.read_text(encoding="utf-8"))
