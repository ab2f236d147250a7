"""What clients ask for. Without OpenEnv, whose import takes seconds: the guard's process needs these, too."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field

from llmserve_env.schema import EpisodeLog, ServeAction

_REQUEST = ConfigDict(extra="forbid", use_attribute_docstrings=True)
_MOST_WINDOWS = 10_000  # that are looked at, whatever the settings: a body has room for a million actions
_SESSION_ID = Field(None, max_length=255)


class ResetRequest(BaseModel):
    """Which episode to begin."""

    model_config = _REQUEST

    task_id: str = Field("static_workload", max_length=255)
    """Id of a task, see /tasks."""
    seed: int | None = Field(None, ge=0, lt=2**63)
    """Seed of the episode: it fixes the traffic. Without one a training seed is drawn; those from 2**31
    on are for evaluation.
    """
    episode_id: str | None = Field(None, max_length=255)
    """Name of the episode, echoed in the state (default: one is made)."""
    workload: str | dict[str, Any] | None = None
    """Other traffic than the task's: the URI of a generator, or a scenario's table. Files cannot be named."""
    horizon_s: float | None = Field(None, gt=0, le=1e6, allow_inf_nan=False)
    """Another length of the episode (s), a whole number of windows."""
    features: bool = False
    """Whether observations carry the vector that Gymnasium agents see, in metadata.features."""
    records: bool = False
    """Whether observations carry the window's record, which agents read, in metadata.record."""
    session_id: str | None = _SESSION_ID
    """Session to play in (default: of the header X-Session-Id, of the cookie, a new one)."""


class StepRequest(BaseModel):
    """Configuration for the next window."""

    model_config = _REQUEST

    action: ServeAction
    """What to set; fields that are left out have their defaults, and those that the task does not grant stay
    as they start.
    """
    session_id: str | None = _SESSION_ID
    """Session to play in (default: of the header X-Session-Id, of the cookie)."""
    timeout_s: float | None = Field(None, gt=0)
    """OpenEnv's; a window is always played to its end."""
    request_id: str | None = Field(None, max_length=255)
    """OpenEnv's."""


def _bounded(log: Any) -> Any:
    for name in ("actions", "rewards", "digests"):
        entries = log.get(name) if isinstance(log, dict) else None
        if isinstance(entries, list) and len(entries) > _MOST_WINDOWS:
            raise ValueError(f"{name}: expected at most {_MOST_WINDOWS:,}, found {len(entries):,}")
    return log


class StepsData(BaseModel):
    """Configurations for the next windows, one each."""

    model_config = _REQUEST

    actions: Annotated[list[ServeAction], FailFast()] = Field(min_length=1, max_length=_MOST_WINDOWS)
    """What to set; the rest is not played when the episode ends before."""
    every: bool = True
    """Whether each window's observation is wanted, or only the last one's."""


class StepsRequest(StepsData):
    """As the WebSocket's step_n, with the session."""

    session_id: str | None = _SESSION_ID
    """Session to play in (default: of the header X-Session-Id, of the cookie)."""


class GradeData(BaseModel):
    """What to grade."""

    model_config = _REQUEST

    episode_log: Annotated[EpisodeLog | None, BeforeValidator(_bounded)] = None
    """A log of any episode, replayed and refused if it does not match (default: the session's episode)."""


class GradeRequest(GradeData):
    """As the WebSocket's grade, with the session."""

    session_id: str | None = _SESSION_ID
    """Session whose finished episode to grade."""
