"""What scores over seeds amount to, and how sure that is.

What Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (2021, arXiv
2108.13264), recommend for a handful of runs, as their library, rliable, defines it: the interquartile mean,
the probability of improvement, performance profiles, and percentile intervals from a bootstrap that is
stratified by task. Beside them, for agents that played the same seeds: differences, and shares of a gap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from llmserve_env.errors import InputError

Statistic = Callable[..., Any]
"""Called as `statistic(scores, axis=-1)`; takes that axis away. `iqm`, `np.mean` and `np.median` are such."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval, in the scores' own unit.

    `str()` writes it as a table would: `0.512 [0.498, 0.527]`.
    """

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        estimate, low, high = (round(end, 3) + 0.0 for end in (self.estimate, self.low, self.high))  # no -0
        return f"{estimate:.3f} [{low:.3f}, {high:.3f}]"


def iqm(scores: npt.ArrayLike, axis: int | None = None) -> Any:
    """Interquartile mean: the mean of the scores without the lowest and the highest quarter.

    Less moved by outliers than the mean, and less wasteful of scores than the median (Agarwal et al. 2021,
    arXiv 2108.13264). A quarter is rounded down to whole scores: of five, one at each end is left out, and of
    three none.

    Args:
        scores: any shape.
        axis: the axis that is averaged away; None, as in rliable, averages over all seeds and tasks.

    Returns:
        A float, or float64 of the shape of `scores` without `axis`.

    Raises:
        InputError: there are no scores, or one is not finite (a nan would be trimmed as if it were the best).
    """
    return stats.trim_mean(_finite(scores, "scores"), 0.25, axis=axis)


def interval(
    scores: npt.ArrayLike,
    statistic: Statistic = iqm,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """A statistic of scores, and its percentile interval by stratified bootstrap.

    As Agarwal et al. 2021 (arXiv 2108.13264): every resample draws, in each task by itself, as many seeds as
    there are, with replacement, and takes the statistic over the scores of all tasks together. The tasks are
    fixed: the interval says what other seeds would have given on these tasks. It takes the scores of
    different tasks to be independent, which holds where every score has its own run. Where one trained agent
    fills a whole row, average each row first, and give `[seeds]`.

    Percentile intervals of few seeds are too narrow: those of a mean of normal scores, asked for 95%, cover
    the truth in 83% of cases with 5 seeds, 90% with 10, 94% with 50.

    Args:
        scores: float64[seeds] or [seeds, tasks], two seeds or more.
        statistic: what is estimated; see `Statistic`.
        confidence: the share of repetitions in which the interval should cover the truth, within (0, 1).
        resamples: bootstrap samples; 10,000 place the ends of a 95% interval to about 1% of its width.
        seed: seed of the resampling; the same arguments give the same interval.

    Returns:
        The statistic of `scores`, and its interval.

    Raises:
        InputError: fewer than two seeds, a score that is not finite, or an argument out of range.
    """
    table = _by_seed(scores, "scores")
    _check(confidence, resamples)

    def pooled(*tasks: npt.NDArray[np.float64], axis: int) -> Any:
        """The statistic over all tasks: float64[resamples, seeds] a task."""
        return statistic(np.concatenate(tasks, axis=axis), axis=axis)

    # SciPy resamples each of several unpaired samples by itself: a sample a task makes it stratified.
    bounds = stats.bootstrap(
        tuple(table.T),
        pooled,
        n_resamples=resamples,
        vectorized=True,
        axis=-1,
        confidence_level=confidence,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(pooled(*table.T, axis=-1)), float(bounds.low), float(bounds.high))


def paired_difference(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    statistic: Statistic = np.mean,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """How much `a` scores above `b` on the same seeds: `interval` of the differences, pair by pair.

    Two agents with the same seed serve the same workload, and much of the spread of scores is the workload's.
    Drawing pairs cancels that share; two separate intervals would count it twice.

    The default is the mean, not the interquartile mean of Agarwal et al. 2021 (arXiv 2108.13264), for two
    reasons. The mean of differences is the difference of the means, so it speaks of the two agents; the
    interquartile mean of differences is in general not the difference of the interquartile means. And
    agents often differ on few seeds only, those under pressure; trimming drops exactly these, and reports no
    difference.

    Args:
        a: float64[seeds] or [seeds, tasks], two seeds or more.
        b: scores, as `a`: the entry of the same place is the score on the same seed and task.
        statistic: statistic of the differences; see `Statistic`.
        confidence: see `interval`.
        resamples: see `interval`.
        seed: see `interval`.

    Returns:
        The statistic of `a - b`, and its interval; `a` is better where `low` is above 0.

    Raises:
        InputError: as for `interval`, or `a` and `b` differ in shape.
    """
    first, second = _paired(a=a, b=b)
    return interval(
        first - second, statistic=statistic, confidence=confidence, resamples=resamples, seed=seed
    )


def gap_share(
    scores: npt.ArrayLike,
    low: npt.ArrayLike,
    high: npt.ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval | None:
    """How much of the way from one agent to a better one a third has gone, on the same seeds.

    The mean of `scores - low` as a share of the mean of `high - low`: 0 where nothing is gained over `low`, 1
    where `high` is reached, below 0 for less than `low`. A ratio of means, not a mean of ratios: single seeds
    may have hardly any gap. Resamples draw whole seeds, the three scores of each together.

    Args:
        scores: float64[seeds] of one task, two seeds or more.
        low: scores of the agent where the gap begins, such as the best constant, in the form of `scores`.
        high: scores of the agent where the gap ends, such as the clairvoyant plan, likewise.
        confidence: see `interval`.
        resamples: see `interval`.
        seed: see `interval`.

    Returns:
        The share and its interval; None where in some resample there is no gap: a share of that says nothing.

    Raises:
        InputError: as for `interval`, the three differ in shape, or hold more than one task.
    """
    _check(confidence, resamples)
    table = _paired(scores=scores, low=low, high=high)
    if table[0].shape[1] != 1:
        raise InputError(f"expected one task, found {table[0].shape[1]}", field="scores")
    won, gap = (table[0] - table[1])[:, 0], (table[2] - table[1])[:, 0]
    counts = _draws(len(gap), resamples, np.random.default_rng(seed))
    gaps = counts @ gap
    if gap.mean() <= 0 or gaps.min() <= 0:
        return None
    return _interval(float(won.mean() / gap.mean()), (counts @ won) / gaps, confidence)


def probability_of_improvement(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """How likely a score of `a` is above one of `b` on a task drawn at random.

    As rliable's `probability_of_improvement`: for each task the share of all pairs of seeds, one of each
    agent, in which `a` scores higher, equal scores counting half (the Mann-Whitney statistic); then the mean
    over tasks. Resamples draw the seeds of `a` and of `b` independently, in each task by itself. It asks
    nothing of how much better; where both played the same seeds, `paired_difference` is the sharper question.

    Args:
        a: float64[seeds] or [seeds, tasks], two seeds or more.
        b: scores, as `a`, of the same tasks; the number of seeds may differ.
        confidence: see `interval`.
        resamples: see `interval`.
        seed: see `interval`.

    Returns:
        The probability, and its interval; `a` improves on `b` where `low` is above 0.5.

    Raises:
        InputError: as for `interval`, or `a` and `b` differ in their number of tasks.
    """
    _check(confidence, resamples)
    first, second = _by_seed(a, "a"), _by_seed(b, "b")
    if first.shape[1] != second.shape[1]:
        raise InputError(f"expected {first.shape[1]} tasks, as in a, found {second.shape[1]}", field="b")
    rng = np.random.default_rng(seed)
    estimates, drawn = [], np.zeros(resamples)
    for ours, theirs in zip(first.T, second.T, strict=True):
        wins = 0.5 * (np.sign(ours[:, None] - theirs) + 1)
        estimates.append(wins.mean())
        counts = _draws(len(ours), resamples, rng) @ wins
        drawn += (counts * _draws(len(theirs), resamples, rng)).sum(axis=1) / wins.size
    return _interval(float(np.mean(estimates)), drawn / first.shape[1], confidence)


@dataclass(frozen=True)
class Profile:
    """Which share of the scores lies above each of some thresholds.

    Attributes:
        thresholds: float64[k], in the scores' unit.
        shares: float64[k].
        low: float64[k], lower ends of pointwise intervals.
        high: float64[k], upper ends.
    """

    thresholds: npt.NDArray[np.float64]
    shares: npt.NDArray[np.float64]
    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]


def performance_profile(
    scores: npt.ArrayLike,
    thresholds: npt.ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> Profile:
    """The share of all scores, of all seeds and tasks, that lies above each threshold.

    As rliable's run-score distributions: an agent whose profile lies above another's everywhere is
    stochastically better. The resamples are those of `interval`.

    Args:
        scores: float64[seeds] or [seeds, tasks], two seeds or more.
        thresholds: float64[k].
        confidence: confidence of the interval at each threshold by itself.
        resamples: see `interval`.
        seed: see `interval`.

    Raises:
        InputError: as for `interval`, or a threshold is not finite.
    """
    _check(confidence, resamples)
    table, edges = _by_seed(scores, "scores"), _finite(thresholds, "thresholds").ravel()
    above = (table[:, :, None] > edges).astype(np.float64)
    rng = np.random.default_rng(seed)
    drawn = np.zeros((resamples, len(edges)))
    for task in range(table.shape[1]):
        drawn += _draws(len(table), resamples, rng) @ above[:, task]
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn / table.size, (tail, 1 - tail), axis=0)
    return Profile(edges, above.mean(axis=(0, 1)), low, high)


def _check(confidence: float, resamples: int) -> None:
    if not 0 < confidence < 1:
        raise InputError(f"expected a number between 0 and 1, found {confidence}", field="confidence")
    if resamples < 2:
        raise InputError(f"expected 2 or more, found {resamples}", field="resamples")


def _draws(seeds: int, resamples: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """float64[resamples, seeds], how often each seed is drawn when as many are drawn with replacement."""
    return rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples).astype(np.float64)


def _interval(estimate: float, drawn: npt.NDArray[np.float64], confidence: float) -> Interval:
    """The percentile interval of resampled statistics."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, (tail, 1 - tail))
    return Interval(estimate, float(low), float(high))


def _paired(**given: npt.ArrayLike) -> list[npt.NDArray[np.float64]]:
    """Scores of the same seeds and tasks by their arguments' names, as float64[seeds, tasks] each."""
    names = list(given)
    tables = [_by_seed(scores, name) for name, scores in given.items()]
    for name, table in zip(names, tables, strict=True):
        if table.shape != tables[0].shape:
            raise InputError(
                f"expected {tables[0].shape[0]} seeds of {tables[0].shape[1]} tasks, as in {names[0]}, "
                f"found {table.shape[0]} seeds of {table.shape[1]} tasks",
                field=name,
            )
    return tables


def _by_seed(scores: npt.ArrayLike, field: str) -> npt.NDArray[np.float64]:
    """Scores as float64[seeds, tasks]."""
    table = _finite(scores, field)
    if table.ndim not in (1, 2):
        raise InputError(f"expected [seeds] or [seeds, tasks], found shape {table.shape}", field=field)
    if len(table) < 2:
        raise InputError("expected two seeds or more, found one", field=field)
    return table.reshape(len(table), -1)


def _finite(scores: npt.ArrayLike, field: str) -> npt.NDArray[np.float64]:
    """Scores as float64, at least one, all finite."""
    try:
        table = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError("expected numbers, as many in each row", field=field) from None
    if not table.size:
        raise InputError("expected scores, found none", field=field)
    bad = np.argwhere(~np.isfinite(table))
    if len(bad):
        place = tuple(bad[0].tolist())
        raise InputError(f"expected finite scores, found {table[place]} at {list(place)}", field=field)
    return table
