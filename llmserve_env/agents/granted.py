"""Which controls a task grants, and between which values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llmserve_env.controls import CONTROLS

if TYPE_CHECKING:
    from llmserve_env.tasks import Task


def granted(task: Task) -> tuple[str, ...]:
    """Names of the controls that an agent sets in a task, in the order of CONTROLS."""
    return tuple(name for name, count in zip(CONTROLS, task.grid.nvec, strict=True) if count > 1)


def finite_ends(task: Task, control: str) -> tuple[float, float]:
    """The lowest and the highest value that a task's grid has for a control, as ACTION holds it.

    Values between them are as good as those of the grid. An admission rate of inf, which lets all in, is no
    end: the highest finite one is (a grid without any has none to give, and inf is both).
    """
    codes = np.unique(task.grid.all()[control]).astype(float)
    finite = codes[np.isfinite(codes)]
    if not len(finite):
        return np.inf, np.inf
    return float(finite[0]), float(finite[-1])
