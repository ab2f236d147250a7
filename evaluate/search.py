"""Search over constant actions and over plans for a known episode, both by playing episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmserve_env.controls import ACTION, CONTROLS, SPECS
from llmserve_env.episode import EpisodeBatch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmserve_env.tasks import Task

Progress = Callable[[int], object]
"""Called with the number of episodes that were played."""


MOST_POINTS = 1 << 16
"""Points of a grid that are all tried."""


def _ignore(episodes: int) -> None:
    """Show no progress."""


class PlanPlayer:
    """Plays plans on episodes of a task, many at once.

    Args:
        task: what is played.
        size: episodes side by side.
        progress: called after each batch.
    """

    def __init__(self, task: Task, size: int = 32, *, progress: Progress = _ignore) -> None:
        self.task = task
        self._batch = EpisodeBatch(task, size)
        self._progress = progress
        self.episodes = 0

    def play(self, seeds: Sequence[int], plans: NDArray[np.void]) -> NDArray[np.float64]:
        """Scores of plans: float64[n], from n seeds and ACTION[n, windows] (or [n, 1] for constants)."""
        scores: NDArray[np.float64] = self.rewards(seeds, plans).mean(axis=1)
        return scores

    def rewards(self, seeds: Sequence[int], plans: NDArray[np.void]) -> NDArray[np.float64]:
        """As `play`, but the reward of each window: float64[n, windows]."""
        batch = self._batch
        rewards = np.zeros((len(plans), self.task.windows))
        for low in range(0, len(plans), batch.num_episodes):
            count = min(batch.num_episodes, len(plans) - low)
            played = np.arange(batch.num_episodes) < count
            rows = np.minimum(np.arange(low, low + batch.num_episodes), len(plans) - 1)
            batch.reset([seeds[i] for i in rows])
            for window in range(self.task.windows):
                going = played & ~batch.over
                result = batch.step(plans[rows, min(window, plans.shape[1] - 1)], going)
                rewards[low : low + count, window] = result.rewards[:count]
            self.episodes += count
            self._progress(count)
        return rewards


def candidates(task: Task, at_least: int, seed: int) -> NDArray[np.void]:
    """ACTION[n]: the task's whole grid and, up to `at_least` in all, random actions between its ends.

    Of a grid of more than `MOST_POINTS` as many random points stand for the whole.
    """
    grid, rng = task.grid, np.random.default_rng(seed)
    if grid.size > MOST_POINTS:
        return grid.actions(rng.integers(grid.nvec, size=(MOST_POINTS, len(grid.nvec))))
    extra = max(at_least - grid.size, 0)
    drawn = grid.actions(rng.integers(grid.nvec, size=(extra, len(grid.nvec))))
    for name in grid.values:
        spec = SPECS[name]
        if spec.declared.scale == "log" and spec.type is int:
            low, high = np.log(grid.ends(name))
            drawn[name] = np.rint(np.exp(rng.uniform(low, high, extra)))
        elif spec.declared.scale == "linear" and spec.type is float:
            drawn[name] = np.round(rng.uniform(*grid.ends(name), extra), 2)
    return np.concatenate([grid.all(), drawn])


def best_constants(
    player: PlanPlayer,
    seeds: Sequence[int],
    *,
    at_least: int = 2048,
    rungs: Sequence[tuple[int, int]] = ((2, 256), (6, 48), (16, 16)),
    actions: NDArray[np.void] | None = None,
) -> tuple[NDArray[np.void], NDArray[np.float64]]:
    """The constant actions with the best mean score, by successive halving.

    Args:
        player: plays.
        seeds: of tuning, at least as many as the last rung asks for.
        at_least: actions that are tried.
        rungs: (seeds, how many of the best survive), in turn.
        actions: ACTION[n], those that are tried instead.

    Returns:
        ACTION[k], those that survive the last rung, best first; float64[k], their mean scores.
    """
    if actions is None:
        actions = candidates(player.task, at_least, seed=seeds[0])
    total, played = np.zeros(len(actions)), 0
    for count, keep in rungs:
        for seed in seeds[played:count]:
            total += player.play([seed] * len(actions), actions[:, None])
        played = count
        order = np.argsort(-total, kind="stable")[:keep]
        actions, total = actions[order], total[order]
    return actions, total / played


def clairvoyant(
    player: PlanPlayer,
    seed: int,
    starts: NDArray[np.void],
    *,
    rounds: int,
    children: int = 128,
    width: int = 24,
    fixed: Sequence[str] = (),
) -> tuple[NDArray[np.void], float]:
    """A plan for an episode that is known beforehand, by stochastic beam search.

    First, constant actions are played on the episode, to learn which does well when. Then the best `width`
    plans survive each round. In the next, a child is one of them, at times continued from a random window on
    by another, with one to three edits: over a stretch of windows, either all controls take the values of one
    of the constants that did best there, or one control takes another value.

    Args:
        player: plays.
        seed: of the episode.
        starts: ACTION[k, windows or 1], plans to start from.
        rounds: how often.
        children: plans played in a round.
        width: plans that survive.
        fixed: controls that keep the value of the first of `starts` in its first window.

    Returns:
        ACTION[windows], the best plan found, and its score.
    """
    task, grid = player.task, player.task.grid
    windows = task.windows
    rng = np.random.default_rng([seed, *(CONTROLS.index(name) for name in fixed)])
    constants = grid.at(rng.permutation(grid.size)[:children])
    plans = np.empty((len(starts), windows), ACTION)
    plans[:] = starts
    for name in fixed:
        plans[name] = constants[name] = starts[0, 0][name]
    constants = np.concatenate([np.unique(constants), np.unique(plans)])
    earned = player.rewards([seed] * len(constants), constants[:, None]).cumsum(axis=1)
    earned = np.concatenate([np.zeros((len(earned), 1)), earned], axis=1)
    free = [name for name in grid.granted if name not in fixed]
    values = {name: grid.codes(name) for name in free}

    def edit(plan: NDArray[np.void]) -> None:
        first = int(rng.integers(windows)) if rng.random() < 0.8 else 0
        last = min(first + 1 + int(rng.exponential(windows / 8)), windows)
        if rng.random() < 0.5:
            best = np.argsort(earned[:, first] - earned[:, last], kind="stable")[:8]
            plan[first:last] = constants[rng.choice(best)]
        else:
            name = free[rng.integers(len(free))]
            plan[name][first:last] = rng.choice(values[name])

    scores = player.play([seed] * len(plans), plans)
    for _ in range(rounds):
        order = np.argsort(-scores, kind="stable")[:width]
        plans, scores = plans[order], scores[order]
        born = plans[_ranked(rng, len(plans), children)]
        mates = plans[_ranked(rng, len(plans), children)]
        for child, mate in zip(born, mates, strict=True):
            if rng.random() < 0.4:
                cut = int(rng.integers(windows))
                child[cut:] = mate[cut:]
            for _ in range(rng.integers(1, 4)):
                edit(child)
        played = player.play([seed] * children, born)
        plans, scores = np.concatenate([plans, born]), np.concatenate([scores, played])
    best = int(scores.argmax())
    return plans[best], float(scores[best])


def _ranked(rng: np.random.Generator, count: int, size: int) -> NDArray[np.int64]:
    """Indices 0..count-1, the first ones more often."""
    ranks: NDArray[np.int64] = np.minimum(rng.geometric(min(3 / count, 1.0), size) - 1, count - 1)
    return ranks
