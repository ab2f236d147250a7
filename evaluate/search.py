"""Search over constant actions and over plans for a known episode, both by playing episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmserve_env.episode import EpisodeBatch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmserve_env.tasks import Task

Progress = Callable[[int], object]
"""Called with the number of episodes that were played."""


def _ignore(episodes: int) -> None:
    """No progress is shown."""


class Player:
    """Plays many plans on episodes of a task.

    Args:
        task: what is played.
        size: episodes side by side.
        parallel: spread them over threads.
        progress: called after each batch.
    """

    def __init__(
        self, task: Task, size: int = 256, *, parallel: bool = False, progress: Progress = _ignore
    ) -> None:
        self.task = task
        self._size = size
        self._parallel = parallel
        self._batch = EpisodeBatch(task, size, parallel=parallel)
        self._progress = progress

    def play(self, seeds: Sequence[int], plans: NDArray[np.int64]) -> NDArray[np.float64]:
        """Scores of plans: float64[n], from n seeds and grid indices int64[n, windows, 6] (or [n, 1, 6])."""
        size, scores = self._batch.num_episodes, np.empty(len(plans))
        for low in range(0, len(plans), size):
            count = min(size, len(plans) - low)
            part = np.resize(np.arange(low, low + count), size)
            self._batch.reset([seeds[i] for i in part])
            fixed = plans.shape[1] == 1
            actions = self.task.grid.actions(plans[part, 0])
            while not self._batch.over.all():
                step = int(self._batch.steps.max())
                if not fixed:
                    actions = self.task.grid.actions(plans[part, step])
                self._batch.step(actions, None if not self._batch.over.any() else ~self._batch.over)
            scores[low : low + count] = self._batch.scores[:count]
            self._progress(count)
        return scores


def best_constant(
    player: Player, seeds: Sequence[int], *, few: int = 3, keep: int = 64
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The constant action with the best mean score over seeds, of all on the task's grid.

    All are played on the first `few` seeds, the best `keep` on all.

    Returns:
        int64[k, 6], the grid indices of those played on all seeds, best first; float64[k], their mean scores.
    """
    everything = np.indices(tuple(player.task.grid.nvec.tolist())).reshape(6, -1).T
    mean = _means(player, seeds[:few], everything)
    chosen = everything[np.argsort(-mean, kind="stable")[:keep]]
    mean = _means(player, seeds, chosen)
    order = np.argsort(-mean, kind="stable")
    return chosen[order], mean[order]


def _means(player: Player, seeds: Sequence[int], indices: NDArray[np.int64]) -> NDArray[np.float64]:
    every = [seed for seed in seeds for _ in indices]
    scores = player.play(every, np.tile(indices, (len(seeds), 1))[:, None])
    mean: NDArray[np.float64] = scores.reshape(len(seeds), -1).mean(axis=0)
    return mean


def clairvoyant(
    player: Player,
    seed: int,
    starts: NDArray[np.int64],
    *,
    rounds: int = 40,
    children: int = 256,
    width: int = 24,
    fixed: Sequence[int] = (),
) -> tuple[NDArray[np.int64], float]:
    """A plan for an episode that is known beforehand, by stochastic beam search.

    The best `width` plans survive a round; in the next each child is one of them, half the time continued from a
    random window on by another, with one to three edits: a control takes another value over a stretch of windows.

    Args:
        player: plays.
        seed: of the episode.
        starts: int64[k, windows or 1, 6], plans to start from.
        rounds: how often.
        children: plans played in a round.
        width: plans that survive.
        fixed: indices of controls that keep the value that they have in the first of `starts`.

    Returns:
        int64[windows, 6], the best plan found, and its score.
    """
    task = player.task
    rng = np.random.default_rng([seed, *fixed])
    windows, nvec = task.windows, task.grid.nvec
    plans = np.broadcast_to(starts, (len(starts), windows, 6)).copy()
    plans[:, :, list(fixed)] = starts[0, 0, list(fixed)]
    free = [control for control in range(6) if nvec[control] > 1 and control not in fixed]
    scores = player.play([seed] * len(plans), plans)
    for _ in range(rounds):
        order = np.argsort(-scores, kind="stable")[:width]
        plans, scores = plans[order], scores[order]
        born = plans[_ranked(rng, len(plans), children)].copy()
        other = plans[_ranked(rng, len(plans), children)]
        for child, mate in zip(born, other, strict=True):
            if rng.random() < 0.5:
                cut = int(rng.integers(windows))
                child[cut:] = mate[cut:]
            for _ in range(rng.integers(1, 4)):
                control = free[rng.integers(len(free))]
                first = int(rng.integers(windows))
                last = first + 1 + int(rng.exponential(windows / 8))
                if rng.random() < 0.2:
                    first = 0
                child[first:last, control] = rng.integers(nvec[control])
        played = player.play([seed] * children, born)
        plans, scores = np.concatenate([plans, born]), np.concatenate([scores, played])
    best = int(scores.argmax())
    return plans[best], float(scores[best])


def _ranked(rng: np.random.Generator, count: int, size: int) -> NDArray[np.int64]:
    """Indices 0..count-1, the first ones more often."""
    ranks: NDArray[np.int64] = np.minimum(rng.geometric(min(3 / count, 1.0), size) - 1, count - 1)
    return ranks
