"""The token bucket in front of the queue, and clients who give up and come back."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmserve_env.hardware.constants import constants
from llmserve_env.schema import ServeAction
from llmserve_env.sim.simulator import Simulator
from llmserve_env.workloads.workload import Tenant

from .cells import ANYONE, PROFILE, requests

BURST_S = constants().admission.burst_s


def admitted(arrival_s, rate, tenants=ANYONE, tenant=0, *, priority=False):
    """bool[n], which requests a rate lets in."""
    simulator = Simulator(PROFILE, requests(arrival_s, 16, 2, tenant, tenants))
    outcomes = _served(simulator, ServeAction(admission_rate=rate, priority_routing=priority))
    return outcomes.status == "completed"


def _served(simulator, action):
    simulator.serve(action, math.inf)
    return simulator.outcomes()


def test_a_full_bucket_lets_in_its_burst_and_then_its_rate():
    assert BURST_S == 1.0
    at_once = admitted(np.zeros(30), 10.0)
    assert at_once.tolist() == [True] * 10 + [False] * 20
    steady = admitted(np.arange(400) / 40.0, 10.0)  # four times the rate, for ten seconds
    assert steady.sum() == 10 + 100 - 1, "the burst, and one each tenth of a second after the first"


def test_a_token_comes_back_after_exactly_its_time():
    later = 1.0 / 8.0
    burst = [0.0] * 8
    assert admitted([*burst, later - 1e-9], 8.0).tolist() == [True] * 8 + [False]
    assert admitted([*burst, later], 8.0).all()


def test_there_is_room_for_one_request_at_any_rate():
    assert admitted([0.0, 1.0, 9.9, 10.0], 0.1).tolist() == [True, False, False, True]
    assert admitted([0.0, 1e3], 1e-9).tolist() == [True, False]


def test_none_lets_everybody_in_and_the_bucket_is_full_when_it_is_back():
    simulator = Simulator(PROFILE, requests([*[0.0] * 6, *[2.0] * 6, *[4.0] * 6], 16, 2))
    counts = []
    for rate in (4.0, None, 4.0):
        record = simulator.serve(ServeAction(admission_rate=rate), 2.0)
        counts.append((record.arrived, record.refused, record.failed))
    assert counts == [(6, 2, 2), (6, 0, 0), (6, 2, 2)]


def test_under_priority_routing_less_urgent_tenants_leave_a_reserve():
    tenants = tuple(Tenant(name=str(rank), priority=rank) for rank in range(3))
    who = np.repeat([2, 1, 0], 9)
    fifo = admitted(np.zeros(27), 9.0, tenants, who)
    assert np.bincount(who[fifo], minlength=3).tolist() == [0, 0, 9], "first come, first served"
    urgent = admitted(np.zeros(27), 9.0, tenants, who, priority=True)
    assert np.bincount(who[urgent], minlength=3).tolist() == [3, 3, 3]


def test_a_refused_client_comes_back_after_waits_that_double_up_to_sixteen_times():
    tenant = Tenant(retries=7, retry_after_s=0.5)
    simulator = Simulator(PROFILE, requests([0.0, 0.0], 16, 2, tenants=(tenant,)))
    action = ServeAction(admission_rate=1e-6)
    sent_s = [0.0]
    while simulator.now_s < 40:
        if simulator.serve(action, 0.25).retries:
            sent_s.append(simulator.now_s - 0.25)
    assert np.diff(sent_s).tolist() == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    assert simulator.outcomes().status.tolist() == ["completed", "failed"]
    assert simulator.outcomes().finish_s[1] == 31.5


def test_latency_counts_from_the_first_try():
    tenant = Tenant(retries=1, retry_after_s=0.5, ttft_slo_s=0.4)
    simulator = Simulator(PROFILE, requests([0.0, 0.0], 16, 2, tenants=(tenant,)))
    record = simulator.serve(ServeAction(admission_rate=1.0), 0.45)
    assert (record.refused, record.retrying, record.in_flight, record.waiting) == (1, 1, 1, 0)
    record = simulator.serve(ServeAction(), 2.0)
    assert (record.retries, record.retrying, record.completed) == (1, 0, 1)
    assert record.tenant_in_slo.tolist() == [0], "half a second of waiting is the user's"
    assert simulator.outcomes().ttft_s[1] == pytest.approx(0.5 + simulator.outcomes().ttft_s[0], rel=0.2)


def test_past_its_deadline_an_answer_is_cancelled_and_all_of_it_is_lost():
    def served(deadline_s):
        tenant = Tenant(deadline_s=deadline_s, retries=2, retry_after_s=0.5)
        simulator = Simulator(PROFILE, requests([0.0], 64, 400, tenants=(tenant,)))
        record = simulator.serve(ServeAction(), math.inf)
        return record, simulator

    record, simulator = served(math.inf)
    whole_s, tokens = simulator.outcomes().e2e_s[0], record.output_tokens
    assert tokens == 400
    record, simulator = served(0.5 * whole_s)
    assert (record.timeouts, record.retries, record.completed, record.failed) == (3, 2, 0, 1)
    assert record.output_tokens == pytest.approx(1.5 * tokens, rel=0.05), "three times half of the work"
    assert simulator.outcomes().finish_s[0] == pytest.approx(1.5 * whole_s + 0.5 + 1.0)
    assert simulator.batch.engines["held"].sum() == simulator.batch.engines["running"].sum() == 0
    assert served(1.1 * whole_s)[0].completed == 1


def test_what_is_given_up_makes_room():
    tenants = (Tenant(name="hasty", deadline_s=0.5), Tenant(name="other"))
    simulator = Simulator(PROFILE, requests([0.0, 0.1], 64, 400, [0, 1], tenants))
    outcomes = _served(simulator, ServeAction(batch_cap=1))
    assert outcomes.status.tolist() == ["failed", "completed"]
    assert 0.4 < outcomes.ttft_s[1] < 0.5, "at the next decision after the first was given up"
