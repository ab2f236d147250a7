"""More or faster hardware serves the same requests sooner."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmserve_env.hardware import load_profile
from llmserve_env.schema import ServeAction
from llmserve_env.sim.simulator import Simulator
from llmserve_env.workloads import open_workload

from .cells import PROFILE, random_tenants, random_workload, requests

NAMES = ("h200-llama-3.1-8b", "h100-llama-3.1-8b", "a100-llama-3.1-8b")


@pytest.mark.parametrize("uri", ["gamma://?rate=20&duration=60", "sessions://?rate=10&duration=60&think=5"])
def test_newer_gpus_are_faster(uri):
    e2e_s = [np.mean(Simulator(load_profile(name), open_workload(uri)).serve_out().e2e_s) for name in NAMES]
    assert e2e_s == sorted(e2e_s)


def test_more_engines_serve_sooner():
    for seed in range(5):
        workload = open_workload(f"gamma://?rate=24&duration=40&seed={seed}")
        means = []
        for engines in (1, 2, 4):
            outcomes = Simulator(PROFILE, workload, engines=engines).serve_out()
            assert (outcomes.status == "completed").all()
            means.append((outcomes.e2e_s.mean(), outcomes.ttft_s.mean()))
        assert means[0][0] > means[1][0] > means[2][0]
        assert means[0][1] > means[1][1] > means[2][1]


def test_a_larger_batch_cap_serves_a_backlog_sooner():
    workload = open_workload("poisson://?rate=20&duration=30")
    e2e_s = []
    for cap in (4, 16, 64):
        simulator = Simulator(PROFILE, workload)
        simulator.serve(ServeAction(batch_cap=cap), math.inf)
        e2e_s.append(simulator.outcomes().e2e_s.mean())
    assert e2e_s == sorted(e2e_s, reverse=True)


def slowed(simulator, factor):
    """All latency tables of the cell times a whole factor."""
    cost = simulator.batch._cost
    times = ("dense_ps", "head_ps", "decode_ps", "decode_slope", "prefill_ps", "mixed_ps")
    simulator.batch._cost = cost._replace(**{name: getattr(cost, name) * factor for name in times})
    return simulator


def test_hardware_half_as_fast_takes_twice_as_long():
    """With arrivals as much later, every request's times double: the scheduler knows no absolute time."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        tenants = tuple(
            t.__class__(name=t.name, speculation_class=t.speculation_class) for t in random_tenants(rng)
        )
        workload = random_workload(rng, 60, tenants)
        action = ServeAction(
            batch_cap=int(rng.choice([2, 16, 256])), speculation_depth=int(rng.choice([0, 3]))
        )
        fast, slow = Simulator(PROFILE, workload), slowed(Simulator(PROFILE, workload.scaled(0.5)), 2)
        for simulator in (fast, slow):
            simulator.serve(action, math.inf)
        np.testing.assert_allclose(slow.outcomes().ttft_s, 2 * fast.outcomes().ttft_s, rtol=1e-6)
        np.testing.assert_allclose(slow.outcomes().e2e_s, 2 * fast.outcomes().e2e_s, rtol=1e-6)


def test_slower_hardware_never_hurries_a_backlog():
    """Where all requests wait from the start, scaled tables scale the whole schedule."""
    workload = requests(np.zeros(100), np.arange(100) * 7 + 1, 100 - np.arange(100))
    fast, slow = Simulator(PROFILE, workload), slowed(Simulator(PROFILE, workload), 3)
    np.testing.assert_allclose(slow.serve_out().e2e_s, 3 * fast.serve_out().e2e_s, rtol=1e-6)
