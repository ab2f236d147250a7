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


class BoxActions:
    """Actions as a box [-1, 1] float32[7], one entry for each control.

    -1 is a control's first value in the grid, 1 its last, and what lies outside is clipped:

    - batch_cap: on a log scale between them, rounded.
    - kv_budget_fraction: linear between them.
    - speculation_depth: every whole number between them has an equal part of [-1, 1].
    - quantization_tier, prefill_decode_split, priority_routing, admission_rate: every value of the grid has
      an equal part; with two values the second begins at 0.

    A control that the grid leaves at one value is not the agent's: its entry is ignored.

    Args:
        grid: first and last value of each control.
    """

    def __init__(self, grid: ActionGrid) -> None:
        self._codes = {name: np.unique(grid.all()[name]) for name in CONTROLS}

    def records(self, box: Any) -> NDArray[np.void]:
        """ACTION[n] of float[n, 7].

        Raises:
            InputError: of another shape, or an entry is not a number.
        """
        box = np.asarray(box, np.float64)
        if box.ndim != 2 or box.shape[1] != len(CONTROLS) or np.isnan(box).any():
            raise InputError(
                f"expected {len(CONTROLS)} numbers in [-1, 1], found {box.tolist()}", field="action"
            )
        shares = (np.clip(box, -1.0, 1.0) + 1.0) / 2.0
        actions = np.empty(len(box), ACTION)
        for column, (name, codes) in enumerate(self._codes.items()):
            share, low, high = shares[:, column], codes[0], codes[-1]
            if name == "batch_cap":
                actions[name] = np.rint(low * (high / low) ** share)
            elif name == "kv_budget_fraction":
                actions[name] = np.minimum(low + share * (high - low), high)
            elif name == "speculation_depth":
                actions[name] = low + _part(share, int(high - low) + 1)
            else:
                actions[name] = codes[_part(share, len(codes))]
        return actions

    def box(self, actions: NDArray[np.void]) -> NDArray[np.float32]:
        """float32[n, 7] of ACTION[n]: for each value the middle of the part that means it."""
        box = np.zeros((len(actions), len(CONTROLS)), np.float32)
        for column, (name, codes) in enumerate(self._codes.items()):
            values, low, high = actions[name].astype(np.float64), codes[0], codes[-1]
            if low == high:
                continue
            if name == "batch_cap":
                share = np.log(values / low) / np.log(high / low)
            elif name == "kv_budget_fraction":
                share = (values - low) / (high - low)
            elif name == "speculation_depth":
                share = (values - low + 0.5) / (high - low + 1)
            else:
                share = (np.searchsorted(codes, values) + 0.5) / len(codes)
            box[:, column] = np.clip(2.0 * share - 1.0, -1.0, 1.0)
        return box


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


def _part(share: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """int64[n], in which of `count` equal parts of [0, 1] each share lies."""
    return np.minimum((share * count).astype(np.int64), count - 1)
