"""The tasks as an agent is told of them, here and over the wire."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from llmserve_env.schema import ServeAction
from llmserve_env.sim.simulator import SimulatorBatch
from llmserve_env.tasks import Task, list_tasks, load_task
from llmserve_env.workloads.workload import Workload

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
    """For each control that the agent has, the ascending values of its grid; others stay as they start."""
    unavailable: dict[str, list[Any]] = {}
    """For some of the controls, values of the grid that have no effect on this cell."""
    start: ServeAction
    """Configuration that the cell starts in."""
    tenants: list[TenantInfo]
    """Who sends requests, in the order of the observation's slots."""


@lru_cache(maxsize=1)
def catalog() -> tuple[TaskInfo, ...]:
    """The shipped tasks."""
    return tuple(task_info(load_task(name)) for name in list_tasks())


def task_info(task: Task) -> TaskInfo:
    """What an agent is told of a task."""
    controls = {name: list(values) for name, values in task.grid.values.items() if len(values) > 1}
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
        unavailable=_unavailable(task, controls),
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


def _unavailable(task: Task, controls: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The values of `controls` that have no effect, as the task's cell says without anything to serve."""
    cell = task.cell
    nothing = Workload(np.zeros(0), np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int16))
    simulator = SimulatorBatch(
        task.profile,
        [nothing],
        engines=cell.engines,
        prefill_engines=cell.prefill_engines,
        max_num_batched_tokens=cell.max_num_batched_tokens,
        prefix_cache=False,
    )
    lost = {
        name: [value for value in values if name in simulator.not_applied(ServeAction(**{name: value}))]
        for name, values in controls.items()
    }
    return {name: values for name, values in lost.items() if values}
