"""What plays: the interface of every agent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from llmserve_env.tasks import Task


class Agent(Protocol):
    """Sets the configuration of n episodes side by side, from what has been seen of each so far.

    An episode's actions do not depend on which others are played beside it.

    Attributes:
        name: under which results are reported.
    """

    name: str

    def reset(self, task: Task, seeds: Sequence[int]) -> None:
        """Begin an episode of a task for each of n seeds; a random agent draws from them."""
        ...

    def act(self, observations: NDArray[np.float32], windows: NDArray[np.void]) -> NDArray[np.void]:
        """Configurations for the next window of each episode.

        Args:
            observations: float32[n, features].
            windows: WINDOW[n], records of the last window; zeros before the first.

        Returns:
            ACTION[n]; a control that the task does not grant stays as in `task.start`.
        """
        ...
