"""Controls, as the fields of ServeAction declare them: as records for the kernel, as indices, as a box."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from llmserve_env.errors import InputError
from llmserve_env.schema import EXTRA_GROUPS, GROUPS, Control, ServeAction, bounds

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pydantic.fields import FieldInfo

_UNSET = 1e6
"""Stands for None where values are compared: farther from every number than those from each other."""


@dataclass(frozen=True)
class ControlSpec:
    """A control with all that its field of ServeAction says.

    A code is a value as it stands in an ACTION record: of an enumeration its place in the order of its
    members, of a switch 0 or 1, inf for None.

    Attributes:
        name: name of the field.
        type: bool, int, float or an enumeration.
        optional: whether it may be None.
        default: value of `ServeAction()`.
        low: least code.
        high: greatest code but inf.
        meaning: docstring of the field, in one line.
        declared: label, scale and what else the field declares.
    """

    name: str
    type: type
    optional: bool
    default: Any
    low: float
    high: float
    meaning: str
    declared: Control

    @property
    def title(self) -> str:
        """Label and unit."""
        return f"{self.declared.label} ({self.declared.unit})" if self.declared.unit else self.declared.label

    @property
    def label_in_text(self) -> str:
        """Label within a sentence."""
        label = self.declared.label
        return label if label[:2].isupper() else label[0].lower() + label[1:]

    @cached_property
    def options(self) -> tuple[Any, ...]:
        """Values of a switch or an enumeration in the order of their codes; none of a number."""
        if self.type is bool:
            return (False, True)
        return tuple(member.value for member in self.type) if issubclass(self.type, Enum) else ()

    @property
    def range_text(self) -> str:
        """The values that it takes."""
        if self.options:
            return ", ".join(map(str, self.options))
        if self.optional:
            return f"..{self.high:g}, None"
        return f"{self.low}..{self.high}"

    def code(self, value: Any) -> float:
        """The code of a value of ServeAction."""
        if issubclass(self.type, Enum):
            return self.options.index(value.value)
        return math.inf if value is None else value + 0

    def value(self, code: float) -> Any:
        """The value of ServeAction of a code."""
        if self.options:
            return self.options[int(code)]
        return None if self.optional and code == math.inf else code

    def checked(self, value: Any) -> float:
        """The code of a value that may be none of ServeAction's.

        Raises:
            InputError: it is none.
        """
        try:
            return self.code(getattr(ServeAction(**{self.name: value}), self.name))
        except ValueError as error:
            raise InputError(f"not a value of ServeAction: {value!r}", field=self.name) from error

    def text(self, code: float) -> str:
        """A code as a picture's label has it."""
        if self.type is bool:
            return "on" if code else "off"
        if self.options:
            return str(self.options[int(code)])
        return "none" if code == math.inf else f"{code:g}"

    def nearest(self, code: float) -> float:
        """The code, or the end of the range that it lies beyond."""
        return min(max(code, self.low), self.high)


def _spec(name: str, field: FieldInfo) -> ControlSpec:
    (declared,) = (each for each in field.metadata if isinstance(each, Control))
    types = [each for each in (get_args(field.annotation) or (field.annotation,)) if each is not type(None)]
    assert len(types) == 1
    kind, low, high = types[0], 0.0, 1.0
    optional = type(None) in get_args(field.annotation)
    assert kind is float or not optional, f"{name}: None is inf in a record, so only a float may be None"
    if issubclass(kind, Enum):
        high = len(kind) - 1
    elif kind is not bool:
        limits = bounds(name)
        low = limits["ge"] if "ge" in limits else np.nextafter(float(limits["gt"]), math.inf)
        high = limits["le"]
    number = float if kind is float else int
    return ControlSpec(
        name,
        kind,
        optional,
        field.default,
        number(low),
        number(high),
        " ".join((field.description or "").split()),
        declared,
    )


SPECS: dict[str, ControlSpec] = {name: _spec(name, field) for name, field in ServeAction.model_fields.items()}
"""All controls by name, in the order of ServeAction."""

CONTROLS: tuple[str, ...] = tuple(SPECS)
"""Names of the controls, in the order of every array of actions."""

ACTION = np.dtype([(name, np.float64 if spec.type is float else np.int64) for name, spec in SPECS.items()])
"""One ServeAction as a record of codes."""


def to_array(actions: Sequence[ServeAction]) -> NDArray[np.void]:
    """ACTION[n] of n actions.

    Raises:
        InputError: one of them is none, or was made without being checked and holds what is no value.
    """
    array = np.empty(len(actions), ACTION)
    for row, action in zip(array, actions, strict=True):
        if not isinstance(action, ServeAction):
            raise InputError(f"expected a ServeAction, found {action!r:.99}", field="action")
        for name, spec in SPECS.items():
            value = getattr(action, name, None)
            try:
                row[name] = spec.code(value)
            except (AttributeError, OverflowError, TypeError, ValueError) as error:
                raise InputError(f"expected {spec.range_text}, found {value!r:.99}", field=name) from error
    return array


_OPTIONS = [(name, spec.options) for name, spec in SPECS.items()]


def to_action(row: NDArray[np.void]) -> ServeAction:
    """The ServeAction of one ACTION record."""
    return ServeAction(**{name: spec.value(row[name].item()) for name, spec in SPECS.items()})


def to_values(row: NDArray[np.void]) -> dict[str, Any]:
    """Values by name of one ACTION record."""
    # At once: field by field takes five times as long.
    return {
        name: options[int(code)] if options else None if code == math.inf else code
        for (name, options), code in zip(_OPTIONS, row.item(), strict=True)
    }


def _bits(records: NDArray[np.void]) -> NDArray[np.int64]:
    """int64[n, controls], the codes' bits: every field of ACTION has 8 bytes."""
    # From bytes, as a view or a copy of records takes several times as long.
    return np.ndarray((len(records), len(CONTROLS)), np.int64, records.tobytes())


def _code_bits(name: str, code: float) -> int:
    return int(np.array([code], ACTION[name]).view(np.int64)[0])


_LEAST = np.array([_code_bits(name, spec.low) for name, spec in SPECS.items()])
_MOST = np.array([_code_bits(name, spec.high) for name, spec in SPECS.items()])
_SPAN = (_MOST - _LEAST).astype(np.uint64)
_INF = np.array([_code_bits(name, math.inf if spec.optional else spec.low) for name, spec in SPECS.items()])


def as_actions(actions: Any) -> NDArray[Any]:
    """What a step was given as an array.

    Raises:
        InputError: its rows are of different lengths.
    """
    try:
        return np.asarray(actions)
    except ValueError as error:
        raise InputError(
            f"expected whole numbers, as many for each environment: {error}", field="action"
        ) from error


def check_records(records: NDArray[np.void]) -> NDArray[np.void]:
    """ACTION records, if every code is one.

    Raises:
        InputError: they are no such records; or names the control with a code out of its range.
    """
    if not isinstance(records, np.ndarray):
        raise InputError(f"expected ACTION records, found {records!r:.99}", field="action")
    if records.dtype != ACTION or records.ndim != 1:
        found = f"{records.dtype}{list(records.shape)}"
        raise InputError(f"expected ACTION records, found {found:.99}", field="action")
    bits = _bits(records)
    # The bits of floats from 0 up are in the order of the floats, so all controls are compared at once, and
    # what is less than the least is a large number without its sign.
    out = ((bits - _LEAST).view(np.uint64) > _SPAN) & (bits != _INF)
    if np.count_nonzero(out):
        row, place = np.argwhere(out)[0]
        name = CONTROLS[place]
        spec = SPECS[name]
        raise InputError(f"expected {spec.low}..{spec.high}, found {records[name][row]}", field=name)
    return records


class ActionGrid:
    """The values from which an agent chooses, control by control.

    A control of an extra group that is not the agent's to set has no place in it: indices are of the others,
    so that a new mechanism changes no space of those who do not use it.

    Args:
        values: for each control, ascending values as a ServeAction takes them, None last; a control with
            one value is not the agent's to set. One of an extra group may be left out: it keeps its default.

    Attributes:
        granted: names of the controls that are the agent's to set.
        groups: those of every task and of the controls that are the agent's.
        values: of the controls of these groups, in the order of CONTROLS.
        nvec: int64[controls], number of values of each.

    Raises:
        InputError: a control is missing or unknown, or a value is out of its range.
    """

    def __init__(self, values: Mapping[str, Sequence[Any]]) -> None:
        extra = [name for name, spec in SPECS.items() if spec.declared.group in EXTRA_GROUPS]
        values = {**{name: [SPECS[name].default] for name in extra}, **values}
        for name in (*values, *CONTROLS):
            if name not in SPECS or not values.get(name):
                raise InputError(f"expected values for each of {', '.join(CONTROLS)}", field=name)
        self.granted = tuple(name for name in CONTROLS if len(values[name]) > 1)
        self.groups = frozenset({*GROUPS, *(SPECS[name].declared.group for name in self.granted)})
        codes = {
            name: np.array([spec.checked(value) for value in values[name]], ACTION[name])
            for name, spec in SPECS.items()
        }
        for name, column in codes.items():
            if (column[1:] <= column[:-1]).any():
                raise InputError(f"expected ascending values, found {list(values[name])}", field=name)
        self._codes = {name: codes[name] for name in CONTROLS if SPECS[name].declared.group in self.groups}
        self.values = {name: tuple(values[name]) for name in self._codes}
        self.nvec = np.array([len(column) for column in self._codes.values()], np.int64)
        # The codes' bits, a row a control: a record is one gather, as every field of ACTION has 8 bytes.
        self._bits = np.zeros((len(self._codes), int(self.nvec.max())), np.int64)
        for row, column in zip(self._bits, self._codes.values(), strict=True):
            row[: len(column)] = column.view(np.int64)
        self._rows = np.arange(len(self._codes))
        self._places = [CONTROLS.index(name) for name in self._codes]
        self._first = np.array([column[:1].view(np.int64)[0] for column in codes.values()])
        self._free = np.array([name in self.granted for name in CONTROLS])

    @property
    def size(self) -> int:
        """Number of combinations."""
        return math.prod(self.nvec.tolist())

    def first(self, count: int) -> NDArray[np.void]:
        """ACTION[count], every control at its first value."""
        actions: NDArray[np.void] = np.tile(self._first, (count, 1)).view(ACTION)[:, 0]
        return actions

    def records(self, actions: NDArray[Any]) -> NDArray[np.void]:
        """ACTION[n] of what a step was given.

        Args:
            actions: int[n, controls] indices into the grid, or ACTION[n] records with any values.

        Raises:
            InputError: neither of the two, or an index or a value out of its range.
        """
        actions = as_actions(actions)
        if actions.dtype == ACTION:
            return check_records(actions)
        if actions.dtype.kind not in "iu" or actions.ndim != 2 or actions.shape[1] != len(self.nvec):
            raise InputError(
                f"expected {len(self.nvec)} whole numbers for each environment, "
                f"found {actions.dtype}{list(actions.shape)}",
                field="action",
            )
        # A negative number is a large one without its sign: one comparison instead of two.
        out = actions.astype(np.uint64) >= self.nvec.astype(np.uint64)
        if out.any():
            row, column = np.argwhere(out)[0]
            raise InputError(
                f"expected 0..{self.nvec[column] - 1}, found {actions[row, column]}",
                field=f"action[{column}] ({list(self.values)[column]})",
            )
        return self.actions(actions)

    def in_force(self, records: NDArray[np.void]) -> NDArray[np.void]:
        """ACTION[n], what comes into force of ACTION[n]: what is not the agent's to set keeps its value."""
        in_force: NDArray[np.void] = np.where(self._free, _bits(records), self._first).view(ACTION)[:, 0]
        return in_force

    def not_granted(self, action: NDArray[np.void]) -> dict[str, str]:
        """The controls that an ACTION sets and that are not the agent's, with the reason why they stay."""
        (row,) = self.in_force(action.reshape(1))
        return {
            name: f"not granted by the task: it stays {SPECS[name].value(row[name].item())}"
            for name in CONTROLS
            if action[name] != row[name]
        }

    def ends(self, name: str) -> tuple[float, float]:
        """The least and the greatest finite code of a control; inf twice where only None is granted.

        Numbers between them are as good as those of the grid.
        """
        codes = self._codes[name].astype(float)
        numbers = codes[np.isfinite(codes)]
        return (float(numbers[0]), float(numbers[-1])) if len(numbers) else (math.inf, math.inf)

    def codes(self, name: str) -> NDArray[Any]:
        """The codes of a control's values, ascending."""
        return self._codes[name].copy()

    def actions(self, indices: NDArray[np.int64]) -> NDArray[np.void]:
        """ACTION[n] of int64[n, controls] indices."""
        bits = self._bits[self._rows, np.asarray(indices)]
        if len(self._places) < len(CONTROLS):
            chosen, bits = bits, np.tile(self._first, (len(bits), 1))
            bits[:, self._places] = chosen
        actions: NDArray[np.void] = np.ascontiguousarray(bits).view(ACTION)[:, 0]
        return actions

    def indices(self, actions: NDArray[np.void]) -> NDArray[np.int64]:
        """int64[n, controls], for each of ACTION[n] the nearest grid point (the lower of two as near)."""
        columns = [
            np.abs(finite(actions[name])[:, None] - finite(codes)).argmin(axis=1)
            for name, codes in self._codes.items()
        ]
        return np.stack(columns, axis=1).astype(np.int64)

    def at(self, places: NDArray[np.int64] | Sequence[int]) -> NDArray[np.void]:
        """ACTION[n], combinations by their places among all; the last control changes fastest."""
        return self.actions(np.stack(np.unravel_index(np.asarray(places), self.nvec.tolist()), axis=1))

    def all(self) -> NDArray[np.void]:
        """ACTION[size], every combination; of a large grid draw some with `at` instead."""
        return self.at(np.arange(self.size))


class BoxActions:
    """Actions as a box [-1, 1] float32[controls], one entry for each control.

    -1 is a control's first value in the grid, 1 its last, and what lies outside is clipped. Between them a
    number lies by its scale, logarithmic or linear; every whole number on the scale "whole", every value of
    the grid on the scale "choice" or of a control that may be None has an equal part of [-1, 1] (of two
    values the second begins at 0).

    A control that the grid leaves at one value is not the agent's: its entry is ignored.

    Args:
        grid: first and last value of each control.
    """

    def __init__(self, grid: ActionGrid) -> None:
        self._grid = grid
        self._columns = [
            (name, "choice" if SPECS[name].optional else SPECS[name].declared.scale, grid.codes(name))
            for name in grid.values
        ]

    def records(self, box: Any) -> NDArray[np.void]:
        """ACTION[n] of float[n, controls].

        Raises:
            InputError: of another shape, or an entry is not a number.
        """
        columns = len(self._columns)
        try:
            box = np.asarray(box)
            number = np.can_cast(box.dtype, np.float64)
        except ValueError as error:
            raise InputError(f"expected {columns} numbers in [-1, 1]: {error}", field="action") from error
        if not number or box.ndim != 2 or box.shape[1] != columns:
            raise InputError(
                f"expected {columns} numbers in [-1, 1] for each environment, "
                f"found {box.dtype}{list(box.shape)}",
                field="action",
            )
        box = box.astype(np.float64)
        if np.isnan(box).any():
            column = np.argwhere(np.isnan(box))[0, 1]
            raise InputError(
                "expected a number in [-1, 1], found nan",
                field=f"action[{column}] ({self._columns[column][0]})",
            )
        shares = (np.clip(box, -1.0, 1.0) + 1.0) / 2.0
        actions = self._grid.first(len(box))
        for (name, scale, codes), share in zip(self._columns, shares.T, strict=True):
            low, high = codes[0], codes[-1]
            if scale == "choice":
                actions[name] = codes[_part(share, len(codes))]
            elif scale == "whole":
                actions[name] = low + _part(share, int(high - low) + 1)
            else:
                number = low * (high / low) ** share if scale == "log" else low + share * (high - low)
                whole = np.issubdtype(codes.dtype, np.integer)
                actions[name] = np.rint(number) if whole else np.minimum(number, high)
        return actions

    def box(self, actions: NDArray[np.void]) -> NDArray[np.float32]:
        """float32[n, controls] of ACTION[n]: for each value the middle of the part that means it."""
        box = np.zeros((len(actions), len(self._columns)), np.float32)
        for column, (name, scale, codes) in enumerate(self._columns):
            values, low, high = actions[name].astype(np.float64), codes[0], codes[-1]
            if low == high:
                continue
            if scale == "log":
                share = np.log(values / low) / np.log(high / low)
            elif scale == "linear":
                share = (values - low) / (high - low)
            elif scale == "whole":
                share = (values - low + 0.5) / (high - low + 1)
            else:
                share = (np.searchsorted(codes, values) + 0.5) / len(codes)
            box[:, column] = np.clip(2.0 * share - 1.0, -1.0, 1.0)
        return box


def finite(codes: NDArray[Any]) -> NDArray[Any]:
    """Codes with a number for inf."""
    clipped: NDArray[Any] = np.minimum(codes, _UNSET)
    return clipped


def _part(share: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """int64[n], in which of `count` equal parts of [0, 1] each share lies."""
    return np.minimum((share * count).astype(np.int64), count - 1)


def within_action(sequences: int) -> tuple[int, int | None]:
    """A batch cap that an action may have, and `max_num_seqs` where an engine runs more sequences than it."""
    most = int(SPECS["batch_cap"].high)
    return (sequences, None) if sequences <= most else (most, sequences)
