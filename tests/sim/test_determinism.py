"""The same inputs give the same bytes: again, batched, threaded, in another process, in other windows."""

from __future__ import annotations

import hashlib
import math
import multiprocessing
from dataclasses import replace

import numpy as np
import pytest

from llmserve_env.errors import InputError
from llmserve_env.schema import ServeAction
from llmserve_env.sim.simulator import SimulatorBatch
from llmserve_env.sim.state import NEVER_PS, PS_PER_S
from llmserve_env.workloads.workload import Tenant

from .cells import PROFILE, random_action, random_episode, random_workload, requests, small

SUMS = (
    "iterations", "output_tokens", "prefill_tokens", "cached_tokens", "evictions", "busy_ps", "preemptions",
    "failed", "transfers", "ttft_ps", "drafted_tokens", "accepted_tokens",
)  # fmt: skip
RESULT = ["first_ps", "finish_ps", "generated", "preemptions", "status"]


def digest(seed):
    """Of all that an episode leaves behind."""
    batch, windows = random_episode(seed)
    state = hashlib.sha256()
    for action, window_s in windows:
        batch.serve_each([action], window_s)
        state.update(batch.windows.tobytes() + batch.sums.tobytes())
    state.update(batch.outcomes.tobytes())
    state.update(batch.engines.tobytes() + batch.slots.tobytes())
    return state.hexdigest()


def digests(seeds):
    return [digest(seed) for seed in seeds]


def test_the_same_inputs_give_the_same_bytes():
    assert digests(range(3000, 3030)) == digests(range(3000, 3030))


def test_another_process_gives_the_same_bytes():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(digests, (range(3000, 3010),)) == digests(range(3000, 3010))


def several(seed, episodes, shared, engines, threads=1):
    """A batch of different workloads of the same tenants, and windows of one action for each."""
    rng = np.random.default_rng(seed)
    tenants = (Tenant("a", patience_s=2.0), Tenant("b", priority=1, speculation_class="math"))
    sizes = rng.integers(5, 60, episodes)
    workloads = [random_workload(rng, int(n), tenants, shared=shared) for n in sizes]
    if shared:  # the blocks of a batch have one size
        workloads = [w for w in workloads if w.prefix_block_tokens == workloads[0].prefix_block_tokens]
    actions = [[random_action(rng) for _ in workloads] for _ in range(5)]

    def cells(workloads, threads=1):
        batch = SimulatorBatch(small(200), workloads, engines=engines, threads=threads)
        batch.cells["restart_ps"] = batch.cells["load_ps"] = PS_PER_S // 2
        return batch

    return cells, workloads, [*((row, 0.7) for row in actions), (actions[-1], math.inf)]


@pytest.mark.parametrize("engines", [1, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_a_batch_is_its_episodes(shared, engines):
    cells, workloads, windows = several(engines, 12, shared, engines)
    together, alone = cells(workloads), [cells([workload]) for workload in workloads]
    for actions, window_s in windows:
        records = together.serve_each(actions, window_s)
        for episode, simulator in enumerate(alone):
            record = simulator.serve_each([actions[episode]], window_s)[0]
            assert repr(records[episode]) == repr(record)
            assert together.sums[episode].tobytes() == simulator.sums[0].tobytes()
    for episode, simulator in enumerate(alone):
        low, high = together._first[episode : episode + 2]
        for name in RESULT:
            assert together.outcomes[name][low:high].tolist() == simulator.outcomes[name].tolist()


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_change_nothing(threads):
    for shared in (False, True):
        cells, workloads, windows = several(7, 16, shared, 2)
        serial, threaded = cells(workloads), cells(workloads, threads=threads)
        for actions, window_s in windows:
            serial.serve_each(actions, window_s)
            threaded.serve_each(actions, window_s)
            for name in ("windows", "sums", "engines", "outcomes", "cells"):
                assert getattr(serial, name).tobytes() == getattr(threaded, name).tobytes()


def partitioned(seed, parts):
    """Outcomes and summed counts of one episode under one action, cut into windows of these lengths."""
    rng = np.random.default_rng(seed)
    tenants = (Tenant("a"), Tenant("b", priority=1, speculation_class="math"))
    patient = int(rng.integers(0, 2))
    engines = int(rng.choice([1, 2, 3]))
    if not patient and engines == 1:
        tenants = tuple(replace(tenant, patience_s=0.5) for tenant in tenants)
    workload = random_workload(rng, 60, tenants, shared=bool(rng.integers(0, 2)))
    action = random_action(rng)
    cell = {"engines": engines, "prefix_cache": bool(rng.integers(0, 2)), "action": action}
    batch = SimulatorBatch(small(int(rng.choice([120, 200, 1000]))), [workload], **cell)
    totals = {}
    for window_s in (*parts, math.inf):
        batch.serve_each([action], window_s)
        for name in SUMS:
            records = batch.sums if name in batch.sums.dtype.names else batch.windows
            totals[name] = totals.get(name, 0) + int(records[name][0])
        gaps = totals.setdefault("gaps", np.zeros_like(batch.sums["gap_histogram"][0]))
        gaps += batch.sums["gap_histogram"][0]
    totals["gaps"] = totals["gaps"].tolist()
    return {name: batch.outcomes[name].tolist() for name in RESULT}, totals


@pytest.mark.parametrize("parts", [[0.01] * 300, [0.3, 0.0501, 1.7, 2.0]], ids=["fine", "coarse"])
def test_windows_do_not_change_what_happens(parts):
    for seed in range(60):
        assert partitioned(seed, parts) == partitioned(seed, []), seed


def test_expired_requests_do_not_count_as_load_wherever_windows_end():
    """Clients that have given up are no load to the router, seen at a window's end or not."""
    hasty = (Tenant("hasty", patience_s=0.2), Tenant("patient"))
    for seed in range(30):
        rng = np.random.default_rng(seed)
        n = 60
        workload = requests(np.cumsum(rng.choice([0.0, 0.05, 0.3], n)), rng.integers(1, 1000, n),
                            rng.integers(1, 100, n), rng.integers(0, 2, n), hasty)  # fmt: skip
        action = ServeAction(batch_cap=2)
        results = []
        for parts in ([], [0.05] * 200):
            batch = SimulatorBatch(PROFILE, [workload], engines=3)
            for window_s in (*parts, math.inf):
                batch.serve_each([action], window_s)
            results.append([batch.outcomes[name].tolist() for name in RESULT])
        assert results[0] == results[1], seed


def test_bad_windows_and_batches_are_refused():
    batch = SimulatorBatch(PROFILE, [requests([0], 1, 1)])
    for window_s in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="window_s"):
            batch.serve_each([ServeAction()], window_s)
    with pytest.raises(InputError, match="actions"):
        batch.serve_each([], 1.0)
    with pytest.raises(InputError, match="tenants"):
        SimulatorBatch(PROFILE, [requests([0], 1, 1), requests([0], 1, 1, tenants=(Tenant("other"),))])
    assert batch.serve_each([ServeAction()], math.inf)[0].completed == 1
    assert batch.engines["next_ps"][0, 0] <= NEVER_PS
