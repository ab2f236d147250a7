"""What an environment keeps of the episode that it plays, for its log and its pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llmserve_env.actions import ACTION
from llmserve_env.backend import WINDOW
from llmserve_env.rewards import COMPONENTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmserve_env.episode import EpisodeBatch


class Recording:
    """The windows of an episode so far.

    Attributes:
        rewards: of each window.
        terminated: whether the task ended the episode.
    """

    def __init__(self) -> None:
        self.rewards: list[float] = []
        self.terminated = False
        # As bytes: a copy of a record with many fields takes 12 us, its bytes 0.1 us.
        self._windows = bytearray()
        self._actions = bytearray()
        self._components = bytearray()

    def add(self, batch: EpisodeBatch, reward: float, terminated: bool) -> None:
        """Keep the last window of a batch of one."""
        self._windows += batch.windows.tobytes()
        self._actions += batch.actions.tobytes()
        self._components += batch.components.tobytes()
        self.rewards.append(reward)
        self.terminated = terminated

    @property
    def windows(self) -> NDArray[np.void]:
        """WINDOW[k]."""
        return np.frombuffer(bytes(self._windows), WINDOW)

    @property
    def actions(self) -> NDArray[np.void]:
        """ACTION[k], what was set in each window."""
        return np.frombuffer(bytes(self._actions), ACTION)

    @property
    def components(self) -> NDArray[np.float64]:
        """float64[k, 5], parts of each reward."""
        return np.frombuffer(bytes(self._components)).reshape(-1, len(COMPONENTS))
