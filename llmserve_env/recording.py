"""What is kept of an episode that is played, for its log and its pictures."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from llmserve_env.backend import FIGURES, WINDOW, window_field
from llmserve_env.controls import ACTION, to_action
from llmserve_env.report.version import __version__
from llmserve_env.rewards import COMPONENTS
from llmserve_env.schema import EXTRA_GROUPS, EpisodeLog

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from llmserve_env.tasks import Task


def record_bytes(window: NDArray[np.void], task: Task) -> bytes:
    """The figures of a WINDOW record that a task has, as bytes, without places of tenants that it lacks."""
    return np.frombuffer(window.tobytes(), np.uint8)[_places(len(task.tenants), task.groups)].tobytes()


@cache
def _places(tenants: int, groups: frozenset[str]) -> NDArray[np.intp]:
    """Which bytes of a record those are: to collect them field by field takes ten times as long."""
    place = np.arange(WINDOW.itemsize, dtype=np.intp)
    places = []
    for name, (field, offset, *_) in (WINDOW.fields or {}).items():
        if FIGURES[name].group not in groups:
            continue
        bytes_ = place[offset : offset + field.itemsize].reshape(*field.shape, field.base.itemsize)
        if "tenant" in FIGURES[name].axes:
            bytes_ = bytes_[..., :tenants, :]
        places.append(bytes_.ravel())
    return np.concatenate(places)


def record_digests(windows: Iterable[NDArray[np.void]], task: Task) -> list[str]:
    """For each of an episode's WINDOW records in order, the hash of all up to it (hex).

    Args:
        windows: the records.
        task: what was played; figures of groups that it does not have are not hashed.
    """
    digest, digests = hashlib.sha256(), []
    for window in windows:
        digest.update(record_bytes(window, task))
        digests.append(digest.hexdigest())
    return digests


def record_values(window: NDArray[np.void], tenants: int) -> dict[str, Any]:
    """A WINDOW record for JSON: None for nan, tenant fields cut to the number of tenants."""
    return {name: _plain(window_field(window, name, tenants)) for name in WINDOW.names or ()}


def record_row(values: dict[str, Any]) -> NDArray[np.void]:
    """The WINDOW record of what `record_values` made, with zeros for extra groups that it did not have yet.

    Raises:
        ValueError, KeyError, TypeError: it is none.
    """
    row: NDArray[np.void] = np.zeros((), WINDOW)
    for name in WINDOW.names or ():
        if name not in values and FIGURES[name].group in EXTRA_GROUPS:
            continue
        value = values[name]
        if isinstance(value, list):
            found = np.array(value)
            row[name][tuple(slice(count) for count in found.shape)] = found
        else:
            row[name] = np.nan if value is None else value
    return row


def _plain(value: Any) -> Any:
    if value.ndim:
        return [None if isinstance(each, float) and np.isnan(each) else each for each in value.tolist()]
    return None if isinstance(value.item(), float) and np.isnan(value) else value.item()


class Recording:
    """The windows of an episode so far.

    Attributes:
        rewards: rewards of each window.
        terminated: whether the task ended the episode.
    """

    def __init__(self) -> None:
        self.rewards: list[float] = []
        self.terminated = False
        # As bytes: a copy of a record with many fields takes 12 us, its bytes 0.1 us.
        self._windows = bytearray()
        self._actions = bytearray()
        self._components = bytearray()

    def add(
        self,
        window: NDArray[np.void],
        action: NDArray[np.void],
        components: NDArray[np.float64],
        reward: NDArray[np.float64],
        terminated: NDArray[np.bool_],
    ) -> None:
        """Keep a window.

        Args:
            window: WINDOW[1].
            action: ACTION[1], under which it was served.
            components: float64[1, 5], parts of its reward.
            reward: float64[1].
            terminated: bool[1], whether the task ended the episode with it.
        """
        self._windows += window.tobytes()
        self._actions += action.tobytes()
        self._components += components.tobytes()
        self.rewards.append(reward.item())
        self.terminated = terminated.item()

    @property
    def windows(self) -> NDArray[np.void]:
        """WINDOW[k]."""
        return np.frombuffer(bytes(self._windows), WINDOW)

    @property
    def actions(self) -> NDArray[np.void]:
        """ACTION[k], what was set in each window."""
        return np.frombuffer(bytes(self._actions), ACTION)

    @property
    def components(self) -> NDArray[np.float64]:
        """float64[k, components], parts of each reward."""
        return np.frombuffer(bytes(self._components)).reshape(-1, len(COMPONENTS))

    def log(self, task: Task, seed: int, score: float, *, live: bool) -> EpisodeLog:
        """The log of the episode so far.

        Args:
            task: the task that is played.
            seed: seed of the episode.
            score: so far.
            live: whether no replay can tell its components, so that the log does.
        """
        parts = self.components.tolist() if live else []
        return EpisodeLog(
            package_version=__version__,
            task=task.model_dump(mode="json"),
            seed=seed,
            live=live,
            actions=[to_action(row) for row in self.actions],
            rewards=list(self.rewards),
            components=[dict(zip(COMPONENTS, row, strict=True)) for row in parts],
            digests=record_digests(self.windows, task),
            terminated=self.terminated,
            score=score,
        )
