"""Small runs of PPO's trainers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

ENVS, ROLLOUT = 4, 70  # an episode has 120 windows: the checkpoint lies in the second one


def trainer_of(module: Any, rollouts: int) -> Callable[..., Any]:
    """Makes trainers of a module, for that many rollouts."""

    def make(out: Path, **changes):
        arguments = {
            "task_id": "bursty_workload",
            "out": out,
            "steps": rollouts * ENVS * ROLLOUT,
            "envs": ENVS,
            "rollout": ROLLOUT,
            "minibatches": 2,
            "hidden": 16,
            "device": "cpu",
            **changes,
        }
        return module.Trainer(module.Arguments(**arguments))

    return make


def updates(trainer: Any, count: int) -> list[dict[str, float]]:
    return [trainer.learn(trainer.collect()) for _ in range(count)]
