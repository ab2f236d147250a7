"""Between the schema and Gymnasium's spaces: actions as indices, boxes and dictionaries, observations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces

from llmserve_env.controls import ACTION, CONTROLS
from llmserve_env.errors import InputError
from llmserve_env.hardware.profile import TIERS
from llmserve_env.observation import FEATURES, TENANT_SLOTS
from llmserve_env.schema import ServeAction

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from llmserve_env.controls import ActionGrid

_SETTINGS = [i for i, feature in enumerate(FEATURES) if feature.name.startswith("set_")]
_TENANTS = [i for i, feature in enumerate(FEATURES) if feature.name.startswith("tenant_")]
PARTS: dict[str, slice] = {
    "cell": slice(0, _SETTINGS[0]),
    "settings": slice(_SETTINGS[0], _TENANTS[0]),
    "tenants": slice(_TENANTS[0], len(FEATURES)),
}
"""Where the observation's features of the cell, of what is set and of the tenants lie."""

_SCHEMA = ServeAction.model_json_schema()["properties"]
_FASTEST: float = _SCHEMA["admission_rate"]["anyOf"][0]["maximum"]
_RANGES = {name: (_SCHEMA[name].get("minimum", 0), _SCHEMA[name].get("maximum", 1)) for name in CONTROLS} | {
    "quantization_tier": (0, len(TIERS) - 1),
    "admission_rate": (np.nextafter(0.0, 1.0), _FASTEST),
}
"""Least and greatest code of each control."""


def observation_space() -> spaces.Space[NDArray[np.float32]]:
    """Box [0, 1] float32[features]; `observation.FEATURES` says what each entry is."""
    return spaces.Box(0.0, 1.0, (len(FEATURES),), np.float32)


def action_space(grid: ActionGrid) -> spaces.Space[NDArray[np.int64]]:
    """MultiDiscrete int64[7]: for each control the index of a value of the grid."""
    return spaces.MultiDiscrete(grid.nvec)


def to_records(grid: ActionGrid, actions: Any) -> NDArray[np.void]:
    """ACTION[n] of what a step was given.

    Args:
        grid: the values from which indices choose.
        actions: int[n, 7] indices into the grid, or ACTION[n] records with any values.

    Raises:
        InputError: neither of the two, or an index or a value out of its range.
    """
    actions = np.asarray(actions)
    if actions.dtype == ACTION:
        return _checked(actions)
    if actions.dtype.kind not in "iu" or actions.ndim != 2 or actions.shape[1] != len(CONTROLS):
        raise InputError(
            f"expected {len(CONTROLS)} whole numbers for each environment, "
            f"found {actions.dtype}{list(actions.shape)}",
            field="action",
        )
    # A negative number is a large one without its sign: one comparison instead of two.
    out = actions.astype(np.uint64) >= grid.nvec.astype(np.uint64)
    if out.any():
        row, column = np.argwhere(out)[0]
        raise InputError(
            f"expected 0..{grid.nvec[column] - 1}, found {actions[row, column]}",
            field=f"action[{column}] ({CONTROLS[column]})",
        )
    records: NDArray[np.void] = grid.actions(actions)
    return records


def box_space() -> spaces.Space[NDArray[np.float32]]:
    """Box [-1, 1] float32[7]; `controls.BoxActions` says what each entry means."""
    return spaces.Box(-1.0, 1.0, (len(CONTROLS),), np.float32)


def action_dict_space(grid: ActionGrid) -> spaces.Dict:
    """For each control that is the agent's, by name, a Discrete index of a value of the grid."""
    counts = dict(zip(CONTROLS, grid.nvec.tolist(), strict=True))
    return spaces.Dict({name: spaces.Discrete(count) for name, count in counts.items() if count > 1})


def from_dict(grid: ActionGrid, action: Mapping[str, Any]) -> NDArray[np.int64]:
    """int64[7], indices of a dictionary of them; all controls of `action_dict_space` must be there.

    Raises:
        InputError: a control is missing, or is not the agent's.
    """
    asked = {name for name, count in zip(CONTROLS, grid.nvec, strict=True) if count > 1}
    for name in sorted(asked ^ set(action)):
        raise InputError(
            f"expected {', '.join(n for n in CONTROLS if n in asked)}", field=f"action['{name}']"
        )
    return np.array([action.get(name, 0) for name in CONTROLS])


def observation_dict_space(grid: ActionGrid) -> spaces.Dict:
    """The observation in parts: cell, settings, tenants float32[slot, feature], and action_mask int8."""
    shapes: dict[str, tuple[int, ...]] = {name: (part.stop - part.start,) for name, part in PARTS.items()}
    shapes["tenants"] = (TENANT_SLOTS, shapes["tenants"][0] // TENANT_SLOTS)
    parts: dict[str, spaces.Space[Any]] = {
        name: spaces.Box(0.0, 1.0, shape, np.float32) for name, shape in shapes.items()
    }
    return spaces.Dict({**parts, "action_mask": spaces.MultiBinary(int(grid.nvec.sum()))})


def to_dict(
    observation: NDArray[np.float32], action_mask: NDArray[np.bool_]
) -> dict[str, NDArray[np.float32] | NDArray[np.int8]]:
    """An observation float32[features] and an action mask in the parts of `observation_dict_space`."""
    parts: dict[str, Any] = {name: observation[part].copy() for name, part in PARTS.items()}
    parts["tenants"] = parts["tenants"].reshape(TENANT_SLOTS, -1)
    return {**parts, "action_mask": action_mask.astype(np.int8)}


def action_mask(
    grid: ActionGrid, not_applied: Callable[[ServeAction], Mapping[str, str]]
) -> NDArray[np.bool_]:
    """bool[sum(nvec)], the values of the grid that a cell can apply, control after control.

    Args:
        grid: the values.
        not_applied: the fields of an action that have no effect on the cell, with the reason.
    """
    masks = []
    for name in CONTROLS:
        mask = [name not in not_applied(ServeAction(**{name: value})) for value in grid.values[name]]
        masks += (
            mask if any(mask) else [True] * len(mask)
        )  # a choice is needed, even where none has an effect
    return np.array(masks)


def _checked(records: NDArray[np.void]) -> NDArray[np.void]:
    """The ACTION records, if the kernel can take their values.

    Raises:
        InputError: a value is out of the schema's range.
    """
    for name, (low, high) in _RANGES.items():
        values = records[name]
        if name == "admission_rate":
            values = np.where(values == np.inf, high, values)  # everybody is let in
        if not ((values >= low) & (values <= high)).all():
            raise InputError(f"expected {low}..{high}, found {values.tolist()}", field=name)
    return records
