"""Trained policies: a network's weights in a folder, played with NumPy alone.

A folder holds `policy.json` (what the network looks like and what it was trained on) and
`policy.safetensors` (its weights and the statistics that scale its observations).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmserve_env.controls import CONTROLS, to_array
from llmserve_env.errors import InputError, as_input_error
from llmserve_env.files import SETTINGS_BYTES, TABLE_BYTES, read_bytes, write_atomic
from llmserve_env.objectives import OBJECTIVES, Objectives
from llmserve_env.observation import FEATURES, Reader, feature_names

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Self

    from llmserve_env.tasks import Task

CONFIG, WEIGHTS = "policy.json", "policy.safetensors"
CLIP = 8.0
"""Bound of a scaled observation (standard deviations)."""
P = TypeVar("P")
C = TypeVar("C", bound="StoredConfig")


class StoredConfig(Protocol):
    """Record of a policy of any kind, a pydantic model."""

    @property
    def features(self) -> list[str]:
        """Names of the observation's entries, in order."""

    @property
    def controls(self) -> dict[str, list[Any]]:
        """Grid of the task, control by control."""

    @classmethod
    def model_validate_json(cls, json_data: bytes) -> Self:
        """The record that a file holds."""

    def model_dump_json(self, *, indent: int) -> str:
        """The record as a file holds it."""


class StoredPolicy(Protocol):
    """A policy of any kind, as it is written to a folder."""

    @property
    def config(self) -> StoredConfig:
        """What it is, beside its weights."""

    @property
    def weights(self) -> Mapping[str, NDArray[np.float32]]:
        """Weights by name."""


class PolicyConfig(BaseModel):
    """What a policy is, beside its weights."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    format: Literal[1] = 1
    """Version of this record."""
    package_version: str
    """Version of llmserve_env that it was trained with."""
    task_id: str
    """Task that it was trained on."""
    features: list[str]
    """Names of the features that it reads, in order."""
    controls: dict[str, list[Any]]
    """Grid of the task, for each control that it sets: a head each."""
    frames: int = Field(ge=1, le=64)
    """Observations that it sees at once, the last ones."""
    hidden: int = Field(ge=1, le=4096)
    """Width of its layers."""
    recurrent: bool
    """Whether its second layer is a GRU."""
    objectives: list[str] = []
    """Objectives (`llmserve_env.objectives`) whose weights it takes: the last entries of the observation."""
    training: dict[str, Any] = {}
    """How it was made: arguments, steps, wall time, scores."""


class Policy:
    """A network that maps observations to logits of every control's values.

    The first layer sees the last `frames` observations, scaled; the second is a GRU or a plain one. To the
    logit of the value that is set a learned number is added, one for each control: a policy that knows
    nothing yet leaves the configuration as it is rather than restart engines in every window.

    Args:
        config: config of the network.
        weights: weights by name, as in the file.

    Raises:
        InputError: a weight is missing, superfluous or of another shape.
    """

    def __init__(self, config: PolicyConfig, weights: Mapping[str, NDArray[np.float32]]) -> None:
        self.config = config
        self.weights = checked(weights, shapes(config))
        self._nvec = [len(values) for values in config.controls.values()]

    def scaled(self, observations: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32[n, features], in standard deviations."""
        w = self.weights
        scaled: NDArray[np.float32] = np.clip((observations - w["mean"]) / w["std"], -CLIP, CLIP)
        return scaled

    def memory(self, episodes: int) -> NDArray[np.float32]:
        """float32[n, hidden], the state of the GRU at an episode's beginning."""
        return np.zeros((episodes, self.config.hidden), np.float32)

    def logits(
        self, stacked: NDArray[np.float32], current: NDArray[np.int64], memory: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Logits of all values, and the GRU's next state.

        Args:
            stacked: float32[n, frames * features], scaled, the latest last.
            current: int64[n, controls], indices of the values that are set.
            memory: float32[n, hidden].

        Returns:
            float32[n, values of all controls], float32[n, hidden].
        """
        w = self.weights
        x = np.tanh(stacked @ w["first.weight"].T + w["first.bias"])
        if self.config.recurrent:
            x = memory = self._gru(x, memory)
        else:
            x = np.tanh(x @ w["second.weight"].T + w["second.bias"])
        logits = x @ w["heads.weight"].T + w["heads.bias"]
        first = 0
        for control, count in enumerate(self._nvec):
            logits[np.arange(len(x)), first + current[:, control]] += w["stay"][control]
            first += count
        return logits, memory

    def choose(self, logits: NDArray[np.float32]) -> NDArray[np.int64]:
        """int64[n, controls], the likeliest value of each control."""
        edges = np.cumsum(self._nvec)[:-1]
        return np.stack([part.argmax(axis=1) for part in np.split(logits, edges, axis=1)], axis=1)

    def _gru(self, x: NDArray[np.float32], memory: NDArray[np.float32]) -> NDArray[np.float32]:
        """As torch.nn.GRUCell."""
        w = self.weights
        given = np.split(x @ w["gru.weight_ih"].T + w["gru.bias_ih"], 3, axis=1)
        kept = np.split(memory @ w["gru.weight_hh"].T + w["gru.bias_hh"], 3, axis=1)
        reset, update = _sigmoid(given[0] + kept[0]), _sigmoid(given[1] + kept[1])
        new = np.tanh(given[2] + reset * kept[2])
        following: NDArray[np.float32] = (1 - update) * new + update * memory
        return following


class PolicyAgent:
    """Plays a policy: in every window the likeliest value of each control that it sets.

    It takes features and controls by name: other features are not read, other controls stay as the task
    starts.

    Args:
        policy: policy to play.
        name: under which results are reported.
        preference: weights of the policy's objectives, of which only the proportions count; for None those of
            the task that is played.

    Raises:
        InputError: the preference does not fit the policy, or is none.
    """

    def __init__(
        self, policy: Policy, name: str = "policy", preference: Sequence[float] | None = None
    ) -> None:
        self.name = name
        self.policy = policy
        self._preference = None if preference is None else _proportions(preference, policy.config.objectives)
        self._task: Task | None = None

    def reset(self, task: Task, seeds: Sequence[int]) -> None:
        """Begin episodes.

        Raises:
            InputError: the task's grid is another than the policy's, or it lacks a feature.
        """
        policy = self.policy
        check_grid(policy.config.task_id, policy.config.controls, task)
        self._seen = Reader(
            policy.config.features, feature_names(task) + weight_features(policy.config.objectives)
        )
        self._set = Setter(list(policy.config.controls), task, len(seeds))
        self._task = task
        self._weights = np.zeros(0, np.float32)
        if policy.config.objectives:
            own = dict(zip(OBJECTIVES, Objectives(task).weights, strict=True))
            self._weights = np.array([own[name] for name in policy.config.objectives], np.float32)
            if self._preference is not None:
                self._weights = self._preference
        self._stacked: NDArray[np.float32] | None = None
        self._memory = policy.memory(len(seeds))
        self._indices = task.grid.indices(self._set.start)
        self._current = np.take(self._indices, self._set.columns, axis=1)

    def act(self, observations: NDArray[np.float32], windows: NDArray[np.void]) -> NDArray[np.void]:
        """ACTION[n], points of the grid.

        Raises:
            InputError: no episode has begun.
        """
        if self._task is None:
            raise InputError("call reset before act")
        if len(self._weights):
            observations = with_weights(observations, np.tile(self._weights, (len(observations), 1)))
        scaled = self.policy.scaled(self._seen.of(observations))
        self._stacked = stack(self._stacked, scaled, self.policy.config.frames)
        logits, self._memory = self.policy.logits(self._stacked, self._current, self._memory)
        self._current = self.policy.choose(logits)
        self._indices[:, self._set.columns] = self._current
        return self._set.kept(self._task.grid.actions(self._indices))


class Setter:
    """Sets the controls that a policy knows and leaves the others as the task starts.

    Args:
        controls: names that it sets, in order.
        task: the task that is played.
        episodes: how many.

    Attributes:
        columns: their places among those of the task's grid.
        start: ACTION[n], what the task starts with.
    """

    def __init__(self, controls: Sequence[str], task: Task, episodes: int) -> None:
        self.columns = [list(task.grid.values).index(name) for name in controls]
        self.start = np.repeat(to_array([task.start]), episodes)
        self._others = [name for name in CONTROLS if name not in controls]

    def kept(self, actions: NDArray[np.void]) -> NDArray[np.void]:
        """ACTION[n] with the start's values of all other controls."""
        for name in self._others:
            actions[name] = self.start[name]
        return actions


def weight_features(objectives: Sequence[str]) -> list[str]:
    """Names of the entries of an observation that hold the weights of objectives."""
    return [f"weight_{name}" for name in objectives]


def with_weights(observations: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32[n, features + objectives] of float32[n, features] and float32[n, objectives]."""
    return np.concatenate([observations, weights], axis=1)


def stack(
    before: NDArray[np.float32] | None, latest: NDArray[np.float32], frames: int
) -> NDArray[np.float32]:
    """float32[n, frames * features], the last frames; before the first one, itself."""
    if before is None:
        return np.tile(latest, (1, frames))
    return np.concatenate([before[:, latest.shape[1] :], latest], axis=1)


def shapes(config: PolicyConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every weight by its name."""
    features, width = len(config.features), config.hidden
    values = sum(len(each) for each in config.controls.values())
    second: dict[str, tuple[int, ...]] = {"second.weight": (width, width), "second.bias": (width,)}
    if config.recurrent:
        second = {f"gru.weight_{gate}": (3 * width, width) for gate in ("ih", "hh")}
        second |= {f"gru.bias_{gate}": (3 * width,) for gate in ("ih", "hh")}
    return {
        "mean": (features,),
        "std": (features,),
        "first.weight": (width, config.frames * features),
        "first.bias": (width,),
        **second,
        "heads.weight": (values, width),
        "heads.bias": (values,),
        "stay": (len(config.controls),),
    }


def checked(
    weights: Mapping[str, NDArray[np.float32]], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, NDArray[np.float32]]:
    """The weights, if they are those of these shapes.

    Raises:
        InputError: a weight is missing, superfluous, of another shape or no finite numbers; names it.
    """
    for name in (*expected, *weights):
        found = weights[name].shape if name in weights else None
        if expected.get(name) != found:
            raise InputError(f"expected shape {expected.get(name)}, found {found}", field=name)
    kept = {name: np.asarray(weights[name], np.float32) for name in expected}
    for name, values in kept.items():
        if not np.isfinite(values).all():
            raise InputError("expected finite numbers", field=name)
    return kept


def check_grid(task_id: str, controls: Mapping[str, list[Any]], task: Task) -> None:
    """Refuse a task whose grid is another than that of the task on which a policy was trained.

    Raises:
        InputError: names the first control that differs.
    """
    found = {name: list(values) for name, values in task.grid.values.items()}
    for name, values in controls.items():
        if found.get(name) != values:
            raise InputError(
                f"expected a task with the values {values}, as '{task_id}', on which the "
                f"policy was trained; '{task.id}' has {found.get(name)}",
                field=f"controls.{name}",
            )


def save_policy(folder: str | Path, policy: StoredPolicy) -> None:
    """Write a policy's two files, each whole or not at all."""
    from safetensors.numpy import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / WEIGHTS, save({name: value.copy() for name, value in policy.weights.items()}))
    write_atomic(folder / CONFIG, policy.config.model_dump_json(indent=1) + "\n")


def load_policy(folder: str | Path) -> Policy:
    """Read a policy.

    Raises:
        InputError: a file is missing, damaged or does not fit the other or this package; names it.
    """
    return read_policy(folder, PolicyConfig, Policy)


def read_policy(folder: str | Path, kind: type[C], make: Callable[[C, dict[str, Any]], P]) -> P:
    """What `load_policy` does, for any kind of policy.

    Args:
        folder: with its two files.
        kind: kind of the config.
        make: the policy of a config and its weights.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    config_path, weights_path = Path(folder) / CONFIG, Path(folder) / WEIGHTS
    said, packed = read_bytes(config_path, SETTINGS_BYTES), read_bytes(weights_path, TABLE_BYTES)
    try:
        config = kind.model_validate_json(said)
        weights = load(packed)
    except ValidationError as error:
        raise as_input_error(error, str(config_path)) from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"damaged or no safetensors: {error}", file=str(weights_path)) from error
    objectives = getattr(config, "objectives", [])
    if not set(objectives) <= set(OBJECTIVES):
        raise InputError(
            f"expected some of {', '.join(OBJECTIVES)}, found {', '.join(objectives)}",
            file=str(config_path),
            field="objectives",
        )
    names = {feature.name for feature in FEATURES}.union(weight_features(objectives))
    for field, found, known in (
        ("features", config.features, names),
        ("controls", config.controls, set(CONTROLS)),
    ):
        unknown = [name for name in found if name not in known]
        if unknown or len(set(found)) != len(found):
            what = ", ".join(unknown[:5]) or "a name twice"
            raise InputError(
                f"this package knows no such {field}: {what}", file=str(config_path), field=field
            )
    try:
        return make(config, weights)
    except InputError as error:
        raise InputError(error.reason, file=str(weights_path), field=error.field) from error


def _proportions(preference: Sequence[float], objectives: Sequence[str]) -> NDArray[np.float32]:
    """float32[objectives], weights that sum to 1."""
    weights = np.asarray(preference, np.float64)
    if not objectives:
        raise InputError(
            "this policy takes none: it was trained on the task's own weights", field="preference"
        )
    if (
        weights.shape != (len(objectives),)
        or not np.isfinite(weights).all()
        or (weights < 0).any()
        or not weights.any()
    ):
        raise InputError(
            f"expected a weight, 0 or more, for each of {', '.join(objectives)}, not all 0; "
            f"found {preference}",
            field="preference",
        )
    proportions: NDArray[np.float32] = (weights / weights.sum()).astype(np.float32)
    return proportions


def _sigmoid(x: NDArray[np.float32]) -> NDArray[np.float32]:
    share: NDArray[np.float32] = np.float32(1) / (np.float32(1) + np.exp(-x))
    return share
