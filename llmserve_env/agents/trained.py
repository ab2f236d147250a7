"""The trained policies that come with the package, in weights/TASK/NAME."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmserve_env.agents.policy import CONFIG, PolicyAgent, load_policy
from llmserve_env.errors import InputError

if TYPE_CHECKING:
    from llmserve_env.tasks import Task

SHIPPED = ("ppo-1", "ppo-2", "ppo-3", "bc")
"""What a task has: PPO of training seeds 1, 2 and 3, and a clone of the reactive rule."""

FOLDERS = {**{name: name for name in SHIPPED}, "ppo": SHIPPED[0]}
"""Folders by the names of their agents. Plain "ppo" is that of training seed 1, whichever did best."""

_PACKAGE = Path(__file__).parents[1]


def weights_root() -> Path:
    """Where the weights are: in the installed package, or at the top of the checkout."""
    installed = _PACKAGE / "weights"
    return installed if installed.is_dir() else _PACKAGE.parent / "weights"


def trained_tasks(name: str) -> list[str]:
    """Ids of the tasks that there are weights for.

    Args:
        name: one of `FOLDERS`.
    """
    found = weights_root().glob(f"*/{FOLDERS[name]}")
    return sorted(folder.parent.name for folder in found if folder.is_dir())


def trained_folder(name: str, task_id: str) -> Path:
    """Folder of the weights.

    Args:
        name: one of `FOLDERS`.
        task_id: id of the task that they were trained on.

    Raises:
        InputError: there are none.
    """
    there = trained_tasks(name)
    if task_id not in there:
        known = ", ".join(there) or "no task"
        raise InputError(
            f"no '{name}' was trained on '{task_id}'; {weights_root()} has weights for {known}", field="agent"
        )
    return weights_root() / task_id / FOLDERS[name]


def trained_agent(name: str, task: Task) -> PolicyAgent:
    """The agent that plays them.

    Args:
        name: one of `FOLDERS`.
        task: what it will play, the shipped one or one that was changed from it.

    Raises:
        InputError: there are no weights, they are damaged, or they are another task's; names the file.
    """
    folder = trained_folder(name, task.id)
    policy = load_policy(folder)
    if policy.config.task_id != task.id:
        raise InputError(
            f"expected '{task.id}', found '{policy.config.task_id}'",
            file=str(folder / CONFIG),
            field="task_id",
        )
    agent = PolicyAgent(policy, name)
    try:
        agent.reset(task, [0])
    except InputError as error:
        raise InputError(error.reason, file=str(folder / CONFIG), field=error.field) from error
    return agent
