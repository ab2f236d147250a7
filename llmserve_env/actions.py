"""Actions as arrays: many at once for the kernel, and as indices into the grid that agents choose from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmserve_env.errors import InputError
from llmserve_env.hardware.profile import TIERS
from llmserve_env.schema import ServeAction

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

ACTION = np.dtype(
    [
        ("batch_cap", np.int64),
        ("kv_budget_fraction", np.float64),
        ("speculation_depth", np.int64),
        ("quantization_tier", np.int64),  # index into hardware.profile.TIERS
        ("prefill_decode_split", np.int64),
        ("priority_routing", np.int64),
    ]
)
"""One ServeAction as a record."""

CONTROLS: tuple[str, ...] = ACTION.names or ()
"""Names of the controls, in the order of every array of actions."""


def to_array(actions: Sequence[ServeAction]) -> NDArray[np.void]:
    """ACTION[n] of n actions."""
    array = np.empty(len(actions), ACTION)
    for row, action in zip(array, actions, strict=True):
        for name in CONTROLS:
            value = getattr(action, name)
            row[name] = TIERS.index(value.value) if name == "quantization_tier" else value
    return array


def to_action(row: NDArray[np.void]) -> ServeAction:
    """The ServeAction of one ACTION record."""
    values = {name: row[name].item() for name in CONTROLS}
    return ServeAction(**{**values, "quantization_tier": TIERS[int(row["quantization_tier"])]})


class ActionGrid:
    """The values from which an agent chooses, control by control.

    Args:
        values: for each control, ascending values as a ServeAction takes them; a control with one value is
            not the agent's to set.

    Attributes:
        values: as given, in the order of CONTROLS.
        nvec: int64[6], number of values of each control.

    Raises:
        InputError: a control is missing or unknown, or a value is out of its range.
    """

    def __init__(self, values: Mapping[str, Sequence[Any]]) -> None:
        for name in (*values, *CONTROLS):
            if name not in CONTROLS or not values.get(name):
                raise InputError(f"expected values for each of {', '.join(CONTROLS)}", field=name)
        self.values = {name: tuple(values[name]) for name in CONTROLS}
        self._codes = [np.array([_code(name, value) for value in self.values[name]]) for name in CONTROLS]
        for name, codes in zip(CONTROLS, self._codes, strict=True):
            if (np.diff(codes) <= 0).any():
                raise InputError(f"expected ascending values, found {list(values[name])}", field=name)
        self.nvec = np.array([len(codes) for codes in self._codes], np.int64)
        self._all = np.empty(int(self.nvec.prod()), ACTION)
        everything = np.indices(tuple(self.nvec.tolist())).reshape(len(self.nvec), -1)
        for name, codes, index in zip(CONTROLS, self._codes, everything, strict=True):
            self._all[name] = codes[index]
        self._strides = np.append(np.cumprod(self.nvec[:0:-1])[::-1], 1)

    def actions(self, indices: NDArray[np.int64]) -> NDArray[np.void]:
        """ACTION[n] of int64[n, 6] indices."""
        actions: NDArray[np.void] = self._all[(np.asarray(indices) * self._strides).sum(axis=1)]
        return actions

    def indices(self, actions: NDArray[np.void]) -> NDArray[np.int64]:
        """int64[n, 6], for each action of ACTION[n] the nearest grid point (the lower of two as near)."""
        columns = [
            np.abs(actions[name][:, None] - codes).argmin(axis=1)
            for name, codes in zip(CONTROLS, self._codes, strict=True)
        ]
        return np.stack(columns, axis=1).astype(np.int64)

    def all(self) -> NDArray[np.void]:
        """ACTION[prod(nvec)], every combination; the last control changes fastest."""
        return self._all.copy()


def _code(name: str, value: Any) -> float:
    """A value as it stands in an ACTION record, checked against the schema."""
    try:
        checked = getattr(ServeAction(**{name: value}), name)
    except ValueError as error:
        raise InputError(f"not a value of ServeAction: {value!r}", field=name) from error
    return TIERS.index(checked.value) if name == "quantization_tier" else checked + 0
