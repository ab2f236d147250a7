"""A deployment that is steered window by window, for as long as it serves."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Container
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from llmserve_env.backend import WINDOW
from llmserve_env.controls import to_array
from llmserve_env.net.loops import forever
from llmserve_env.observation import Observer
from llmserve_env.rewards import Rewards

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmserve_env.agents import Agent
    from llmserve_env.backend import WindowRecord
    from llmserve_env.live.gateway.deployment import Deployment
    from llmserve_env.live.pilot.decisions import Decision
    from llmserve_env.live.pilot.pilot import Pilot
    from llmserve_env.tasks import Task

Told = Callable[["WindowRecord", "Decision | None", "float | None"], object]
"""Called once a window: its record, the decision that followed from it and is in force, its reward."""

_log = logging.getLogger(__name__)


class RunningReward:
    """Rewards of a service that has no end: the task's, with a demand that is seen rather than known.

    An episode's demand is the weight of all its requests. Here it is the mean weight of the requests that
    arrived in a window, over the last windows, as many as the task's episodes have, times that number.
    Nothing is gained by letting the queue grow. Nothing is earned for memory while nobody tells how full the
    KV caches are.

    Args:
        task: the task, which gives the formula.
    """

    MEANING = (
        "the task's formula; demand is the weight of what arrived, averaged over the last windows, "
        "as many as an episode of the task has"
    )

    def __init__(self, task: Task) -> None:
        self._rewards = Rewards(task)
        self._tenants = len(task.tenants)
        self._windows = task.windows
        self._arrived: deque[float] = deque(maxlen=task.windows)

    def of(self, window: NDArray[np.void], unmeasured: Container[str] = ()) -> float:
        """Reward of the next window.

        Args:
            window: WINDOW.
            unmeasured: fields of an observation that nobody tells.
        """
        self._arrived.append(self._rewards.demand(window["tenant_arrived"][: self._tenants]))
        demand = float(np.mean(self._arrived)) * self._windows
        earning = self._rewards.earning(window.reshape(1), unmeasured)
        components, _ = self._rewards.of(earning, np.array([demand]))
        return float(components.sum())


def warm_up(agent: Agent, task: Task) -> None:
    """Compile what windows need before anybody is served: requests would wait for it.

    What fails here fails in service, too, and is told there.
    """
    windows, action = np.zeros(1, WINDOW), to_array([task.start])
    RunningReward(task).of(windows[0])
    agent.reset(task, [0])
    for window in range(2):
        windows["end_s"] = (window + 1) * task.window_s
        seen = Observer(task).of(windows, action, np.array([window]))
        with suppress(Exception):
            agent.act(seen, windows.copy())


async def steer(
    deployment: Deployment,
    window_s: float,
    pilot: Pilot | None = None,
    told: Told = lambda record, decision, reward: None,
) -> None:
    """Serve windows, for ever. The configuration in force at the start serves the first one.

    Whatever fails in a window, the pilot's safe configuration comes into force, and the next window follows.

    Args:
        deployment: what is steered; its action is in force.
        window_s: length of a window (s).
        pilot: decides after each one; None: nobody does.
        told: see `Told`.
    """
    rewards = None if pilot is None else RunningReward(pilot.task)

    async def turn() -> None:
        """The end of a window, and what follows from it."""
        try:
            record = deployment.window()
        except Exception as error:
            if pilot is None:
                raise
            _fallen_back(deployment, pilot, error)
            return
        decision, reward = None, None
        if pilot is not None and rewards is not None:
            decision, reward = await _decided(deployment, pilot, rewards)
        told(record, decision, reward)

    await asyncio.sleep(window_s)
    await forever(turn, window_s, "the end of a window")


async def _decided(
    deployment: Deployment, pilot: Pilot, rewards: RunningReward
) -> tuple[Decision, float | None]:
    """What is in force from now on, and the reward of the window that has ended."""
    reward = None
    try:
        row, stale, excused = deployment.row.copy(), deployment.stale, deployment.excused
        reward = rewards.of(row, deployment.unmeasured)
        # In threads: requests do not wait for an agent, nor for a disk.
        await asyncio.to_thread(pilot.result, row, reward)
        decision = await asyncio.to_thread(pilot.decide, row, stale, excused)
        not_applied = deployment.apply(decision.applied)
        return await asyncio.to_thread(pilot.applied, not_applied), reward
    except Exception as error:
        return _fallen_back(deployment, pilot, error), reward


def _fallen_back(deployment: Deployment, pilot: Pilot, error: Exception) -> Decision:
    """The safe configuration is in force."""
    decision = pilot.fall_back(error)
    try:
        not_applied = deployment.apply(decision.applied)
    except Exception:
        _log.exception("the safe configuration could not be applied in engines; it is in the gateway")
        not_applied = deployment.gateway.apply(decision.applied)
    return decision.model_copy(update={"not_applied": not_applied})
