"""Requests that stand for those that were not seen."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve_env.agents.mpc.traffic import LOG_SEEDS, PastTraffic
from llmserve_env.tasks import EVALUATION_SEEDS, load_task

TASK = load_task("bursty_workload")
PAST = PastTraffic(TASK)
TENANTS = len(TASK.tenants)


def test_told_requests_are_those_of_the_record():
    counts = np.array([30, 0, 12, 5])
    told = PAST.told(np.random.default_rng(0), counts, 60_000, 100.0, 110.0)
    assert np.bincount(told.tenant, minlength=TENANTS).tolist() == counts.tolist()
    assert told.prompt_tokens.sum() == pytest.approx(60_000, rel=0.01)
    assert (np.diff(told.arrival_s) >= 0).all()
    assert told.arrival_s.min() >= 100.0
    assert told.arrival_s.max() < 110.0
    nothing = PAST.told(np.random.default_rng(0), np.zeros(TENANTS, int), 0, 0.0, 10.0)
    assert len(nothing.arrival_s) == 0


def test_lengths_are_each_tenants_own():
    rng, real = np.random.default_rng(1), TASK.requests(9)
    drawn = PAST.expected(rng, np.full(TENANTS, 50.0), 0.0, 100.0)
    for tenant in range(TENANTS):
        for name in ("prompt_tokens", "output_tokens"):
            mine = np.median(getattr(drawn, name)[drawn.tenant == tenant])
            assert mine == pytest.approx(np.median(getattr(real, name)[real.tenant == tenant]), rel=0.3)


def test_expected_requests_come_at_the_forecast_rates():
    rates = np.array([3.0, 0.0, 1.0, 0.2])
    drawn = PAST.expected(np.random.default_rng(2), rates, 50.0, 2050.0)
    assert np.bincount(drawn.tenant, minlength=TENANTS) / 2000 == pytest.approx(rates, rel=0.15)


def test_the_log_is_of_training_and_out_of_the_way():
    assert len(LOG_SEEDS) == 4
    assert max(LOG_SEEDS) < EVALUATION_SEEDS.start
    assert min(LOG_SEEDS) > 2**30
