"""The loop in which an agent plays episodes, wherever they are served."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from llmserve_env.episode import EpisodeBatch, StepResult
from llmserve_env.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmserve_env.agents.agent import Agent
    from llmserve_env.tasks import Task


class Episodes(Protocol):
    """What agents play: an `EpisodeBatch`, or episodes on a server; attributes and methods as there."""

    task: Task

    @property
    def over(self) -> NDArray[np.bool_]:
        """bool[n], episodes that have ended."""
        ...

    @property
    def windows(self) -> NDArray[np.void]:
        """WINDOW[n], records of the last window."""
        ...

    @property
    def observed(self) -> NDArray[np.float32]:
        """float32[n, features], what the agents see now."""
        ...

    def reset(self, seeds: Sequence[int]) -> NDArray[np.float32]:
        """Begin all episodes."""
        ...

    def step(self, actions: NDArray[np.void], which: NDArray[np.bool_] | None = None) -> StepResult:
        """Serve one window of each episode."""
        ...


B = TypeVar("B", bound=Episodes)

Watch = Callable[[Any, StepResult], object]
"""Called with the episodes and what they gave back after every window."""


@dataclass(frozen=True)
class Played:
    """What n episodes came to.

    Attributes:
        scores: float64[n], their grades.
        components: float64[n, 5], parts of the score (rewards.COMPONENTS).
        requests: int64[n, 4]: arrived, completed, within the SLO, failed.
    """

    scores: NDArray[np.float64]
    components: NDArray[np.float64]
    requests: NDArray[np.int64]

    @classmethod
    def of(cls, batches: Sequence[EpisodeBatch]) -> Played:
        """What batches came to, in their order."""
        return cls(
            np.concatenate([batch.scores for batch in batches]),
            np.concatenate([batch.totals for batch in batches]),
            np.concatenate([batch.requests for batch in batches]),
        )


def play(
    agent: Agent,
    task: Task,
    seeds: Sequence[int],
    *,
    size: int = 64,
    threads: int | None = 1,
    watch: Watch | None = None,
) -> Played:
    """Play a simulated episode for each seed, to its end.

    The result does not depend on `size` or `threads`.

    Args:
        agent: the agent that plays.
        task: the task that is played.
        seeds: n of them.
        size: episodes side by side.
        threads: threads that serve them (None: one for each core).
        watch: see `Watch`.

    Raises:
        InputError: there are no seeds.
    """
    if not len(seeds):
        raise InputError("expected one or more, found none", field="seeds")
    return Played.of(
        [
            play_batch(agent, EpisodeBatch(task, len(part), threads=threads), part, watch)
            for part in (seeds[low : low + size] for low in range(0, len(seeds), size))
        ]
    )


def play_batch(agent: Agent, batch: B, seeds: Sequence[int], watch: Watch | None = None) -> B:
    """Play episodes side by side to their ends; the batch, with what they came to.

    Args:
        agent: the agent that plays.
        batch: as many episodes as there are seeds.
        seeds: seeds of the episodes.
        watch: see `Watch`.
    """
    batch.reset(seeds)
    for actions in turns(agent, batch, seeds):
        result = batch.step(actions, ~batch.over if batch.over.any() else None)
        if watch is not None:
            watch(batch, result)
    return batch


def turns(agent: Agent, batch: Episodes, seeds: Sequence[int]) -> Iterator[NDArray[np.void]]:
    """What an agent sets, window by window, until all episodes are over: whoever takes it serves it.

    Args:
        agent: the agent that decides.
        batch: episodes that have begun, and may be under way.
        seeds: seeds of the episodes.

    Yields:
        ACTION[n], to be served before the next is taken.
    """
    agent.reset(batch.task, seeds)
    while not batch.over.all():
        yield agent.act(batch.observed, batch.windows)
