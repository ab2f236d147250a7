"""Episodes that an endpoint serves."""

from __future__ import annotations

from dataclasses import asdict
from math import fsum
from typing import TYPE_CHECKING, Any

import numpy as np

import llmserve_env
from llmserve_env.actions import to_array
from llmserve_env.backend import WINDOW
from llmserve_env.errors import InputError
from llmserve_env.live.endpoint import EndpointBackend
from llmserve_env.live.gateway.ledger import UNMEASURED
from llmserve_env.observation import Observer, describe
from llmserve_env.recording import record_digests
from llmserve_env.rewards import COMPONENTS, Rewards
from llmserve_env.schema import EpisodeLog, ServeAction, ServeObservation

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmserve_env.live.settings import EndpointSettings
    from llmserve_env.tasks import Task


class LiveEpisode:
    """One episode of a task that an endpoint serves in real time, with the interface of `Episode`.

    Rewards are the task's, of what was measured: nothing is earned for memory in a window in which not all
    servers told the usage of their KV caches, nor for quality where nobody states the weights' precision;
    idle time is a lower bound. A score is a share of the demand that was sent, after the settings' bounds.
    Scores of live episodes do not compare with simulated ones, and their grade is not `verified`: nothing can
    replay them.

    `metadata["live"]` of an observation has what was cut, what failed and why, what is unmeasured, and why
    the servers' metrics are stale, if they are.

    Args:
        task: what is played.
        settings: the endpoint.

    Example:
        >>> episode = LiveEpisode(task, EndpointSettings("http://127.0.0.1:8101/v1", "tiny"))
        >>> observation = episode.reset(seed=1)
        >>> while not observation.done:
        ...     observation = episode.step(ServeAction(batch_cap=8))
        >>> grade(episode.log()).verified
        False
    """

    def __init__(self, task: Task, settings: EndpointSettings) -> None:
        self.task = task
        self.settings = settings
        self._rewards = Rewards(task)
        self._observer = Observer(task)
        self._backend: EndpointBackend | None = None
        self._window: Any = np.zeros((), WINDOW)
        self._not_applied: dict[str, str]
        self._unmeasured: dict[str, str]
        self._stale: str | None
        self._begin(0)

    def reset(self, seed: int) -> ServeObservation:
        """Begin the episode with a seed; nothing is sent before the first step."""
        self.close()
        self._begin(seed)
        self._backend = EndpointBackend(
            self.settings,
            self.task.requests(seed),
            window_s=self.task.window_s,
            engines=self.task.cell.engines,
            seed=seed,
            start=self.task.start,
        )
        self._window = self._backend.window
        counts = np.bincount(self._backend.workload.tenant, minlength=len(self.task.tenants))
        self._demand = self._rewards.demand(counts)
        return self.observation()

    def step(self, action: ServeAction) -> ServeObservation:
        """Serve one window: takes as long as the task's windows are.

        Raises:
            InputError: the episode has not begun or is over.
        """
        if self._backend is None:
            raise InputError("call reset before step")
        if self.done:
            raise InputError("the episode is over: call reset")
        record = self._backend.serve(action, self.task.window_s)
        self._not_applied = record.not_applied
        self._unmeasured, self._stale = self._backend.unmeasured, self._backend.stale
        self._window = self._backend.window
        earning = self._window.reshape(1).copy()
        if "kv_cache_occupancy" in self._unmeasured:
            earning["mean_kv_occupancy"] = 1.0  # as if it were full, which earns nothing
        components, costs = self._rewards.of(earning, np.array([self._demand]))
        self._cost = float(costs[0])
        self._windows.append(self._window)
        self._actions.append(action)
        self._parts.append(dict(zip(COMPONENTS, components[0].tolist(), strict=True)))
        self._earned.append(fsum(self._parts[-1].values()))
        most = self.task.max_in_flight
        at_horizon = len(self._windows) >= self.task.windows
        self._terminated = most is not None and int(self._window["in_flight"]) > most and not at_horizon
        self._done = at_horizon or self._terminated
        if self._done:
            self.close()
        return self.observation()

    @property
    def window(self) -> NDArray[np.void]:
        """WINDOW, the last record."""
        row: NDArray[np.void] = self._window
        return row

    @property
    def action(self) -> ServeAction:
        """In force."""
        return self._actions[-1] if self._actions else self.task.start

    @property
    def stale(self) -> str | None:
        """Why the servers' metrics could not be trusted at the last window's end; None where they could."""
        return self._stale

    def features(self) -> NDArray[np.float32]:
        """float32[features], the observation as a vector."""
        steps = np.array([len(self._windows)])
        seen = self._observer.of(self._window.reshape(1), to_array([self.action]), steps)
        return seen.reshape(-1)

    def capabilities(self) -> dict[str, str]:
        """How each field of an action is applied here, as `Deployment.capabilities`.

        Raises:
            InputError: the episode has not begun, or is closed.
        """
        if self._backend is None:
            raise InputError("call reset before capabilities")
        return self._backend.capabilities()

    def cannot_apply(self, action: ServeAction) -> dict[str, str]:
        """Fields of an action that could not be applied now, with the reason.

        Raises:
            InputError: the episode has not begun, or is closed.
        """
        if self._backend is None:
            raise InputError("call reset before cannot_apply")
        return self._backend.cannot_apply(action)

    @property
    def done(self) -> bool:
        """Whether the episode is over."""
        return self._done

    def observation(self) -> ServeObservation:
        """What the agent sees now."""
        begun = bool(self._windows)
        metadata: dict[str, Any] = {
            "seed": self._seed,
            "reward_components": dict(self._parts[-1]) if begun else dict.fromkeys(COMPONENTS, 0.0),
            "cost": self._cost,
            "score": self._score(),
            "action": self.action.model_dump(mode="json"),
            "not_applied": dict(self._not_applied),
            "terminated": self._terminated,
            "truncated": self.done and not self._terminated,
        }
        if self._backend is not None:
            metadata["live"] = {
                "endpoint": self.settings.shown_url,
                "model": self.settings.model,
                "cuts": asdict(self._backend.cuts),
                **self._backend.told(),
                "unmeasured": dict(self._unmeasured),
                "stale": self._stale,
            }
        return describe(
            self.task,
            self._window,
            len(self._windows),
            reward=self._earned[-1] if begun else 0.0,
            done=self.done,
            metadata=metadata,
        )

    def log(self) -> EpisodeLog:
        """The log so far; `grade` takes it for what it states."""
        return EpisodeLog(
            package_version=llmserve_env.__version__,
            task=self.task.model_dump(mode="json"),
            seed=self._seed,
            live=True,
            actions=list(self._actions),
            rewards=list(self._earned),
            components=[dict(each) for each in self._parts],
            digests=record_digests(self._windows, len(self.task.tenants)),
            terminated=self._terminated,
            score=self._score(),
        )

    def close(self) -> None:
        """Cancel what is at the endpoint, and bring back its settings as they were found; the log stays.

        At its end an episode does it itself.

        Raises:
            InputError: settings cannot be brought back.
        """
        if self._backend is not None:
            self._backend.close()

    def _begin(self, seed: int) -> None:
        self._seed = seed
        self._demand = self._cost = 0.0
        self._parts: list[dict[str, float]] = []
        self._not_applied = {}
        self._unmeasured = dict(UNMEASURED)
        self._stale = None
        self._windows: list[NDArray[np.void]] = []
        self._actions: list[ServeAction] = []
        self._earned: list[float] = []
        self._terminated = False
        self._done = False

    def _score(self) -> float:
        """Mean reward over all windows of the horizon: what is still to come counts as nothing."""
        return fsum(self._earned) / self.task.windows
