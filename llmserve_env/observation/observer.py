"""Observations as vectors: float32 in [0, 1], every feature with a fixed scaling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmserve_env.backend import FIGURES, WINDOW
from llmserve_env.compiled import entry
from llmserve_env.controls import ACTION
from llmserve_env.errors import InputError
from llmserve_env.observation.features import TENANT_SLOTS, Feature, features

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmserve_env.tasks import Task

_PROGRESS = -1
"""Place of the share of the episode that is over, which no record holds."""

_WINDOW, _ACTION = 0, 2
"""Records in which a place can lie; 1 more where the word is a float64 and no int64."""

_ROWS = 64
"""Episodes whose features are computed together: their records stay in the cache meanwhile."""


class Observer:
    """Turns records into observations of a task.

    Beside the records a feature can read what the task says: `progress`, and of the tenant in its slot
    `weight` (of the heaviest tenant's), `ttft_slo_s` and `tpot_slo_s`.

    Args:
        task: the task: size of the cell, tenants, length of an episode, groups of features.

    Attributes:
        features: entries of the observation, in order.
    """

    def __init__(self, task: Task) -> None:
        self.features = features(task.groups)
        self._windows = task.windows
        engines, tenants = task.cell.engines, task.tenants[:TENANT_SLOTS]
        heaviest = max(tenant.weight for tenant in task.tenants)
        columns, places, numbers = [], [], []
        for column, feature in enumerate(self.features):
            tenant = None
            if feature.slot is not None:
                if feature.slot >= len(tenants):
                    continue
                tenant = tenants[feature.slot]
            constant, divisor = 0.0, feature.top
            if feature.source == "task" and tenant is not None:
                says = {"weight": tenant.weight / heaviest}
                says |= {name: getattr(tenant, name) for name in ("ttft_slo_s", "tpot_slo_s")}
                constant = sum(says[name] for name in feature.reads)
            if feature.per == "engine":
                divisor *= engines
            elif feature.per == "ttft_slo" and tenant is not None:
                divisor *= tenant.ttft_slo_s
            columns.append(column)
            places += [_places(feature, names, len(task.tenants)) for names in (feature.reads, feature.whole)]
            numbers.append(
                (
                    constant,
                    feature.without,
                    divisor,
                    1.0 / (task.window_s * engines) if feature.per == "engine_s" else 1.0,
                    -1.0 if feature.code is None else feature.code,
                    feature.half or 0.0,
                )
            )
        # One list of places; in it begin, feature by feature, those of its sum and those of its whole.
        bounds = np.cumsum([0, *map(len, places)])
        listed = np.array([place for each in places for place in each], np.int64)
        self._table = (np.array(columns), listed, bounds, np.array(numbers))

    def of(
        self, windows: NDArray[np.void], actions: NDArray[np.void], steps: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """float32[n, features] from WINDOW[n], the ACTION[n] in force and the windows served, int64[n]."""
        observations = np.zeros((len(windows), len(self.features)), np.float32)
        # Every field of both records has 8 bytes: they are read as words, one record after the other.
        words, set_words = windows.view(np.int64), actions.view(np.int64)
        _fill(words, set_words, steps / self._windows, *self._table, np.empty((2, _ROWS)), observations)
        return observations


class Reader:
    """Picks features by name out of observations.

    Args:
        wanted: names of the features, in order.
        names: names of the observation's entries, in order.

    Raises:
        InputError: the observation lacks a feature; names it.
    """

    def __init__(self, wanted: Sequence[str], names: Sequence[str]) -> None:
        missing = [name for name in wanted if name not in names]
        if missing:
            raise InputError(f"this task does not show {', '.join(missing[:5])}", field="features")
        self._columns = None if list(wanted) == list(names) else [names.index(name) for name in wanted]

    def of(self, observations: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32[n, wanted] of float32[n, features]."""
        return observations if self._columns is None else np.take(observations, self._columns, axis=1)


def _places(feature: Feature, names: Sequence[str], tenants: int) -> list[int]:
    """Where the words lie whose sum a feature needs: four times the word's place, and how it is read."""
    if feature.source == "task":
        return [_PROGRESS] if "progress" in names else []
    record, source = (WINDOW, _WINDOW) if feature.source == "window" else (ACTION, _ACTION)
    index = feature.index if feature.slot is None else feature.slot
    places: list[int] = []
    assert record.fields is not None
    for name in names:
        field, offset = record.fields[name][:2]
        words = np.arange(field.itemsize // 8).reshape(field.shape)
        if feature.source == "window" and "tenant" in FIGURES[name].axes:
            words = words[..., :tenants]
        chosen = words if index is None else words[index]
        kind = source + (field.base == np.float64)
        places += (4 * (offset // 8 + chosen.ravel()) + kind).tolist()
    return places


@entry("a few seconds")
def _fill(digest: int) -> Callable[..., None]:
    """Compiled `Observer.of`; sums, float64[2, _ROWS], is room for what features read."""

    def _fill(  # type: ignore[no-untyped-def]  # noqa: PLR0912, PLR0917
        words, set_words, progress, columns, places, bounds, numbers, sums, observations
    ):
        digest  # noqa: B018 - a part of the cache's key
        episodes = len(observations)
        size, set_size = len(words) // max(episodes, 1), len(set_words) // max(episodes, 1)
        floats, set_floats = words.view(np.float64), set_words.view(np.float64)
        parts, wholes = sums[0], sums[1]
        for first in range(0, episodes, _ROWS):
            count = min(_ROWS, episodes - first)
            # Column by column: which way a branch goes then depends on the feature alone.
            for k in range(len(columns)):
                constant, without, divisor, factor, code, half = numbers[k]
                middle, last = bounds[2 * k + 1], bounds[2 * k + 2]
                for i in range(count):
                    parts[i] = constant
                if middle < last:
                    for i in range(count):
                        wholes[i] = 0.0
                for m in range(bounds[2 * k], last):
                    record, word = places[m] & 3, places[m] >> 2
                    total = parts if m < middle else wholes
                    if places[m] < 0:
                        for i in range(count):
                            total[i] += progress[first + i]
                    elif record == 0:
                        for i in range(count):
                            total[i] += words[(first + i) * size + word]
                    elif record == 1:
                        for i in range(count):
                            total[i] += floats[(first + i) * size + word]
                    elif record == 2:
                        for i in range(count):
                            total[i] += set_words[(first + i) * set_size + word]
                    else:
                        for i in range(count):
                            total[i] += set_floats[(first + i) * set_size + word]
                if middle < last:
                    for i in range(count):
                        parts[i] = parts[i] / wholes[i] if wholes[i] > 0.0 else without
                if code >= 0.0:
                    for i in range(count):
                        parts[i] = 1.0 if parts[i] == code else 0.0
                for i in range(count):
                    value = parts[i] / divisor * factor
                    value = value if value > 0.0 else 0.0  # nan, too
                    if half > 0.0:
                        value = value / (value + half) if value < np.inf else 1.0
                    observations[first + i, columns[k]] = min(value, 1.0)

    return _fill
