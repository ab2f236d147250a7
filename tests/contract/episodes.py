"""Short episodes of the shipped tasks and sequences of actions, drawn from seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llmserve_env.controls import SPECS, to_action, to_array
from llmserve_env.episode import Episode
from llmserve_env.hardware.profile import TIERS
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import load_task

GOLDENS = Path(__file__).resolve().parents[1] / "golden" / "tasks"
GOLDEN_WINDOWS = 24

IDLE = ServeAction(batch_cap=1, kv_budget_fraction=0.1)


def short(task_id, windows, **changes):
    """A shipped task that ends after so many windows."""
    return load_task(task_id, horizon_s=windows * load_task(task_id).window_s, **changes)


def uniform(task, rng, count):
    """Each window another action of the grid."""
    return task.grid.actions(rng.integers(0, task.grid.nvec, (count, len(task.grid.nvec))))


def stationary(task, rng, count):
    """One action of the grid throughout."""
    return np.repeat(uniform(task, rng, 1), count)


def sticky(task, rng, count):
    """Actions of the grid that stay for some windows."""
    actions = uniform(task, rng, count)
    stays = rng.random(count) < 0.8
    for index in range(1, count):
        if stays[index]:
            actions[index] = actions[index - 1]
    return actions


def anything(rng, count):
    """Actions of the schema, on no grid, bounds included."""
    actions = constant(count)
    actions["batch_cap"] = rng.choice([1, 2, 7, 100, 511, 512], count)
    actions["kv_budget_fraction"] = rng.choice([0.1, 0.1234, 0.999, 1.0], count)
    actions["speculation_depth"] = rng.integers(0, 9, count)
    actions["quantization_tier"] = rng.integers(0, len(TIERS), count)
    actions["prefill_decode_split"] = rng.integers(0, 2, count)
    actions["priority_routing"] = rng.integers(0, 2, count)
    actions["admission_rate"] = rng.choice([0.01, 3.0, 1000.0, np.inf, np.inf], count)
    return actions


def constant(count, **values):
    """One action throughout."""
    return np.repeat(to_array([ServeAction(**values)]), count)


def played(task, seed, actions):
    """The episode after ACTION[k], or where it ended before."""
    episode = Episode(task)
    episode.reset(seed)
    for row in actions:
        if episode.done:
            break
        episode.step(to_action(row))
    return episode


def golden_episode(task_id):
    """The first windows of a shipped task under actions that a seed fixes; their log is in tests/golden."""
    task = load_task(task_id)
    actions = sticky(task, np.random.default_rng(20), GOLDEN_WINDOWS)
    actions["quantization_tier"][: GOLDEN_WINDOWS // 2] = 0  # other weights load for longer than some windows
    return played(task, 20, actions)


def kept(task):
    """The controls that a task does not grant."""
    return [name for name in SPECS if name not in task.grid.granted]


def other_values(task, name):
    """Values of a control that the task does not grant and that are not the one at which it stays."""
    spec, stays = SPECS[name], task.grid.first(1)[name][0]
    codes = range(len(spec.options)) if spec.options else np.linspace(spec.low, spec.high, 3)
    codes = [code if spec.options else spec.type(code) for code in codes]
    return [spec.value(code) for code in [*codes, *([np.inf] if spec.optional else [])] if code != stays]


def beyond(task, which=-1, **granted):
    """An action that sets all controls that the task does not grant, and what may come into force of it."""
    values = {name: other_values(task, name)[which] for name in kept(task)}
    return ServeAction(**granted, **values), ServeAction(**{**task.start.model_dump(), **granted})
