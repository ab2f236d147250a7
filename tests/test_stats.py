"""Interquartile means and bootstrap intervals against naive loops and known coverage."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest

from llmserve_env.errors import InputError
from llmserve_env.stats import Interval, interval, iqm, paired_difference


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
