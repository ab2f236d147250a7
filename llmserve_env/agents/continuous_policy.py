"""Trained policies of the continuous form (`LLMServeContinuous-v0`), played with NumPy alone.

A folder holds the same two files as that of `policy`: `policy.json`, whose `form` is continuous, and
`policy.safetensors`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from llmserve_env.agents.policy import CLIP, CONFIG, Setter, check_grid, checked, read_policy
from llmserve_env.controls import BoxActions
from llmserve_env.errors import InputError
from llmserve_env.files import SETTINGS_BYTES, read_bytes
from llmserve_env.observation import Reader, feature_names

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmserve_env.tasks import Task

EDGE = 0.98
"""Farthest from 0 that a setting counts as: the end of the box is infinitely far before the squash."""


class ContinuousConfig(BaseModel):
    """What a policy is, beside its weights."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    form: Literal["continuous"] = "continuous"
    """Tells it from a policy with a head of logits for each control."""
    format: Literal[1] = 1
    """Version of this record."""
    package_version: str
    """Version of llmserve_env that it was trained with."""
    task_id: str
    """Task that it was trained on."""
    features: list[str]
    """Names of the features that it reads, in order."""
    controls: dict[str, list[Any]]
    """Grid of the task, for each control that it sets: `BoxActions` maps the box to it."""
    hidden: int = Field(ge=1, le=4096)
    """Width of its layers."""
    training: dict[str, Any] = {}
    """How it was made: arguments, steps, wall time, scores."""


class ContinuousPolicy:
    """A network that maps observations to a move of every control, away from what is set.

    What is set is an entry of the box [-1, 1], the middle of the part that means it. Before the squash, a
    tanh, its place is multiplied by a learned number, one for each control and 1 at first, and the move is
    added: a policy that knows nothing yet leaves the configuration as it is, and one whose move does not
    reach another value of a control stays with it.

    Args:
        config: config of the network.
        weights: weights by name, as in the file.

    Raises:
        InputError: a weight is missing, superfluous or of another shape.
    """

    def __init__(self, config: ContinuousConfig, weights: Mapping[str, NDArray[np.float32]]) -> None:
        self.config = config
        self.weights = checked(weights, shapes(config))

    def scaled(self, observations: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32[n, features], in standard deviations."""
        w = self.weights
        scaled: NDArray[np.float32] = np.clip((observations - w["mean"]) / w["std"], -CLIP, CLIP)
        return scaled

    def box(self, scaled: NDArray[np.float32], current: NDArray[np.float32]) -> NDArray[np.float32]:
        """The mean action.

        Args:
            scaled: float32[n, features].
            current: float32[n, controls], what is set, in the box.

        Returns:
            float32[n, controls], in the box.
        """
        w = self.weights
        x = np.tanh(scaled @ w["first.weight"].T + w["first.bias"])
        x = np.tanh(x @ w["second.weight"].T + w["second.bias"])
        move = x @ w["move.weight"].T + w["move.bias"]
        box: NDArray[np.float32] = np.tanh(w["stay"] * np.arctanh(np.clip(current, -EDGE, EDGE)) + move)
        return box


class ContinuousPolicyAgent:
    """Plays a policy: in every window its mean action.

    As `PolicyAgent` it takes features and controls by name.

    Args:
        policy: policy to play.
        name: under which results are reported.
    """

    def __init__(self, policy: ContinuousPolicy, name: str = "policy") -> None:
        self.name = name
        self.policy = policy
        self._actions: BoxActions | None = None

    def reset(self, task: Task, seeds: Sequence[int]) -> None:
        """Begin episodes.

        Raises:
            InputError: the task's grid is another than the policy's, or it lacks a feature.
        """
        config = self.policy.config
        check_grid(config.task_id, config.controls, task)
        self._seen = Reader(config.features, feature_names(task))
        self._set = Setter(list(config.controls), task, len(seeds))
        self._actions = BoxActions(task.grid)
        self._box = self._actions.box(self._set.start)

    def act(self, observations: NDArray[np.float32], windows: NDArray[np.void]) -> NDArray[np.void]:
        """ACTION[n], as `LLMServeContinuous-v0` would set them.

        Raises:
            InputError: no episode has begun.
        """
        if self._actions is None:
            raise InputError("call reset before act")
        columns = self._set.columns
        scaled = self.policy.scaled(self._seen.of(observations))
        self._box[:, columns] = self.policy.box(scaled, np.take(self._box, columns, axis=1))
        records = self._set.kept(self._actions.records(self._box))
        self._box = self._actions.box(records)
        return records


def shapes(config: ContinuousConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every weight by its name."""
    features, width, controls = len(config.features), config.hidden, len(config.controls)
    return {
        "mean": (features,),
        "std": (features,),
        "first.weight": (width, features),
        "first.bias": (width,),
        "second.weight": (width, width),
        "second.bias": (width,),
        "move.weight": (controls, width),
        "move.bias": (controls,),
        "stay": (controls,),
    }


def is_continuous(folder: str | Path) -> bool:
    """Whether a folder's policy is one of the continuous form; False where none can be read."""
    try:
        return bool(json.loads(read_bytes(Path(folder) / CONFIG, SETTINGS_BYTES))["form"] == "continuous")
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def load_continuous_policy(folder: str | Path) -> ContinuousPolicy:
    """Read a policy.

    Raises:
        InputError: a file is missing, damaged or does not fit the other or this package; names it.
    """
    return read_policy(folder, ContinuousConfig, ContinuousPolicy)
