"""Nothing is lost or made: requests, tokens and KV blocks add up at every window's end."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from llmserve_env.hardware import load_profile
from llmserve_env.schema import ServeAction
from llmserve_env.sim.simulator import Simulator, SimulatorBatch
from llmserve_env.sim.state import CANCELLED, COMPLETED, FAILED
from llmserve_env.workloads import open_workload

from .cells import COUNTS, random_episode, requests, small
from .invariants import check, emitted_tokens


def served(batch, windows):
    """Serve, check everything after every window, and return the sums of the records' counts."""
    totals = Counter()
    for action, window_s in windows:
        record = batch.serve_each([action], window_s)[0]
        check(batch)
        for name in COUNTS:
            totals[name] += getattr(record, name)
        for name in ("arrived", "completed", "first_tokens"):
            assert getattr(record, f"tenant_{name.removeprefix('tenant_')}").sum() == getattr(record, name)
        assert record.tenant_failed.sum() == record.failed + record.cancelled
        assert record.tenant_in_flight.sum() == record.in_flight
        assert (record.tier_in_slo.sum(axis=0) == record.tenant_in_slo).all()
        assert ((record.tenant_headroom >= 0) & (record.tenant_headroom <= record.tenant_in_slo)).all()
        assert record.engines_tier.sum() == batch.engines.shape[1] >= record.engines_up
        totals["tenant_output_tokens"] += int(record.tenant_output_tokens.sum())
        totals["tenant_in_slo"] += int(record.tenant_in_slo.sum())
        totals["ttft"] += int(record.ttft_histogram.sum())
        totals["gaps"] += int(record.gap_histogram.sum())
        over = totals["completed"] + totals["failed"] + totals["cancelled"]
        assert totals["arrived"] == over + record.in_flight
        status = batch.outcomes["status"]
        for name, value in (("completed", COMPLETED), ("failed", FAILED), ("cancelled", CANCELLED)):
            assert totals[name] == (status == value).sum()
        done = status == COMPLETED
        assert totals["tenant_output_tokens"] == batch.requests["output_tokens"][done].sum()
        assert totals["output_tokens"] == emitted_tokens(batch).sum()
        assert totals["preemptions"] == batch.outcomes["preemptions"].sum()
        assert totals["ttft"] == (batch.outcomes["first_ps"] > 0).sum()
        assert totals["drafted_tokens"] >= totals["accepted_tokens"] or batch.cells["classes"][0] > 1
        assert 0 <= record.kv_occupancy <= 1
    return totals


def test_random_episodes_conserve():
    seen = Counter()
    for seed in range(250):
        batch, windows = random_episode(seed)
        totals = served(batch, windows)
        seen.update({name: int(totals[name] > 0) for name in COUNTS})
        if all(action.speculation_depth == 0 for action, _ in windows):
            assert totals["gaps"] + totals["ttft"] == totals["output_tokens"]
            assert totals["accepted_tokens"] == 0
        if totals["preemptions"] == 0:
            started = batch.requests["prompt_tokens"][batch.outcomes["first_ps"] > 0].sum()
            assert totals["prefill_tokens"] + totals["cached_tokens"] >= started
    least = {"preemptions": 40, "cached_tokens": 60, "evictions": 20, "transfers": 30, "failed": 60}
    for name, episodes in (least | {"accepted_tokens": 60, "cancelled": 5}).items():
        assert seen[name] >= episodes, (name, seen)


def test_tries_and_requests_add_up_where_clients_come_back():
    seen = Counter()
    for seed in range(150):
        batch, windows = random_episode(20_000 + seed, retries=True)
        totals = Counter()
        for action, window_s in windows:
            record = batch.serve_each([action], window_s)[0]
            check(batch)
            for name in (*COUNTS, "refused", "timeouts", "retries"):
                totals[name] += getattr(record, name)
            over = totals["completed"] + totals["failed"] + totals["cancelled"]
            assert totals["arrived"] == over + record.in_flight
            sent = totals["arrived"] - totals["cancelled"] + totals["retries"]
            ended = totals["completed"] + totals["refused"] + totals["timeouts"]
            assert sent == ended + record.in_flight - record.retrying
            assert totals["retries"] + record.retrying == batch.outcomes["retries"].sum()
            assert record.tenant_in_flight.sum() == record.in_flight
        allowed = batch.tenants["retries"][batch.requests["tenant"]]
        assert (batch.outcomes["retries"] <= allowed).all()
        failed = batch.outcomes["status"] == FAILED
        assert (batch.outcomes["retries"][failed] == allowed[failed]).all(), "the last try failed, no other"
        seen.update({name: int(totals[name] > 0) for name in totals})
    for name, episodes in {"refused": 60, "timeouts": 100, "retries": 100, "transfers": 20}.items():
        assert seen[name] >= episodes, (name, seen)


@pytest.mark.parametrize("depth", [0, 3])
def test_prefill_and_cache_cover_the_prompts_exactly(depth):
    """Without preemption each prompt is computed or found, once; one that fits is not thrown out."""
    workload = open_workload("sessions://?rate=6&duration=60&think=4&seed=3")
    batch = SimulatorBatch(load_profile("h100-llama-3.1-8b"), [workload])
    totals = served(batch, [(ServeAction(speculation_depth=depth), 5.0)] * 12 + [(ServeAction(), math.inf)])
    assert totals["preemptions"] == totals["failed"] == totals["cancelled"] == 0
    assert totals["prefill_tokens"] + totals["cached_tokens"] == workload.prompt_tokens.sum()
    assert totals["output_tokens"] == workload.output_tokens.sum()
    assert totals["cached_tokens"] > 0.3 * workload.prompt_tokens.sum()
    assert totals["cached_tokens"] % 16 == 0


def test_prefix_blocks_are_evicted_and_found_under_memory_pressure():
    workload = open_workload("sessions://?rate=6&duration=60&think=4&seed=3&context=2000")
    batch = SimulatorBatch(small(300), [workload], max_num_batched_tokens=512)
    totals = served(batch, [(ServeAction(), 3.0)] * 30 + [(ServeAction(), math.inf)])
    assert min(totals["preemptions"], totals["evictions"], totals["cached_tokens"]) > 0
    assert totals["completed"] + totals["cancelled"] == len(workload)
    assert (batch.engines["held"] <= batch.engines["block_cap"]).all()


def test_all_that_can_run_completes():
    """A drained cell has no request, slot or block left."""
    for seed in range(40):
        batch, _ = random_episode(1000 + seed)
        batch.serve_each([ServeAction()], math.inf)
        check(batch)
        assert np.isin(batch.outcomes["status"], (COMPLETED, FAILED, CANCELLED)).all()
        engines = batch.engines
        last_ps = batch.outcomes["finish_ps"].max()
        assert (engines["waiting"] == 0).all()
        assert (engines["running"] == engines["limbo_count"]).all()
        assert (engines["busy_ps"] <= max(last_ps, 1)).all() or engines.shape[1] > 1


def test_a_preempted_request_finds_its_own_blocks_again():
    """Two requests outgrow the memory: the younger comes back and recomputes only what was overwritten."""
    workload = requests([0, 0], [800, 800], [200, 180])
    cells = {on: SimulatorBatch(small(115), [workload], prefix_cache=on) for on in (True, False)}
    totals = {on: served(batch, [(ServeAction(), math.inf)]) for on, batch in cells.items()}
    assert totals[True]["preemptions"] == totals[False]["preemptions"] == 1
    assert totals[True]["cached_tokens"] > 0 == totals[False]["cached_tokens"]
    spared = totals[False]["prefill_tokens"] - totals[True]["prefill_tokens"]
    assert spared == totals[True]["cached_tokens"]
    # the older one took a block for each 16 tokens it gained meanwhile, the oldest free ones first
    assert totals[True]["evictions"] > 0


def test_a_preempted_request_is_served_before_its_engine_restarts():
    """Too big for the budget beside another, it runs when it is alone, before other weights are loaded."""
    workload = requests([0, 0], [900, 900], [300, 300])
    batch = SimulatorBatch(small(150), [workload])
    low = ServeAction(kv_budget_fraction=0.1)
    lower = ServeAction(kv_budget_fraction=0.1, quantization_tier="INT8")
    rest = ServeAction(quantization_tier="INT8")
    totals = served(batch, [(ServeAction(), 1.0), (low, 1.0), (lower, 120.0), (rest, math.inf)])
    assert totals["completed"] == 2
    assert totals["preemptions"] == 1


def test_a_transferred_request_pays_for_its_first_speculative_step():
    """Where its prompt fills its blocks to the last token, a first step of several tokens needs another."""
    workload = requests(np.arange(40) * 0.05, 159 + np.arange(40) % 20, 50)
    batch = SimulatorBatch(small(1000), [workload], engines=2,
                           action=ServeAction(prefill_decode_split=True, speculation_depth=8))  # fmt: skip
    action = ServeAction(prefill_decode_split=True, speculation_depth=8)
    totals = served(batch, [(action, 0.1)] * 40 + [(action, math.inf)])
    assert totals["transfers"] == totals["completed"] == 40


def test_records_tile_time_and_a_single_simulator_sums_like_its_batch():
    simulator = Simulator(load_profile("a100-llama-3.1-8b"), open_workload("gamma://?rate=5&duration=30"))
    records = [simulator.serve(ServeAction(), 2.5) for _ in range(12)]
    assert [r.start_s for r in records] == [2.5 * k for k in range(12)]
    assert [r.end_s for r in records] == [2.5 * (k + 1) for k in range(12)]
    inside = np.histogram(simulator.outcomes().arrival_s, np.arange(13) * 2.5)[0]
    assert [r.arrived for r in records] == inside.tolist()
