"""What a window is worth before anybody has weighed its parts: objectives.

They are the parts of the reward (`llmserve_env.rewards`) without their weights. With g, what the requests
that met their SLO earned:

    goodput  g
    latency  g x headroom
    cost     g x what the cell left free: idle GPU and free KV memory
    quality  g x precision

Free KV memory, the fifth part of the reward, is capacity that was paid for and not needed, as idle GPU time
is: the two are one objective, in the proportion of the task's weights for them (of idle GPU alone, where both
are 0). So the objectives times `Objectives.weights`, the task's own weights, sum to the reward, and weights
that sum to 1 give a score in 0..1, as the mean of each objective over an episode is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llmserve_env.episode import EpisodeBatch
from llmserve_env.rewards import COMPONENTS, Rewards

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from llmserve_env.episode import StepResult
    from llmserve_env.tasks import Task

OBJECTIVES = ("goodput", "latency", "cost", "quality")


class Objectives:
    """Objectives of the windows of a task.

    Args:
        task: whose requests, cell and weights count.

    Attributes:
        weights: float64[4], the task's own, in the order of OBJECTIVES; they sum to 1.
    """

    def __init__(self, task: Task) -> None:
        own = task.reward
        spared = own.memory + own.cost
        self._memory = own.memory / spared if spared else 0.0
        self.weights = np.array([own.goodput, own.latency, spared, own.quality])
        unweighted = own.model_copy(update=dict.fromkeys(COMPONENTS, 1.0))
        self._rewards = Rewards(task.model_copy(update={"reward": unweighted}))

    def of(self, windows: NDArray[np.void], demand: NDArray[np.float64]) -> NDArray[np.float64]:
        """Objectives of one window of each of n episodes.

        Args:
            windows: WINDOW[n].
            demand: float64[n], weight of all requests of the whole episode.

        Returns:
            float64[n, 4], each 0 or more, their means over an episode at most 1.
        """
        parts, _ = self._rewards.of(windows, demand)
        goodput, latency, memory, cost, quality = parts.T
        spared = self._memory * memory + (1.0 - self._memory) * cost
        return np.stack([goodput, latency, spared, quality], axis=1)


class ObjectiveBatch(EpisodeBatch):
    """Episodes that tell their objectives, too.

    Args:
        task: and `num_episodes`, and all others: as `EpisodeBatch`.

    Attributes:
        objectives: float64[n, 4], of the last window; 0 where an episode begins.
        earned: float64[n, 4], of the last call of `step`, whatever was reset since.
        means: float64[n, 4], of the episode so far: what is still to come counts as nothing, as in `scores`.
    """

    def __init__(self, task: Task, num_episodes: int = 1, **options: Any) -> None:
        super().__init__(task, num_episodes, **options)
        self._objectives = Objectives(task)
        self.objectives = np.zeros((num_episodes, len(OBJECTIVES)))
        self.earned = self.objectives
        self.means = self.objectives

    def reset(self, seeds: Sequence[int], which: NDArray[np.bool_] | None = None) -> NDArray[np.float32]:
        """As `EpisodeBatch.reset`."""
        observations = super().reset(seeds, which)
        begun = (self._all if which is None else which)[:, None]
        self.objectives = np.where(begun, 0.0, self.objectives)
        self.means = np.where(begun, 0.0, self.means)
        return observations

    def step(self, actions: NDArray[Any], which: NDArray[np.bool_] | None = None) -> StepResult:
        """As `EpisodeBatch.step`."""
        result = super().step(actions, which)
        self.earned = self._objectives.of(self.windows, self._demand)
        if which is not None:
            self.earned[~which] = 0.0
        self.objectives = self.earned
        self.means = self.means + self.earned / self.task.windows
        return result
