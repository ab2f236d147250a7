"""The tasks as an agent is told of them, here and over the wire."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ConfigDict

from llmserve_env.episode import EpisodeBatch
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import Task, list_tasks, load_task

# Not "forbid": a newer server may say more.
_MODEL = ConfigDict(frozen=True, use_attribute_docstrings=True)


class TenantInfo(BaseModel):
    """A client of the service."""

    model_config = _MODEL

    name: str
    """Unique in the task."""
    ttft_slo_ms: float
    """Time to first token that it was promised (ms)."""
    tpot_slo_ms: float
    """Time per output token that it was promised (ms)."""
    weight: float
    """Worth of one of its requests relative to the other tenants'."""
    priority: int
    """Request priority, lower is served first under priority routing."""


class TaskInfo(BaseModel):
    """A task, without the traffic that an agent is not told of."""

    model_config = _MODEL

    id: str
    """Name of the task."""
    title: str
    """What it is in a line."""
    difficulty: str
    """One of easy, medium, hard."""
    description: str
    """What makes it a task."""
    window_s: float
    """Time between two actions (s)."""
    horizon_s: float
    """Length of an episode (s)."""
    windows: int
    """Windows in an episode."""
    engines: int
    """Engines in the cell."""
    profile: str
    """Hardware and model of every engine."""
    controls: dict[str, list[Any]]
    """For each control that the agent has, the ascending values of its grid."""
    unavailable: dict[str, list[Any]] = {}
    """For some of the controls, values of the grid that have no effect on this cell."""
    start: ServeAction
    """Configuration that the cell starts in."""
    tenants: list[TenantInfo]
    """Who sends requests, in the order of the observation's slots."""


@lru_cache(maxsize=1)
def catalog() -> tuple[TaskInfo, ...]:
    """The shipped tasks."""
    told = []
    for name in list_tasks():
        batch = EpisodeBatch(load_task(name))
        batch.reset([0])
        told.append(task_info(batch.task, batch.simulator.not_applied))
    return tuple(told)


def task_info(task: Task, not_applied: Callable[[ServeAction], Mapping[str, str]]) -> TaskInfo:
    """What an agent is told of a task.

    Args:
        task: what is played.
        not_applied: the fields of an action that have no effect on the cell, as its backend knows them.
    """
    controls = {name: list(values) for name, values in task.grid.values.items() if len(values) > 1}
    unavailable = {
        name: [value for value in values if name in not_applied(ServeAction(**{name: value}))]
        for name, values in controls.items()
    }
    return TaskInfo(
        id=task.id,
        title=task.title,
        difficulty=task.difficulty,
        description=task.description,
        window_s=task.window_s,
        horizon_s=task.horizon_s,
        windows=task.windows,
        engines=task.cell.engines,
        profile=task.profile.name,
        controls=controls,
        unavailable={name: values for name, values in unavailable.items() if values},
        start=task.start,
        tenants=[
            TenantInfo(
                name=tenant.name,
                ttft_slo_ms=round(tenant.ttft_slo_s * 1e3, 6),
                tpot_slo_ms=round(tenant.tpot_slo_s * 1e3, 6),
                weight=tenant.weight,
                priority=tenant.priority,
            )
            for tenant in task.tenants
        ],
    )
