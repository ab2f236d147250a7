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
        ("admission_rate", np.float64),  # inf for none
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
            row[name] = _code(name, getattr(action, name))
    return array


def to_action(row: NDArray[np.void]) -> ServeAction:
    """The ServeAction of one ACTION record."""
    return ServeAction(**{name: to_value(name, row[name].item()) for name in CONTROLS})


def to_value(name: str, code: Any) -> Any:
    """The value of a control in ServeAction, from its code in an ACTION record."""
    if name == "quantization_tier":
        return TIERS[int(code)]
    if name == "admission_rate":
        return None if code == np.inf else code
    return bool(code) if name in ("prefill_decode_split", "priority_routing") else code


class ActionGrid:
    """The values from which an agent chooses, control by control.

    Args:
        values: for each control, ascending values as a ServeAction takes them, an admission rate of None
            last; a control with one value is not the agent's to set.

    Attributes:
        values: as given, in the order of CONTROLS.
        nvec: int64[7], number of values of each control.

    Raises:
        InputError: a control is missing or unknown, or a value is out of its range.
    """

    def __init__(self, values: Mapping[str, Sequence[Any]]) -> None:
        for name in (*values, *CONTROLS):
            if name not in CONTROLS or not values.get(name):
                raise InputError(f"expected values for each of {', '.join(CONTROLS)}", field=name)
        self.values = {name: tuple(values[name]) for name in CONTROLS}
        self._codes = [np.array([_checked(name, value) for value in self.values[name]]) for name in CONTROLS]
        for name, codes in zip(CONTROLS, self._codes, strict=True):
            if (codes[1:] <= codes[:-1]).any():
                raise InputError(f"expected ascending values, found {list(values[name])}", field=name)
        self.nvec = np.array([len(codes) for codes in self._codes], np.int64)
        self._all = np.empty(int(self.nvec.prod()), ACTION)
        everything = np.indices(tuple(self.nvec.tolist())).reshape(len(self.nvec), -1)
        for name, codes, index in zip(CONTROLS, self._codes, everything, strict=True):
            self._all[name] = codes[index]
        self._strides = np.append(np.cumprod(self.nvec[:0:-1])[::-1], 1)

    def actions(self, indices: NDArray[np.int64]) -> NDArray[np.void]:
        """ACTION[n] of int64[n, 7] indices."""
        actions: NDArray[np.void] = self._all[(np.asarray(indices) * self._strides).sum(axis=1)]
        return actions

    def indices(self, actions: NDArray[np.void]) -> NDArray[np.int64]:
        """int64[n, 7], for each action of ACTION[n] the nearest grid point (the lower of two as near)."""
        columns = [
            np.abs(finite(actions[name])[:, None] - finite(codes)).argmin(axis=1)
            for name, codes in zip(CONTROLS, self._codes, strict=True)
        ]
        return np.stack(columns, axis=1).astype(np.int64)

    def all(self) -> NDArray[np.void]:
        """ACTION[prod(nvec)], every combination; the last control changes fastest."""
        return self._all.copy()


def _code(name: str, value: Any) -> float:
    """A value of a ServeAction as it stands in an ACTION record."""
    if name == "quantization_tier":
        return TIERS.index(value.value)
    return np.inf if value is None else value + 0


def _checked(name: str, value: Any) -> float:
    """The code of a value, checked against the schema."""
    try:
        return _code(name, getattr(ServeAction(**{name: value}), name))
    except ValueError as error:
        raise InputError(f"not a value of ServeAction: {value!r}", field=name) from error


def finite(codes: NDArray[Any]) -> NDArray[Any]:
    """Codes with a number for inf, farther from every rate than the rates are from each other."""
    clipped: NDArray[Any] = np.minimum(codes, 1e6)
    return clipped
