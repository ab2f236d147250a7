"""An agent that sets one configuration and leaves it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llmserve_env.controls import CONTROLS, to_array
from llmserve_env.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from llmserve_env.schema import ServeAction
    from llmserve_env.tasks import Task


class ConstantAgent:
    """Sets the same configuration in every window.

    Args:
        action: the configuration.
        name: under which results are reported.
    """

    def __init__(self, action: ServeAction, name: str = "constant") -> None:
        self.name = name
        self._action = to_array([action])

    def reset(self, task: Task, seeds: Sequence[int]) -> None:
        """Begin episodes.

        Raises:
            InputError: the action sets a control that the task does not grant.
        """
        start = to_array([task.start])
        for name in CONTROLS:
            if name not in task.grid.granted and self._action[name][0] != start[name][0]:
                raise InputError(f"{task.id} does not grant this control", field=name)

    def act(self, observations: NDArray[np.float32], windows: NDArray[np.void]) -> NDArray[np.void]:
        """ACTION[n], the configuration n times."""
        return np.repeat(self._action, len(windows))
