"""Between the schema and Gymnasium's spaces: actions as indices, boxes and dictionaries, observations."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces

from llmserve_env.controls import ACTION, as_actions
from llmserve_env.errors import InputError
from llmserve_env.observation import TENANT_SLOTS, features
from llmserve_env.schema import ServeAction

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from numpy.typing import NDArray

    from llmserve_env.controls import ActionGrid
    from llmserve_env.tasks import Task


def parts(groups: Collection[str]) -> dict[str, slice]:
    """Where an observation's features of the cell, of what is set and of the tenants lie.

    Args:
        groups: those whose features are seen, as `Task.groups`.
    """
    found = features(groups)
    settings = sum(feature.source == "action" for feature in found)
    tenants = len(found) - sum(feature.slot is not None for feature in found)
    return {
        "cell": slice(0, tenants - settings),
        "settings": slice(tenants - settings, tenants),
        "tenants": slice(tenants, len(found)),
    }


def observation_space(groups: Collection[str]) -> spaces.Space[NDArray[np.float32]]:
    """Box [0, 1] float32[features]; `observation.features` says what each entry is.

    Args:
        groups: those whose features are seen, as `Task.groups`.
    """
    return spaces.Box(0.0, 1.0, (len(features(groups)),), np.float32)


def action_space(grid: ActionGrid) -> spaces.Space[NDArray[np.int64]]:
    """MultiDiscrete int64[controls]: for each control the index of a value of the grid."""
    return spaces.MultiDiscrete(grid.nvec)


def single_action(grid: ActionGrid, action: Any) -> NDArray[Any]:
    """What the step of one environment was given, as that of an episode takes it.

    Args:
        grid: the values from which indices choose.
        action: int[controls] indices into the grid, or an ACTION record with any values.

    Returns:
        int[1, controls], or ACTION[1].

    Raises:
        InputError: neither of the two.
    """
    action, controls = as_actions(action), len(grid.nvec)
    if action.dtype != ACTION and (action.dtype.kind not in "iu" or action.shape != (controls,)):
        raise InputError(
            f"expected {controls} whole numbers, found {action.dtype}{list(action.shape)}", field="action"
        )
    single: NDArray[Any] = action[None]
    return single


def box_space(grid: ActionGrid) -> spaces.Space[NDArray[np.float32]]:
    """Box [-1, 1] float32[controls]; `controls.BoxActions` says what each entry means."""
    return spaces.Box(-1.0, 1.0, (len(grid.nvec),), np.float32)


def action_dict_space(grid: ActionGrid) -> spaces.Dict:
    """For each control that is the agent's, by name, a Discrete index of a value of the grid."""
    return spaces.Dict({name: spaces.Discrete(len(grid.values[name])) for name in grid.granted})


def from_dict(grid: ActionGrid, action: Mapping[str, Any]) -> NDArray[np.int64]:
    """int64[controls], indices of a dictionary of them; all controls of `action_dict_space` must be there.

    Raises:
        InputError: a control is missing, or is not the agent's; a value is no index.
    """
    if not isinstance(action, Mapping):
        raise InputError(f"expected an index for each of {', '.join(grid.granted)}", field="action")
    for name in sorted(set(grid.granted) ^ set(action), key=str):
        raise InputError(f"expected {', '.join(grid.granted)}", field=f"action['{name}']")
    return np.array([_index(name, action[name]) if name in action else 0 for name in grid.values])


def observation_dict_space(task: Task) -> spaces.Dict:
    """The observation in parts: cell, settings, tenants float32[slot, feature], and action_mask int8."""
    shapes: dict[str, tuple[int, ...]] = {
        name: (part.stop - part.start,) for name, part in parts(task.groups).items()
    }
    shapes["tenants"] = (TENANT_SLOTS, shapes["tenants"][0] // TENANT_SLOTS)
    boxes: dict[str, spaces.Space[Any]] = {
        name: spaces.Box(0.0, 1.0, shape, np.float32) for name, shape in shapes.items()
    }
    return spaces.Dict({**boxes, "action_mask": spaces.MultiBinary(int(task.grid.nvec.sum()))})


def to_dict(
    places: Mapping[str, slice], observation: NDArray[np.float32], action_mask: NDArray[np.bool_]
) -> dict[str, NDArray[np.float32] | NDArray[np.int8]]:
    """An observation float32[features] and an action mask in the parts of `observation_dict_space`.

    Args:
        places: places of the parts, as `parts` tells them.
        observation: observation in one vector.
        action_mask: bool[values of all controls].
    """
    found: dict[str, Any] = {name: observation[part].copy() for name, part in places.items()}
    found["tenants"] = found["tenants"].reshape(TENANT_SLOTS, -1)
    return {**found, "action_mask": action_mask.astype(np.int8)}


def action_mask(
    grid: ActionGrid, not_applied: Callable[[ServeAction], Mapping[str, str]]
) -> NDArray[np.bool_]:
    """bool[sum(nvec)], the values of the grid that a cell can apply, control after control.

    Args:
        grid: the values.
        not_applied: the fields of an action that have no effect on the cell, with the reason.
    """
    masks = []
    for name, values in grid.values.items():
        mask = [name not in not_applied(ServeAction(**{name: value})) for value in values]
        masks += (
            mask if any(mask) else [True] * len(mask)
        )  # a choice is needed, even where none has an effect
    return np.array(masks)


def to_info(told: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of an episode, as an environment's info.

    A control that is not set is infinite, as in an ACTION record: libraries stack infos of many environments,
    which takes numbers of one type.

    Args:
        told: as `EpisodeBatch.info` has it, with None for a control that is not set.
    """
    action = {name: math.inf if value is None else value for name, value in told["action"].items()}
    return {**told, "action": action}


def _index(name: str, value: Any) -> int:
    """An entry of a dictionary of indices."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise InputError(f"expected a whole number, found {value!r}", field=f"action['{name}']") from error
