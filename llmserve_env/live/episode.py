"""Episodes that an endpoint serves."""

from __future__ import annotations

from dataclasses import asdict
from math import fsum
from typing import TYPE_CHECKING, Any

import numpy as np

import llmserve_env
from llmserve_env.backend import WINDOW
from llmserve_env.errors import InputError
from llmserve_env.live.endpoint import NOT_APPLIED, EndpointBackend
from llmserve_env.live.ledger import UNMEASURED
from llmserve_env.observation import describe
from llmserve_env.recording import record_digests
from llmserve_env.rewards import COMPONENTS, Rewards
from llmserve_env.schema import EpisodeLog, ServeAction, ServeObservation

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmserve_env.live.settings import EndpointSettings
    from llmserve_env.tasks import Task


class LiveEpisode:
    """One episode of a task that an endpoint serves in real time, with the interface of `Episode`.

    Rewards are the task's, of what was measured: nothing is earned for memory, which a client cannot see,
    nor for quality where the settings do not state the weights' precision; idle time is a lower bound. A
    score is a share of the demand that was sent, after the settings' bounds. Scores of live episodes do not
    compare with simulated ones, and their grade is not `verified`: nothing can replay them.

    `metadata["live"]` of an observation has what was cut, what failed and why, and what is unmeasured.

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
        self._backend: EndpointBackend | None = None
        self._window: Any = np.zeros((), WINDOW)
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
        self._backend.serve(action, self.task.window_s)
        self._window = self._backend.window
        earning = self._window.reshape(1).copy()
        earning["mean_kv_occupancy"] = 1.0  # unknown: as if it were full, which earns nothing
        components, costs = self._rewards.of(earning, np.array([self._demand]))
        self._components, self._cost = components[0], float(costs[0])
        self._windows.append(self._window)
        self._actions.append(action)
        self._earned.append(float(components.sum()))
        most = self.task.max_in_flight
        at_horizon = len(self._windows) >= self.task.windows
        self._terminated = most is not None and int(self._window["in_flight"]) > most and not at_horizon
        self._done = at_horizon or self._terminated
        if self._done:
            self.close()
        return self.observation()

    @property
    def done(self) -> bool:
        """Whether the episode is over."""
        return self._done

    def observation(self) -> ServeObservation:
        """What the agent sees now."""
        begun = bool(self._windows)
        action = self._actions[-1] if begun else self.task.start
        metadata: dict[str, Any] = {
            "seed": self._seed,
            "reward_components": dict(zip(COMPONENTS, self._components.tolist(), strict=True)),
            "cost": self._cost,
            "score": self._score(),
            "action": action.model_dump(mode="json"),
            "not_applied": dict(NOT_APPLIED) if begun else {},
            "terminated": self._terminated,
            "truncated": self.done and not self._terminated,
        }
        if self._backend is not None:
            metadata["live"] = {
                "endpoint": self.settings.shown_url,
                "model": self.settings.model,
                "cuts": asdict(self._backend.cuts),
                **self._backend.told(),
                "unmeasured": dict(UNMEASURED),
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
            digests=record_digests(self._windows, len(self.task.tenants)),
            terminated=self._terminated,
            score=self._score(),
        )

    def close(self) -> None:
        """Cancel what is at the endpoint; the log stays. At its end an episode does it itself."""
        if self._backend is not None:
            self._backend.close()

    def _begin(self, seed: int) -> None:
        self._seed = seed
        self._demand = self._cost = 0.0
        self._components = np.zeros(len(COMPONENTS))
        self._windows: list[NDArray[np.void]] = []
        self._actions: list[ServeAction] = []
        self._earned: list[float] = []
        self._terminated = False
        self._done = False

    def _score(self) -> float:
        """Mean reward over all windows of the horizon: what is still to come counts as nothing."""
        return fsum(self._earned) / self.task.windows
