"""What the page keeps of an episode to draw it. Without Gradio: the guard's process draws up replays, too."""

from __future__ import annotations

from math import nan
from typing import TYPE_CHECKING, Any

import numpy as np

from llmserve_env.actions import CONTROLS, to_array
from llmserve_env.episode import Episode
from llmserve_env.rewards import COMPONENTS
from llmserve_env.schema import EpisodeLog, ServeAction
from llmserve_env.tasks import Task

if TYPE_CHECKING:
    from llmserve_env.schema import ServeObservation

PARTS = COMPONENTS
"""Names of the reward's parts."""
_SPANS = (20, 50, 100)
"""Windows that the plots span at first, before they span the whole episode."""


class Trace:
    """An episode so far, a number a window for everything that is drawn.

    Args:
        task: what is played.
        seed: of the episode.
        live: whether real engines serve, whose memory and use nobody measures.

    Attributes:
        columns: for each name as many numbers as windows were played; latencies are nan without any.
        lanes: for each control that the task grants, the values of its grid as an ACTION record has them.
        slo_ms: tightest promise of the time to first token (ms).
        ended: requests that ended so far.
        in_slo: those that ended within their SLO.
        score: so far.
        done: whether the episode is over.
        not_applied: fields of the last action that had no effect, with the reason.
    """

    def __init__(self, task: Task, seed: int, *, live: bool = False) -> None:
        self.title, self.seed, self.live = task.title, seed, live
        self.cell = f"{task.cell.engines} × {task.profile.name}"
        self.windows, self.window_s, self.horizon_s = task.windows, task.window_s, task.horizon_s
        self.engines = task.cell.engines
        self.slo_ms = 1e3 * min(tenant.ttft_slo_s for tenant in task.tenants)
        codes = task.grid.all()
        granted = [name for name, count in zip(CONTROLS, task.grid.nvec, strict=True) if count > 1]
        self.lanes = {name: np.unique(codes[name]).tolist() for name in granted}
        names = ("time_s", "waiting", "running", "p50_ttft_ms", "p99_ttft_ms", "kv", "busy", "up")
        self.columns: dict[str, list[float]] = {name: [] for name in (*names, *PARTS, *CONTROLS)}
        self.ended = self.in_slo = 0
        self.score, self.done = 0.0, False
        self.not_applied: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.columns["time_s"])

    @property
    def shown_s(self) -> float:
        """Time that the plots span: a round number of windows that holds those that were played (s)."""
        enough = next((count for count in _SPANS if count >= len(self)), self.windows)
        return min(enough * self.window_s, self.horizon_s)

    def add(self, observation: ServeObservation) -> None:
        """Take in the window that ended with an observation."""
        seen, told = observation, observation.metadata
        action = to_array([ServeAction.model_validate(told["action"])])[0]
        row: dict[str, Any] = {
            "time_s": seen.time_s,
            "waiting": seen.queue_depth,
            "running": seen.active_requests,
            "p50_ttft_ms": seen.p50_ttft_ms,
            "p99_ttft_ms": seen.p99_ttft_ms,
            "kv": 100 * seen.kv_cache_occupancy,
            "busy": 100 * min(seen.gpu_busy_share, 1.0),
            "up": 100 * seen.engines_up / self.engines,
            **{name: told["reward_components"].get(name, 0.0) for name in PARTS},
            **{name: action[name].item() for name in CONTROLS},
        }
        for name, value in row.items():
            self.columns[name].append(nan if value is None else value)
        for tenant in seen.tenants.values():
            self.ended += tenant.completed + tenant.failed
            self.in_slo += tenant.in_slo
        self.score, self.done, self.not_applied = told["score"], seen.done, told["not_applied"]


def replay(content: bytes) -> Trace:
    """The episode of a log, window by window.

    Args:
        content: an EpisodeLog as JSON, one that the grader took.
    """
    log = EpisodeLog.model_validate_json(content)
    task = Task.model_validate(log.task)
    trace = Trace(task, log.seed)
    episode = Episode(task)
    episode.reset(log.seed)
    for action in log.actions:
        trace.add(episode.step(action))
    return trace
