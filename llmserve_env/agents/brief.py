"""What a player is told of a task before it begins, where it holds no `Task`: over HTTP, or in a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from llmserve_env.schema import ServeAction

if TYPE_CHECKING:
    from llmserve_env.tasks import Task

_MODEL = ConfigDict(extra="ignore", frozen=True)


class TenantBrief(BaseModel):
    """A tenant and what it was promised.

    Attributes:
        name: of the tenant.
        ttft_slo_ms: promised time to first token (ms).
        tpot_slo_ms: promised time per output token (ms).
        weight: worth of one of its requests relative to the other tenants'.
        priority: lower is served first under priority routing.
    """

    model_config = _MODEL

    name: str
    ttft_slo_ms: float
    tpot_slo_ms: float
    weight: float
    priority: int


class TaskBrief(BaseModel):
    """A task as its players know it; an entry of the service's `GET /tasks` reads as one.

    Attributes:
        id: of the task.
        title: a line.
        description: what makes it a task.
        window_s: time between two actions (s).
        windows: in an episode.
        engines: of the cell.
        controls: the values that the player chooses from, by control.
        start: configuration that the cell starts in.
        tenants: who is served.
    """

    model_config = _MODEL

    id: str
    title: str
    description: str
    window_s: float
    windows: int
    engines: int
    controls: dict[str, list[Any]]
    start: ServeAction
    tenants: list[TenantBrief]

    @classmethod
    def of(cls, task: Task) -> TaskBrief:
        """The brief of a task."""
        return cls(
            id=task.id,
            title=task.title,
            description=task.description,
            window_s=task.window_s,
            windows=task.windows,
            engines=task.cell.engines,
            controls=task.controls,
            start=task.start,
            tenants=[
                TenantBrief(
                    name=tenant.name,
                    ttft_slo_ms=tenant.ttft_slo_s * 1e3,
                    tpot_slo_ms=tenant.tpot_slo_s * 1e3,
                    weight=tenant.weight,
                    priority=tenant.priority,
                )
                for tenant in task.tenants
            ],
        )
