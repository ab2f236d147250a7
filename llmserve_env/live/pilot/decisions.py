"""Decisions about a running service: who decided what, and why."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from llmserve_env.schema import ServeAction


class Decision(BaseModel):
    """What is in force in a window of a service, and who set it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    window: int
    """Index of the window that it is for; the first is 0."""
    time_s: float
    """When it was made (Unix time, s)."""
    proposed: ServeAction | None
    """The agent's action; None where it was not asked, or gave none."""
    decided: ServeAction
    """What shield, limits and fallback made of it."""
    applied: ServeAction
    """What is in force: what was decided, in a dry run what was in force at the start."""
    by: Literal["agent", "shield", "limit", "fallback"]
    """The last that changed what was decided."""
    rule: str | None = None
    """Of the shield: panic, rescue or veto. Of the fallback: stale, exception or slow. Of a limit: the fields
    that it held back, with commas between them.
    """
    reason: str | None = None
    """Why, in a line."""
    decision_s: float = 0.0
    """Time that it took (s)."""
    dry_run: bool = False
    """Whether it is only told."""
    not_applied: dict[str, str] = {}
    """Fields without effect, with the reason: those that the service cannot apply, and those that the agent
    set and the task does not grant.
    """
