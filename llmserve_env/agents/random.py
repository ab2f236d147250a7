"""An agent that knows nothing: every window another point of the grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llmserve_env.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from llmserve_env.tasks import Task

_ACTIONS = (
    2**31 + 3
)  # spawn key: an episode's actions are independent of its traffic, drawn from the same seed


class RandomAgent:
    """Draws each control uniformly from the task's grid, in each window anew, from the episode's seed."""

    def __init__(self) -> None:
        self.name = "random"
        self._task: Task | None = None
        self._draws: list[np.random.Generator] = []

    def reset(self, task: Task, seeds: Sequence[int]) -> None:
        """Begin episodes, each with a stream of its own."""
        roots = (np.random.SeedSequence(int(seed), spawn_key=(_ACTIONS,)) for seed in seeds)
        self._task, self._draws = task, [np.random.default_rng(root) for root in roots]

    def act(self, observations: NDArray[np.float32], windows: NDArray[np.void]) -> NDArray[np.void]:
        """ACTION[n], points of the grid.

        Raises:
            InputError: no episode has begun.
        """
        if self._task is None:
            raise InputError("call reset before act")
        grid = self._task.grid
        return grid.actions(np.stack([draw.integers(grid.nvec) for draw in self._draws]))
