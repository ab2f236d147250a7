"""What a controller sets takes effect at the window's start, at its price; nothing is ignored in silence."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from llmserve_env.controls import ACTION, CONTROLS, to_array
from llmserve_env.errors import InputError
from llmserve_env.hardware import load_profile
from llmserve_env.hardware.constants import constants
from llmserve_env.schema import ServeAction
from llmserve_env.sim.simulator import Simulator, SimulatorBatch
from llmserve_env.sim.state import TRANSFER
from llmserve_env.workloads import open_workload
from llmserve_env.workloads.workload import Tenant

from .cells import PROFILE, requests, small

H100 = load_profile("h100-llama-3.1-8b")


def backlog(n=60, prompt=100, output=300, **cell):
    """A cell whose requests have all come at once and run since a second."""
    simulator = Simulator(PROFILE, requests(np.zeros(n), prompt, output), **cell)
    first = simulator.serve(ServeAction(), 1.0)
    assert first.running == n
    return simulator


def test_a_lower_batch_cap_drains():
    simulator = backlog(output=np.arange(60) * 10 + 100)
    running = [simulator.serve(ServeAction(batch_cap=8), 0.5) for _ in range(40)]
    assert sum(r.preemptions for r in running) == 0
    counts = [r.running for r in running]
    assert counts == sorted(counts, reverse=True), "nothing is admitted while it drains"
    waiting = Simulator(PROFILE, requests(np.arange(300) * 0.02, 100, 200))
    waiting.serve(ServeAction(), 3.0)
    records = [waiting.serve(ServeAction(batch_cap=8), 1.0) for _ in range(10)]
    assert records[0].preemptions == 0
    assert [r.running for r in records[-5:]] == [8] * 5
    assert records[-1].waiting > 100


def test_batch_cap_holds_at_every_window():
    simulator = Simulator(PROFILE, requests(np.zeros(100), 50, np.arange(100) % 50 + 1), engines=2)
    while True:
        record = simulator.serve(ServeAction(batch_cap=7), 0.05)
        assert (simulator.batch.engines["running"] <= 7).all()
        if not record.in_flight:
            break
        assert record.waiting == 0 or record.running >= 12


def test_a_lower_kv_budget_stops_admissions_and_then_preempts():
    simulator = Simulator(small(400), requests(np.arange(40) * 0.05, 200, 300))
    record = simulator.serve(ServeAction(), 2.0)
    assert record.kv_occupancy > 0.9
    running = record.running
    record = simulator.serve(ServeAction(kv_budget_fraction=0.4), 1.0)
    assert 0 < record.preemptions < running
    assert record.kv_occupancy <= 0.4
    held = simulator.batch.engines["held"][0, 0]
    assert held <= 160
    later = [simulator.serve(ServeAction(kv_budget_fraction=0.4), 1.0) for _ in range(5)]
    assert all(r.kv_occupancy <= 0.4 for r in later)
    assert simulator.serve(ServeAction(), 1.0).kv_occupancy > 0.4
    assert (simulator.serve_out().status == "completed").all()


@pytest.mark.parametrize("tier", ["INT8", "INT4"])
def test_other_weights_drain_reload_and_decode_faster(tier):
    simulator = Simulator(H100, requests([0, 0.1, 3.0], 100, 200))
    before = simulator.serve(ServeAction(), 0.2)
    assert before.running == 2
    switch = ServeAction(quantization_tier=tier)
    simulator.serve(switch, math.inf)
    outcomes = simulator.outcomes()
    away_s = constants().switching.duration_s(H100.tier(tier).weight_bytes)
    drained_s = outcomes.finish_s[:2].max()
    first_s = outcomes.arrival_s[2] + outcomes.ttft_s[2]
    assert first_s > drained_s + away_s
    alone_s = Simulator(H100, requests([0], 100, 200), action=switch).serve_out().ttft_s[0]
    assert first_s == pytest.approx(max(drained_s + away_s, 3.0) + alone_s, abs=1e-9)
    assert outcomes.tpot_s[2] < 0.85 * outcomes.tpot_s[0]
    assert simulator.batch.engines["blocks"][0, 0] > 27232


def test_starting_in_a_precision_costs_nothing():
    action = ServeAction(quantization_tier="INT8")
    assert Simulator(H100, requests([0], 100, 10), action=action).serve_out().ttft_s[0] < 0.1


def test_engines_switch_one_at_a_time():
    simulator = Simulator(H100, requests(np.arange(600) * 0.5, 100, 50), engines=2)
    simulator.serve(ServeAction(), 1.0)
    away = []
    for _ in range(60):
        record = simulator.serve(ServeAction(quantization_tier="INT8"), 5.0)
        away.append(int((simulator.batch.engines["condition"] > 0).sum()))
        assert record.completed > 0, "the other engine serves meanwhile"
    assert max(away) == 1
    assert (simulator.batch.engines["tier"] == 1).all()
    assert 2 * 45 / 5 <= sum(away) <= 2 * 60 / 5


def test_a_precision_changes_while_split_pools_have_queues():
    """The engine that drains is the only one of its pool: those that wait for it go on waiting there."""
    split = ServeAction(prefill_decode_split=True)
    workload = requests(np.zeros(50), 1000, 20)
    simulator = Simulator(H100, workload, engines=2, action=split)
    assert simulator.serve(split, 0.1).waiting > 0
    simulator.serve(ServeAction(prefill_decode_split=True, quantization_tier="INT8"), 200.0)
    assert (simulator.serve_out().status == "completed").all()


def test_split_pools_isolate():
    workload = open_workload("poisson://?rate=12&duration=30&lengths=fixed:1000,100")
    split = ServeAction(prefill_decode_split=True)
    simulator = Simulator(H100, workload, engines=2, action=split)
    link = constants().kv_link(H100.gpu.name)
    sent = 0
    for _ in range(200):
        record = simulator.serve(split, 0.2)
        sent += record.transfers
        assert simulator.batch.engines["partial"][0, 1] == -1, "the decode pool never prefills"
        moving = simulator.batch.outcomes["status"] == TRANSFER
        assert (simulator.batch.outcomes["generated"][moving] == 1).all(), "the prefill pool never decodes"
    outcomes = simulator.outcomes()
    assert sent == len(workload) == (outcomes.status == "completed").sum()
    mixed = Simulator(H100, workload, engines=2).serve_out()
    assert np.percentile(outcomes.tpot_s, 90) < np.percentile(mixed.tpot_s, 90), (
        "no prefill interrupts a decode"
    )
    # every request pays for the transfer of its prompt between its first two tokens
    least_s = link.duration_s(1000 * H100.model.kv_bytes_per_token)
    fastest_s = simulator.batch._cost.dense_ps[0, 1] * 1e-12
    assert (outcomes.e2e_s - outcomes.ttft_s).min() > least_s + 99 * fastest_s


def test_transfer_time_is_that_of_the_link():
    split = ServeAction(prefill_decode_split=True)
    outs = {}
    for prompt in (16, 2000):
        outs[prompt] = Simulator(PROFILE, requests([0], prompt, 2), engines=2, action=split)
        outs[prompt].serve(split, math.inf)
    for prompt, simulator in outs.items():
        cost, out = simulator.batch._cost, simulator.batch.outcomes[0]
        kv = prompt + 1
        k = np.searchsorted(cost.decode_kv[1:-1], kv, side="right")
        step_ps = cost.dense_ps[0, 1] + cost.head_ps[0, 1] + cost.decode_ps[0, 1, k]
        step_ps += cost.decode_slope[0, 1, k] * (kv - cost.decode_kv[k])
        moved_s = (out["finish_ps"] - out["first_ps"] - step_ps) * 1e-12
        link = constants().kv_link(PROFILE.gpu.name)
        assert moved_s == pytest.approx(link.duration_s(prompt * PROFILE.model.kv_bytes_per_token), rel=1e-6)


def test_a_split_switches_roles_and_back():
    simulator = Simulator(H100, requests(np.arange(400) * 0.5, 500, 30), engines=2)
    simulator.serve(ServeAction(), 1.0)
    roles = []
    for split, windows in ((True, 24), (False, 24)):
        sent = 0
        for _ in range(windows):
            sent += simulator.serve(ServeAction(prefill_decode_split=split), 5.0).transfers
        roles.append(simulator.batch.engines["role"][0].tolist())
        assert (sent > 0) == split
    assert roles == [[1, 2], [0, 0]]
    assert (simulator.serve_out().status == "completed").all()


def test_speculation_pays_alone_and_costs_in_a_crowd():
    def tpot_s(depth, n):
        simulator = Simulator(H100, requests(np.zeros(n), 64, 200))
        record = simulator.serve(ServeAction(batch_cap=512, speculation_depth=depth), math.inf)
        assert (record.drafted_tokens > 0) == (depth > 0)
        if depth:
            gain = constants().speculation["chat"].tokens_per_step[depth] - 1
            assert record.accepted_tokens / record.drafted_tokens * depth == pytest.approx(gain, rel=0.03)
        return simulator.outcomes().tpot_s.mean()

    assert tpot_s(3, 1) < 0.7 * tpot_s(0, 1)
    assert tpot_s(8, 512) > tpot_s(0, 512)


def test_speculation_classes_gain_their_own_rate():
    tenants = tuple(Tenant(name=name, speculation_class=name) for name in ("chat", "math", "ngram"))
    simulator = Simulator(H100, requests([0, 0, 0], 64, 2000, [0, 1, 2], tenants))
    simulator.serve(ServeAction(speculation_depth=3), 1.0)
    engine = simulator.batch.engines[0, 0]
    assert (engine["active"], engine["class_active"].tolist()) == (3, [1, 1, 1, 0])
    known = [constants().speculation[name].tokens_per_step[3] for name in ("chat", "math", "ngram")]
    steps = simulator.batch.windows["iterations"][0]
    for clock, rate in zip(engine["clock"], known, strict=False):
        assert abs(clock - steps * rate) <= 1


def test_priority_routing_serves_the_urgent_first():
    tenants = (Tenant(name="urgent", priority=0), Tenant(name="batch", priority=1))
    rng = np.random.default_rng(0)
    n = 600
    workload = requests(np.cumsum(rng.exponential(0.05, n)), 400, 150, rng.random(n) < 0.7, tenants)
    ttft_s = {}
    for priority in (False, True):
        simulator = Simulator(PROFILE, workload)
        simulator.serve(ServeAction(batch_cap=32, priority_routing=priority), math.inf)
        outcomes = simulator.outcomes()
        ttft_s[priority] = [outcomes.ttft_s[workload.tenant == k].mean() for k in (0, 1)]
    assert ttft_s[True][0] < 0.1 * ttft_s[False][0]
    assert ttft_s[True][1] > ttft_s[False][1]


def test_priority_routing_preempts_the_least_urgent():
    tenants = (Tenant(name="batch", priority=5), Tenant(name="urgent", priority=1))
    workload = requests(np.arange(8) * 0.01, 200, 300, np.arange(8) % 2, tenants)
    for priority in (False, True):
        simulator = Simulator(small(150), workload)
        simulator.serve(ServeAction(priority_routing=priority), math.inf)
        preempted = simulator.outcomes().preemptions
        assert preempted.sum() > 0
        assert (preempted[1::2].sum() == 0) == priority


def test_what_cannot_be_applied_is_told():
    lacking = H100.model_copy(update={"tiers": H100.tiers.model_copy(update={"INT4": None})})
    simulator = Simulator(lacking, requests([0, 10], 100, 10))
    action = ServeAction(prefill_decode_split=True, quantization_tier="INT4")
    record = simulator.serve(action, 5.0)
    assert record.not_applied == {
        "quantization_tier": "profile 'h100-llama-3.1-8b' has no INT4 weights",
        "prefill_decode_split": "a cell of one engine cannot be split",
    }
    assert simulator.batch.engines["condition"][0, 0] == 0
    assert simulator.serve(ServeAction(quantization_tier="INT8"), 5.0).not_applied == {}
    assert (simulator.serve_out().status == "completed").all()


def test_a_lone_request_may_outgrow_the_budget():
    """Otherwise it would preempt itself and then stand at the queue's head for ever."""
    batch = SimulatorBatch(small(110), [requests([0] + [1] * 20, [160] + [16] * 20, [200] + [4] * 20)])
    record = batch.serve_each([ServeAction(kv_budget_fraction=0.1)], 60.0)[0]
    assert (record.completed, record.in_flight) == (21, 0)


def test_a_small_token_budget_limits_speculation_in_split_pools():
    cell = {"engines": 2, "max_num_batched_tokens": 4, "action": ServeAction(prefill_decode_split=True)}
    batch = SimulatorBatch(small(400), [requests([0, 0, 0], [20, 20, 20], [8, 8, 8])], **cell)
    record = batch.serve_each([ServeAction(prefill_decode_split=True, speculation_depth=8)], math.inf)[0]
    assert record.completed == 3


def test_windows_do_not_change_routing_where_clients_give_up():
    rng = np.random.default_rng(0)
    tenant = (Tenant(patience_s=0.4),)
    sizes = rng.integers(500, 6000, 600), rng.integers(1, 200, 600)
    workload = requests(np.cumsum(rng.exponential(0.02, 600)), *sizes, tenants=tenant)
    found = []
    for windows in (1, 280):
        batch = SimulatorBatch(PROFILE, [workload], engines=3, action=ServeAction(batch_cap=4))
        for _ in range(windows):
            batch.serve_each([ServeAction(batch_cap=4)], 14.0 / windows)
        batch.serve_each([ServeAction(batch_cap=4)], math.inf)
        found.append(batch.outcomes["finish_ps"].tolist())
    assert found[0] == found[1]


def test_no_promise_is_broken_by_a_promise_of_never():
    tenant = (Tenant(ttft_slo_s=math.inf, tpot_slo_s=math.inf),)
    batch = SimulatorBatch(PROFILE, [requests([0, 0, 0], [9, 9, 9], [2, 4, 50], tenants=tenant)])
    assert batch.serve_each([ServeAction()], math.inf)[0].tenant_in_slo.tolist() == [3]


def test_a_window_may_reach_past_the_end_of_time():
    batch = SimulatorBatch(PROFILE, [requests([0], [9], [9])])
    assert batch.serve_each([ServeAction()], 5e6)[0].completed == 1
    assert batch.serve_each([ServeAction()], 1e9)[0].completed == 0


def test_any_integers_name_prefix_blocks():
    ids = np.array([-1, 2, 3, 4] * 2 + [5, 5 + 2**62])
    workload = replace(
        requests([0, 1, 2, 3], [64, 64, 16, 16], [4, 4, 4, 4]),
        prefix_block_tokens=16,
        prefix_offsets=np.array([0, 4, 8, 9, 10]),
        prefix_ids=ids,
    )
    batch = SimulatorBatch(PROFILE, [workload])
    record = batch.serve_each([ServeAction()], math.inf)[0]
    assert (record.completed, record.cached_tokens) == (4, 48)
    with pytest.raises(InputError, match="offsets"):
        replace(workload, prefix_offsets=np.array([0, 4, 8, 9, 11]))


def test_actions_may_lie_in_memory_as_they_like():
    workloads = [requests([0, 0.1, 0.2], [900, 9, 9], [50, 4, 50])] * 3
    actions = to_array([ServeAction(batch_cap=cap) for cap in (1, 2, 256)])
    fixed, spread, odd = actions.copy(), np.repeat(actions, 2)[::2], np.empty(actions.nbytes + 1, np.uint8)
    fixed.flags.writeable = False
    odd = np.ndarray(3, ACTION, odd.data, offset=1)
    odd[:] = actions
    found = []
    for each in (actions, fixed, spread, odd):
        batch = SimulatorBatch(PROFILE, workloads)
        batch.serve(each, 1.0)
        found.append(batch.windows.tobytes())
    assert found == found[:1] * 4


def test_records_of_another_layout_are_refused():
    batch = SimulatorBatch(PROFILE, [requests([0], [9], [9])])
    actions = to_array([ServeAction()])
    other = np.dtype([(name, actions.dtype[name]) for name in reversed(CONTROLS)])
    with pytest.raises(InputError, match="'actions': expected ACTION records"):
        batch.serve(np.zeros(1, other), 1.0)
    assert batch.now_s[0] == 0.0
