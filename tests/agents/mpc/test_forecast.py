"""Forecasts of arrivals: without bias where nothing changes, quick where it does."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve_env.agents.mpc.forecast import RateForecast

WINDOW_S = 5.0


def forecast(counts, **settings):
    """RateForecast after float64[windows, n, tenant] counts."""
    made = RateForecast(counts.shape[1], counts.shape[2], WINDOW_S, **settings)
    for window in counts:
        made.see(window)
    return made


@pytest.mark.parametrize("windows", [1, 3, 60])
def test_unbiased_on_poisson_arrivals(windows):
    rates = np.array([0.2, 2.0, 20.0])
    counts = np.random.default_rng(0).poisson(rates * WINDOW_S, (windows, 4000, 3))
    mean = forecast(counts).rates.mean(axis=0)
    # false alarms of the test for a new regime may pull by a percent
    assert mean == pytest.approx(rates, rel=0.03)


def test_varies_less_the_longer_it_remembers():
    counts = np.random.default_rng(1).poisson(4.0 * WINDOW_S, (120, 500, 1))
    spread = [forecast(counts, memory_s=memory_s).rates.std() for memory_s in (10.0, 60.0, 240.0)]
    assert spread[0] > 1.5 * spread[1] > 2.0 * spread[2]


def test_follows_a_step_at_once_both_ways():
    rng = np.random.default_rng(2)
    low, high = (rng.poisson(rate * WINDOW_S, (40, 300, 1)) for rate in (0.3, 8.0))
    for before, after, rate in ((low, high, 8.0), (high, low, 0.3)):
        made = forecast(np.concatenate([before, after[:1]]), memory_s=120.0)
        assert made.rates.mean() == pytest.approx(rate, rel=0.15, abs=0.1)


def test_slow_average_alone_would_not():
    counts = np.concatenate([np.full((40, 1, 1), 2), np.full((2, 1, 1), 40)])
    blind = forecast(counts, memory_s=120.0, surprise=1e9)
    assert blind.rates[0, 0] < 2.0
    assert forecast(counts, memory_s=120.0).rates[0, 0] == pytest.approx(8.0)


def test_tenants_and_episodes_are_apart():
    counts = np.full((30, 2, 2), 10)
    counts[-1, 0, 1] = 80
    assert forecast(counts).rates.tolist() == [[2.0, 16.0], [2.0, 2.0]]


def test_episodes_that_are_over_stay_as_they_are():
    made = forecast(np.full((10, 2, 1), 10))
    made.see(np.array([[90], [90]]), np.array([True, False]))
    assert made.rates[:, 0].tolist() == [18.0, 2.0]
    alone = forecast(np.full((10, 1, 1), 10))
    alone.see(np.array([[90]]))
    assert alone.rates[0, 0] == made.rates[0, 0]


def test_nothing_seen_nothing_expected():
    assert RateForecast(2, 3, WINDOW_S).rates.tolist() == [[0.0] * 3] * 2
