"""The kernel equals its plain twin, request by request, bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from sim.cells import PROFILE, small

from llmserve_env.hardware.profile import TIERS
from llmserve_env.schema import QuantizationTier, ServeAction
from llmserve_env.sim.simulator import SimulatorBatch
from llmserve_env.sim.state import NEVER_PS, PS_PER_S, STATUS_NAMES
from llmserve_env.workloads.workload import Tenant, Workload

from .tables import Tables, plain_tenants
from .twin import Cell, Request


@st.composite
def tenants(draw):
    count = draw(st.integers(1, 3))
    return tuple(
        Tenant(
            name=str(i),
            patience_s=draw(st.sampled_from([math.inf, 0.05, 0.5, 3.0])),
            deadline_s=draw(st.sampled_from([math.inf, math.inf, 0.1, 0.7, 4.0])),
            retries=draw(st.sampled_from([0, 0, 1, 3, 7])),
            retry_after_s=draw(st.sampled_from([0.001, 0.05, 0.5])),
            priority=draw(st.integers(0, 2)),
            speculation_class=draw(st.sampled_from(["chat", "math", "ngram"])),
        )
        for i in range(count)
    )


@st.composite
def workloads(draw, longest=1500):
    who = draw(tenants())
    count = draw(st.integers(1, 30))
    gap = st.sampled_from([0.0, 0.0, 1e-6, 0.003, 0.02, 0.2, 1.0])
    arrival_s = np.cumsum([draw(gap) for _ in range(count)])
    prompt = [draw(st.one_of(st.integers(1, 64), st.integers(1, longest))) for _ in range(count)]
    output = [draw(st.one_of(st.integers(1, 5), st.integers(1, 120))) for _ in range(count)]
    tenant = [draw(st.integers(0, len(who) - 1)) for _ in range(count)]
    workload = Workload(arrival_s, prompt, output, tenant, who)
    if not draw(st.booleans()):
        return workload
    # a few conversations whose turns share their beginning
    size = draw(st.sampled_from([16, 64]))
    ids, offsets = [], [0]
    for tokens in prompt:
        conversation = draw(st.integers(0, 3))
        shared = draw(st.integers(0, 40))
        full = -(-tokens // size)
        ids += [conversation * 1000 + k if k < shared else 10_000 + len(ids) + k for k in range(full)]
        offsets.append(len(ids))
    return replace(
        workload, prefix_block_tokens=size, prefix_offsets=np.array(offsets), prefix_ids=np.array(ids)
    )


ACTIONS = st.builds(
    ServeAction,
    batch_cap=st.sampled_from([1, 2, 5, 64, 512]),
    kv_budget_fraction=st.sampled_from([0.1, 0.4, 0.75, 1.0]),
    speculation_depth=st.sampled_from([0, 0, 0, 1, 3, 8]),
    quantization_tier=st.sampled_from(list(QuantizationTier)),
    prefill_decode_split=st.booleans(),
    priority_routing=st.booleans(),
    admission_rate=st.sampled_from([None, None, 0.3, 4.0, 50.0]),
)


def twin_action(action):
    return {
        "batch_cap": action.batch_cap,
        "fraction": action.kv_budget_fraction,
        "depth": action.speculation_depth,
        "priority": action.priority_routing,
        "rate": action.admission_rate,
        "tier": TIERS.index(action.quantization_tier.value),
        "split": action.prefill_decode_split,
    }


def twin_of(batch, workload, action, engines, budget, **limits):
    """The twin of a cell that has not served yet."""
    cell = batch.cells[0]
    requests = []
    for i in range(len(workload)):
        per_id = workload.prefix_block_tokens // 16
        low, high = (workload.prefix_offsets[i : i + 2]) if per_id else (0, 0)
        keys = [int(k) * per_id + j for k in workload.prefix_ids[low:high] for j in range(per_id)]
        requests.append(
            Request(
                i,
                int(batch.requests["arrival_ps"][i]),
                int(workload.prompt_tokens[i]),
                int(workload.output_tokens[i]),
                int(workload.tenant[i]),
                keys[: int(workload.prompt_tokens[i]) // 16],
            )
        )
    start = twin_action(action)
    if engines == 1:
        start["split"] = False
    return Cell(
        requests,
        plain_tenants(workload.tenants),
        Tables(batch.profile),
        engines=engines,
        prefill_engines=int(cell["prefill_engines"]),
        budget=budget,
        prefix_cache=bool(cell["prefix_cache"]),
        action=start,
        transfer=(int(cell["transfer_latency_ps"]), int(cell["transfer_ps_per_token"])),
        draft=(float(cell["draft_layers"]), float(cell["draft_head"])),
        restart_ps=int(cell["restart_ps"]),
        load_ps=[int(x) for x in cell["load_ps"]],
        burst_ps=int(cell["burst_ps"]),
        synchronous=bool(batch.engines["synchronous"][0, 0]),
        **limits,
    )


def check_equal(batch, twin):
    outcomes = batch.outcomes
    for r, o in zip(twin.requests, outcomes, strict=True):
        status = STATUS_NAMES[o["status"]]
        mine = (r.index, r.first_ps, r.preemptions, r.retries, r.status)
        assert mine == (r.index, int(o["first_ps"]), int(o["preemptions"]), int(o["retries"]), status)
        if status in ("completed", "failed", "cancelled"):
            assert (r.index, r.finish_ps, r.worst_gap_ps) == (
                r.index,
                int(o["finish_ps"]),
                int(o["worst_gap_ps"]),
            )


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(
    workload=workloads(),
    actions=st.lists(ACTIONS, min_size=1, max_size=5),
    window_s=st.sampled_from([0.01, 0.3, 2.0, 60.0]),
    blocks=st.sampled_from([110, 130, 200, 1000]),
    engines=st.sampled_from([1, 1, 1, 2, 3]),
    prefix_cache=st.booleans(),
    budget=st.sampled_from([512, 2048]),
    longest=st.sampled_from([131_072, 131_072, 70, 900]),
    sequences=st.sampled_from([None, None, None, 2, 500]),
)
def test_kernel_equals_twin(
    workload, actions, window_s, blocks, engines, prefix_cache, budget, longest, sequences
):
    cell = {
        "engines": engines,
        "max_num_batched_tokens": budget,
        "prefix_cache": prefix_cache,
        "action": actions[0],
        "max_model_len": longest,
        "max_num_seqs": sequences,
    }
    batch = SimulatorBatch(small(blocks), [workload], **cell)
    batch.cells["restart_ps"] = PS_PER_S // 2
    batch.cells["load_ps"] = PS_PER_S // 3
    twin = twin_of(batch, workload, actions[0], engines, budget, longest=longest, sequences=sequences)
    totals = {}
    now_ps = 0
    for k, action in enumerate([*actions, actions[-1]]):
        last = k == len(actions)
        until_ps = NEVER_PS if last else now_ps + round(window_s * PS_PER_S)
        record = batch.serve_each([action], math.inf if last else window_s)[0]
        act = twin_action(action)
        act["split"] &= engines > 1
        twin.serve(act, now_ps, until_ps)
        now_ps = until_ps
        for name in (
            "arrived",
            "completed",
            "failed",
            "cancelled",
            "preemptions",
            "iterations",
            "prefill_tokens",
            "cached_tokens",
            "evictions",
            "refused",
            "retries",
            "timeouts",
        ):
            totals[name] = totals.get(name, 0) + getattr(record, name)
        over = totals["completed"] + totals["failed"] + totals["cancelled"]
        assert totals["arrived"] == over + record.in_flight
    note(f"{totals}")
    check_equal(batch, twin)
    assert totals == {name: twin.count[name] for name in totals}


@pytest.mark.parametrize("blocks", [110, 400])
def test_kernel_equals_twin_under_load(blocks):
    rng = np.random.default_rng(blocks)
    n = 300
    workload = Workload(
        np.cumsum(rng.exponential(0.05, n)), rng.integers(1, 900, n), rng.integers(1, 400, n), np.zeros(n)
    )
    action = ServeAction()
    batch = SimulatorBatch(small(blocks), [workload])
    twin = twin_of(batch, workload, action, 1, PROFILE.engine.max_num_batched_tokens)
    batch.serve_each([action], math.inf)
    twin.serve(twin_action(action), 0, NEVER_PS)
    check_equal(batch, twin)
    assert twin.count["preemptions"] > 10
