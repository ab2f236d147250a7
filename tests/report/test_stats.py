"""Interquartile means and bootstrap intervals against naive loops and known coverage."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest

from llmserve_env.errors import InputError
from llmserve_env.report.stats import (
    Interval,
    gap_share,
    interval,
    iqm,
    paired_difference,
    performance_profile,
    probability_of_improvement,
)


def naive_iqm(scores):
    """rliable's aggregate_iqm: sort all scores of all runs and tasks, cut a quarter at each end, average."""
    ordered = sorted(score for row in scores for score in row)
    cut = len(ordered) // 4
    return statistics.fmean(ordered[cut : len(ordered) - cut])


def naive_interval(scores, statistic, resamples, confidence=0.95):
    """rliable's StratifiedBootstrap: for every entry of the table, draw a run of the entry's own task."""
    draw = random.Random(7)
    runs, tasks = len(scores), len(scores[0])
    found = sorted(
        statistic([[scores[draw.randrange(runs)][task] for task in range(tasks)] for _ in range(runs)])
        for _ in range(resamples)
    )
    tail = (1 - confidence) / 2
    return found[round(tail * resamples)], found[round((1 - tail) * resamples) - 1]


def mean_of_all(scores):
    return statistics.fmean(score for row in scores for score in row)


@pytest.fixture
def scores():
    """float64[12 seeds, 3 tasks], tasks of very different levels and spreads, one outlier."""
    table = np.random.default_rng(3).normal([0.1, 0.5, 0.9], [0.02, 0.2, 0.05], (12, 3))
    table[0, 1] = 5.0
    return table


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (5, 1), (8, 1), (12, 3), (7, 5)])
def test_iqm_is_rliables(shape):
    table = np.random.default_rng(1).normal(size=shape)
    assert iqm(table) == pytest.approx(naive_iqm(table))
    np.testing.assert_allclose(iqm(table, axis=0), [naive_iqm(table[:, [task]]) for task in range(shape[1])])


def test_iqm_by_hand():
    assert iqm([100, 1, 2, 3, -100, 4, 5, 6]) == 3.5  # of 2, 3, 4, 5: two of eight go at each end
    assert iqm([0, 1, 2, 4, 99]) == pytest.approx(7 / 3)  # one of five


@pytest.mark.parametrize(("statistic", "naive"), [(iqm, naive_iqm), (np.mean, mean_of_all)])
def test_interval_is_rliables(scores, statistic, naive):
    """Two bootstraps with different random numbers; ends within 4% of the interval's width of each other."""
    for confidence in (0.95, 0.5):
        ours = interval(scores, statistic=statistic, confidence=confidence)
        low, high = naive_interval(scores.tolist(), naive, 10_000, confidence)
        assert ours.estimate == pytest.approx(naive(scores))
        assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.04 * (high - low))


def test_seeds_are_drawn_within_their_task():
    """Tasks that are constant leave nothing to chance, however far apart; pooling their scores would."""
    table = np.tile([0.0, 1.0, 5.0], (6, 1))
    assert interval(table, statistic=np.mean) == Interval(2.0, 2.0, 2.0)


def test_tasks_are_drawn_by_themselves():
    """Columns that mirror each other cancel only if a draw takes whole rows; a stratified draw does not."""
    column = np.linspace(0, 1, 10)
    mirrored = interval(np.stack([column, 1 - column], axis=1), statistic=np.mean)
    assert mirrored.estimate == 0.5
    assert mirrored.low < 0.4 < 0.6 < mirrored.high


def test_one_task_is_a_plain_bootstrap(scores):
    assert interval(scores[:, 0]) == interval(scores[:, [0]])


def test_same_arguments_same_interval(scores):
    assert interval(scores) == interval(scores.tolist())
    other = interval(scores, seed=1)
    assert other != interval(scores)
    assert other.estimate == interval(scores).estimate


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_coverage_of_the_mean(confidence):
    """1000 samples of 100 normal scores: the true mean is covered as often as was asked, within 3 points.

    Each has its own draws; with the same, the error of the draws would be one and the same in all intervals.
    """
    samples = np.random.default_rng(2).normal(0.4, 0.1, (1000, 100))
    covered = 0
    for seed, sample in enumerate(samples):
        found = interval(sample, statistic=np.mean, confidence=confidence, resamples=1000, seed=seed)
        covered += found.low <= 0.4 <= found.high
    assert covered / len(samples) == pytest.approx(confidence, abs=0.03)


def test_width_is_that_of_theory():
    """The interval of a mean of n scores is about estimate ± 1.96 s / √n."""
    sample = np.random.default_rng(4).normal(size=400)
    found = interval(sample, statistic=np.mean)
    half = 1.96 * sample.std() / math.sqrt(len(sample))
    assert (found.low, found.high) == pytest.approx(
        (sample.mean() - half, sample.mean() + half), abs=0.05 * half
    )


def test_pairs_cancel_the_workload():
    """A gain of 0.01 on seeds that differ by 0.2 shows in pairs, and would not in two separate intervals."""
    draw = np.random.default_rng(5)
    b = draw.normal(0.5, 0.2, (20, 2))
    a = b + draw.normal(0.01, 0.005, b.shape)
    found = paired_difference(a, b)
    assert found.estimate == pytest.approx(a.mean() - b.mean())
    assert 0 < found.low < found.high < 0.02
    assert interval(a, statistic=np.mean).low < interval(b, statistic=np.mean).high


def test_a_difference_on_few_seeds_is_seen():
    """What the default is the mean for: the interquartile mean cuts the only seeds that differ."""
    a, b = np.full(50, 0.5), np.full(50, 0.5)
    b[:5] = 0.1
    assert paired_difference(a, b).low > 0
    assert paired_difference(a, b, statistic=iqm) == Interval(0.0, 0.0, 0.0)


def test_difference_changes_sign_with_its_order(scores):
    forth, back = paired_difference(scores, scores[::-1] + 0.1), paired_difference(scores[::-1] + 0.1, scores)
    np.testing.assert_allclose(
        (back.estimate, back.low, back.high), (-forth.estimate, -forth.high, -forth.low), rtol=1e-9
    )


def test_written_as_in_a_table():
    assert str(Interval(0.51249, 0.498, 0.5271)) == "0.512 [0.498, 0.527]"


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0.1, math.nan, 0.3], r"found nan at \[1\]"),
        ([[0.1, 0.2], [0.3, math.inf]], r"found inf at \[1, 1\]"),
        ([0.5], "two seeds or more"),
        ([[0.5, 0.6]], "two seeds or more"),
        ([], "found none"),
        (np.zeros((4, 0)), "found none"),
        (0.5, r"found shape \(\)"),
        (np.zeros((2, 2, 2)), r"found shape \(2, 2, 2\)"),
        ([[0.1], [0.2, 0.3]], "as many in each row"),
        (["good", "bad"], "expected numbers"),
    ],
)
def test_refuses_scores_that_say_nothing(scores, message):
    with pytest.raises(InputError, match=f"'scores'.*{message}"):
        interval(scores)
    with pytest.raises(InputError, match=f"'a'.*{message}"):
        paired_difference(scores, [0.1, 0.2])


def test_refuses_nan_rather_than_trim_it():
    with pytest.raises(InputError, match="found nan"):
        iqm([0.1, 0.2, 0.3, math.nan])


def test_refuses_pairs_that_do_not_match():
    with pytest.raises(InputError, match=r"'b'.*expected 3 seeds of 1 tasks.*found 2 seeds"):
        paired_difference([1, 2, 3], [1, 2])


@pytest.mark.parametrize(
    ("field", "value"), [("confidence", 0), ("confidence", 95), ("confidence", math.nan), ("resamples", 1)]
)
def test_refuses_arguments_out_of_range(field, value):
    with pytest.raises(InputError, match=field):
        interval([0.1, 0.2], **{field: value})


def naive_improvement(a, b):
    """rliable's probability_of_improvement: Mann-Whitney's U over all pairs, task by task, then the mean."""
    tasks = []
    for ours, theirs in zip(np.transpose(a), np.transpose(b), strict=True):
        wins = [1.0 if x > y else 0.5 if x == y else 0.0 for x in ours for y in theirs]
        tasks.append(statistics.fmean(wins))
    return statistics.fmean(tasks)


def test_probability_of_improvement_by_hand():
    # Pairs: 1>0, 1=1, 1<5; 3>0, 3>1, 3<5: 3.5 of 6.
    found = probability_of_improvement([1, 3], [0, 1, 5])
    assert found.estimate == pytest.approx(3.5 / 6)
    assert found.low < 3.5 / 6 < found.high
    # A task that is always won and one that is always lost, whatever their scales: one half, for certain.
    split = probability_of_improvement([[9, 0], [8, 0.1]], [[1, 0.2], [2, 0.3]])
    assert split == Interval(0.5, 0.5, 0.5)


def test_probability_of_improvement_is_rliables(scores):
    other = np.random.default_rng(5).normal([0.1, 0.4, 0.95], [0.05, 0.2, 0.05], (9, 3))
    found = probability_of_improvement(scores, other)
    assert found.estimate == pytest.approx(naive_improvement(scores, other))
    draw = np.random.default_rng(8)
    resampled = []
    for _ in range(2_000):  # each agent's seeds by themselves, in each task by itself
        a = np.stack([draw.choice(column, 12) for column in scores.T], axis=1)
        b = np.stack([draw.choice(column, 9) for column in other.T], axis=1)
        resampled.append(naive_improvement(a, b))
    low, high = np.quantile(resampled, (0.025, 0.975))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.06 * (high - low))


def test_probability_of_improvement_needs_the_same_tasks(scores):
    with pytest.raises(InputError, match="expected 3 tasks, as in a, found 2"):
        probability_of_improvement(scores, scores[:, :2])


def test_performance_profile_by_hand():
    found = performance_profile([[0.1, 0.9], [0.5, 0.9]], [0.0, 0.1, 0.4, 0.9])
    assert found.shares.tolist() == [1.0, 0.75, 0.75, 0.0]  # strictly above, as rliable has it
    assert found.low[0] == found.high[0] == 1.0
    # Of the first task none, one or both of two draws are 0.5; the second is always above 0.4.
    assert (found.low[2], found.high[2]) == (0.5, 1.0)


def test_performance_profile_is_rliables(scores):
    edges = np.linspace(0, 1, 21)
    found = performance_profile(scores, edges, resamples=10_000)
    for place in (3, 10, 18):
        above = interval((scores > edges[place]).astype(float), statistic=np.mean)
        assert found.shares[place] == pytest.approx(above.estimate)
        assert (found.low[place], found.high[place]) == pytest.approx((above.low, above.high), abs=0.03)


def test_gap_share_by_hand():
    low, high = np.array([0.2, 0.4, 0.6]), np.array([0.4, 0.6, 1.0])
    assert gap_share(low, low, high) == Interval(0.0, 0.0, 0.0)
    assert gap_share(high, low, high) == Interval(1.0, 1.0, 1.0)
    # A quarter of every gap is a quarter, however the seeds are drawn: they are drawn together.
    quarter = gap_share(low + 0.25 * (high - low), low, high)
    assert (quarter.estimate, quarter.low, quarter.high) == pytest.approx((0.25, 0.25, 0.25))
    # 0.1 + 0 + 0 of 0.2 + 0.2 + 0.4: the ratio of the means, not the mean of 1/2, 0 and 0.
    assert gap_share(low + np.array([0.1, 0, 0]), low, high).estimate == pytest.approx(1 / 8)


def test_gap_share_of_no_gap_says_nothing():
    assert gap_share([0.5, 0.6], [0.5, 0.6], [0.5, 0.6]) is None
    assert gap_share([0.5, 0.6, 0.7], [0.5, 0.6, 0.7], [0.6, 0.6, 0.7]) is None  # one seed makes it all
    with pytest.raises(InputError, match="expected 2 seeds"):
        gap_share([0.5, 0.6], [0.5, 0.6], [0.6, 0.7, 0.8])


@pytest.mark.parametrize("function", [probability_of_improvement, performance_profile])
def test_arguments_out_of_range_are_refused(function):
    for changed in ({"confidence": 1.0}, {"resamples": 1}):
        with pytest.raises(InputError):
            function([0.1, 0.2], [0.1, 0.2], **changed)
