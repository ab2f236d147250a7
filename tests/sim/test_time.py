"""Times are in order, and Little's law holds between records and outcomes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmserve_env.hardware import load_profile
from llmserve_env.schema import ServeAction
from llmserve_env.sim.simulator import Simulator
from llmserve_env.sim.state import NEVER_PS, PS_PER_S
from llmserve_env.workloads import open_workload
from llmserve_env.workloads.workload import Tenant

from .cells import PROFILE, random_episode, requests, small


def test_every_request_runs_forward_in_time():
    for seed in range(150):
        batch, windows = random_episode(2000 + seed)
        cost = batch._cost
        fastest_ps = cost.dense_ps[:, 1].min() + cost.head_ps[:, 1].min()
        for action, window_s in windows:
            batch.serve_each([action], window_s)
        out, req = batch.outcomes, batch.requests
        done = out["status"] == 4
        first = out["first_ps"] > 0
        assert (out["first_ps"][done] > 0).all()
        assert (out["first_ps"][first] >= (req["arrival_ps"] + fastest_ps)[first]).all()
        assert (out["finish_ps"][done] >= out["first_ps"][done]).all()
        most = 9 if any(action.speculation_depth for action, _ in windows) else 1
        steps = -(-(req["output_tokens"][done] - 1) // most)
        assert (out["finish_ps"][done] - out["first_ps"][done] >= steps * fastest_ps).all()
        assert batch.engines["busy_ps"].max() >= out["finish_ps"][done].max(initial=0)
        failed = out["status"] == 5
        patience = batch.tenants["patience_ps"][req["tenant"]]
        assert (patience[failed] < NEVER_PS).all()
        assert (out["finish_ps"][failed] == (req["arrival_ps"] + patience)[failed]).all()
        assert (out["first_ps"][failed] == 0).all()
        cancelled = out["status"] == 6
        assert (out["finish_ps"][cancelled] == req["arrival_ps"][cancelled]).all()
        assert (out["first_ps"][cancelled] == 0).all()


def test_a_request_alone_takes_the_sum_of_its_iterations():
    """Prefill, then decodes one by one from the table; across knots and blocks, in one window or in many."""
    prompt, output = 900, 400
    for windows in ([math.inf], [0.037] * 400):
        simulator = Simulator(PROFILE, requests([0.5], prompt, output))
        records = [simulator.serve(ServeAction(), window_s) for window_s in windows]
        cost = simulator.batch._cost
        time_ps = 0
        for context in range(prompt + 1, prompt + output):
            k = np.searchsorted(cost.decode_kv[1:-1], context, side="right")
            attention = cost.decode_ps[0, 1, k] + cost.decode_slope[0, 1, k] * (context - cost.decode_kv[k])
            time_ps += int(cost.dense_ps[0, 1] + cost.head_ps[0, 1] + attention)
        out = simulator.batch.outcomes[0]
        assert out["finish_ps"] - out["first_ps"] == time_ps
        assert sum(r.iterations for r in records) == output
        # alone in the cell it runs from its arrival to its end: Little's law without a remainder
        running_s = sum(r.mean_running * r.busy_s for r in records if r.iterations)
        assert running_s == pytest.approx(float(simulator.outcomes().e2e_s[0]), rel=1e-12)


def test_gauges_are_the_numbers_in_the_system():
    """The records' gauges at each window's end equal a count over the finished run's outcomes."""
    workload = open_workload("gamma://?rate=14&duration=60&seed=5")
    simulator = Simulator(PROFILE, workload)
    records = [simulator.serve(ServeAction(batch_cap=48), 0.5) for _ in range(130)]
    outcomes = simulator.serve_out()
    assert max(r.waiting for r in records) > 5
    for record in records:
        arrived = (outcomes.arrival_s < record.end_s).sum()
        inside = arrived - (outcomes.finish_s <= record.end_s).sum()
        assert record.waiting + record.running == inside
        # a request leaves in_flight when its last batch is scheduled, at most two batches before
        assert inside - 48 <= record.in_flight <= inside


def test_littles_law():
    """Arrivals and times in the system against the gauge of records, sampled 50 times a second."""
    workload = open_workload("poisson://?rate=3&duration=60&seed=1")
    simulator = Simulator(PROFILE, workload)
    records = [simulator.serve(ServeAction(batch_cap=12), 0.02) for _ in range(6000)]
    assert records[-1].in_flight == 0
    outcomes = simulator.outcomes()
    mean_in_system = np.mean([r.waiting + r.running for r in records])
    rate = len(workload) / records[-1].end_s
    assert mean_in_system == pytest.approx(rate * outcomes.e2e_s.mean(), rel=2e-3)


def test_running_time_is_time_in_system_where_nothing_waits():
    """Sequence-seconds of the batches against the outcomes; joining and leaving take two batches at most."""
    workload = open_workload("poisson://?rate=3&duration=120&seed=2&lengths=fixed:64,200")
    simulator = Simulator(load_profile("h100-llama-3.1-8b"), workload)
    record = simulator.serve(ServeAction(), math.inf)
    e2e_s = simulator.outcomes().e2e_s
    longest = 0.03
    assert simulator.outcomes().tpot_s.max() < longest
    running_s = record.mean_running * record.busy_s
    assert abs(running_s - e2e_s.sum()) < 2 * longest * len(workload)
    assert running_s == pytest.approx(e2e_s.sum(), rel=0.02)


def test_patience_ends_at_its_deadline():
    """One slot, held for seconds: those behind it leave when their patience ends."""
    hasty = (Tenant(patience_s=1.0),)
    for windows in ([math.inf], [0.25] * 80):
        simulator = Simulator(PROFILE, requests([0, 0.1, 0.2], 100, 200, tenants=hasty))
        records = [simulator.serve(ServeAction(batch_cap=1), window_s) for window_s in windows]
        outcomes = simulator.outcomes()
        assert outcomes.status.tolist() == ["completed", "failed", "failed"]
        assert outcomes.finish_s[1:].tolist() == [1.1, 1.2]
        if len(windows) > 1:
            assert [k for k, r in enumerate(records) if r.failed] == [4]
            assert records[3].waiting == 2
    exact_ps = Simulator(PROFILE, requests([0, 0], 100, 1))
    exact_ps.serve(ServeAction(batch_cap=1), math.inf)
    turn_s = int(exact_ps.batch.outcomes["first_ps"][0]) / PS_PER_S  # when the slot is free again
    for patience_s, status in ((turn_s - 1e-9, "failed"), (turn_s + 1e-9, "completed")):
        tenants = (Tenant(patience_s=patience_s),)
        simulator = Simulator(PROFILE, requests([0, 0], 100, 1, tenants=tenants))
        simulator.serve(ServeAction(batch_cap=1), math.inf)
        assert simulator.outcomes().status[1] == status


def test_refused_on_arrival():
    simulator = Simulator(small(110), requests([0, 1], [1692, 1693], [60, 60]))
    record = simulator.serve(ServeAction(), math.inf)
    assert (record.completed, record.cancelled) == (1, 1)
    assert simulator.outcomes().status.tolist() == ["completed", "cancelled"]
