"""A batch of cells whose episodes begin, wait and end apart: each is as if alone, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sim.cells import random_action, random_workload, small
from sim.invariants import check

from llmserve_env.controls import to_array
from llmserve_env.errors import InputError
from llmserve_env.hardware import load_profile
from llmserve_env.schema import ServeAction
from llmserve_env.sim.simulator import SimulatorBatch
from llmserve_env.sim.state import PS_PER_S
from llmserve_env.workloads.workload import Tenant

PARTS = ("windows", "sums")
OUTCOME = ["first_ps", "finish_ps", "worst_gap_ps", "generated", "preemptions", "status"]
TENANTS = (Tenant("a", patience_s=2.0), Tenant("b", priority=1, speculation_class="math"))
PROFILE = small(200)


def workload(seed, count, shared):
    """Blocks of 64 tokens where prompts share any: those of a batch have one size."""
    rng = np.random.default_rng(seed)
    while True:
        found = random_workload(rng, count, TENANTS, shared=shared)
        if not shared or found.prefix_block_tokens == 64:
            return found


def cells(workloads, engines=1, **arguments):
    batch = SimulatorBatch(PROFILE, workloads, engines=engines, **arguments)
    batch.cells["restart_ps"] = batch.cells["load_ps"] = PS_PER_S // 2
    return batch


def state(batch, episode):
    """Everything that can be seen of an episode, as bytes."""
    low = batch._first[episode]
    outcomes = batch.outcomes[low : low + batch.cells["requests"][episode]]
    engines = batch.engines[episode].copy()
    slots = batch.slots[engines["row"]]
    engines["row"] = 0  # which place of a batch it has is not seen
    return [
        *(getattr(batch, name)[episode].tobytes() for name in PARTS),
        engines.tobytes(),
        slots.tobytes(),
        [np.ascontiguousarray(outcomes[name]).tobytes() for name in OUTCOME],
        batch.cells[episode].tobytes(),
        float(batch.now_s[episode]),
    ]


def actions(rng, count):
    return to_array([random_action(rng) for _ in range(count)])


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
@pytest.mark.parametrize("engines", [1, 3])
@pytest.mark.parametrize("sizes", [(40, 30, 60, 50), (40, 20, 200, 500)], ids=["within", "beyond"])
def test_an_episode_that_is_reset_midway_is_a_fresh_one(sizes, engines, shared):
    """`sizes`: requests of the first workloads, then of each reset; beyond them all, the slabs grow."""
    rng = np.random.default_rng(8)
    first = [workload(k, sizes[0] + k, shared) for k in range(4)]
    batch = cells(first, engines)
    alone = [cells([each], engines) for each in first]
    place = 1
    for seed, size in enumerate(sizes):
        for _ in range(4):
            given = actions(rng, 4)
            batch.serve(given, 0.7)
            for k, single in enumerate(alone):
                single.serve(given[k : k + 1], 0.7)
                assert state(batch, k) == state(single, 0), k
                check(single)
        # one begins anew, the others are in the middle of theirs
        following = workload(100 + seed, size, shared)
        before = [state(batch, k) for k in range(4)]
        batch.reset(place, following)
        alone[place] = cells([following], engines)
        for k in range(4):
            if k != place:
                assert state(batch, k) == before[k]
        assert batch.windows[place].tobytes() == alone[place].windows[0].tobytes()
        place = (place + 1) % 4
    for k, single in enumerate(alone):
        assert repr(batch.outcomes_of(k)) == repr(single.outcomes_of(0))


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
@pytest.mark.parametrize("engines", [1, 3])
def test_every_episode_can_be_reset_again_and_again(engines, shared):
    rng = np.random.default_rng(3)
    batch = cells([workload(k, 10, shared) for k in range(3)], engines)
    for round_ in range(4):
        following = [workload(50 * round_ + k, int(rng.integers(1, 120)), shared) for k in range(3)]
        for k in rng.permutation(3):
            batch.reset(int(k), following[k])
        fresh = cells(following, engines)
        for _ in range(5):
            given = actions(rng, 3)
            batch.serve(given, 0.5)
            fresh.serve(given, 0.5)
            assert [state(batch, k) for k in range(3)] == [state(fresh, k) for k in range(3)]


def test_an_empty_workload_is_an_episode_too():
    one = workload(1, 20, False)
    empty = one.take(np.zeros(0, np.int64))
    batch = cells([one, empty])
    batch.serve(to_array([ServeAction()] * 2), 1.0)
    assert batch.windows["arrived"][1] == 0
    batch.reset(1, one)
    batch.reset(0, empty)
    batch.serve(to_array([ServeAction()] * 2), 1.0)
    assert batch.windows["arrived"].tolist()[0] == 0
    single = cells([one])
    single.serve(to_array([ServeAction()]), 1.0)
    assert state(batch, 1) == state(single, 0)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
@pytest.mark.parametrize("engines", [1, 3])
def test_skipped_episodes_stay_as_they_are(engines, shared, threads):
    rng = np.random.default_rng(21)
    workloads = [workload(k, 60, shared) for k in range(5)]
    batch = cells(workloads, engines, threads=threads)
    alone = [cells([each], engines) for each in workloads]
    for step in range(16):
        which = rng.random(5) < 0.5 if step else np.array([False, True, False, True, True])
        given = actions(rng, 5)
        before = [state(batch, k) for k in range(5)]
        batch.serve(given, 0.6, which)
        for k in range(5):
            if which[k]:
                alone[k].serve(given[k : k + 1], 0.6)
                assert state(batch, k) == state(alone[k], 0)
            else:
                assert state(batch, k) == before[k]


def test_episodes_of_other_kinds_are_refused():
    batch = cells([workload(1, 20, True)])
    with pytest.raises(InputError, match="block size"):
        batch.reset(0, workload(1, 20, False))
    with pytest.raises(InputError, match="same tenants"):
        batch.reset(0, replace(workload(1, 20, True), tenants=(Tenant("c"), Tenant("d"))))


# What a window's record says, computed again from what became of each request


def test_engines_change_one_at_a_time_and_the_gauges_show_it():
    """FP16 to INT8: as each loads it counts as down and as INT8; then the same for a split."""
    profile = load_profile("rtxpro6000-llama-3.1-8b")
    batch = SimulatorBatch(profile, [workload(1, 20, False)], engines=3, prefill_engines=2)
    to_int8 = ServeAction(quantization_tier="INT8")
    split = ServeAction(quantization_tier="INT8", prefill_decode_split=True)
    start = batch.windows[0]
    assert (start["engines_up"], start["engines_tier"].tolist(), start["engines_split"]) == (3, [3, 0, 0], 0)
    memory = start["gpu_memory_gb"]
    for action, column in ((to_int8, "tier"), (split, "split")):
        changed, up, held = [], [], 0
        for _ in range(400):
            window = batch.serve_each([action], 0.5)[0]
            changed.append(int(window.engines_tier[1]) if column == "tier" else window.engines_split)
            up.append(window.engines_up)
            assert window.engines_tier.sum() == 3
            assert window.engines_tier[2] == 0
            held = max(held, changed[-1])
            if changed[-1] == 3 and up[-1] == 3:
                break
        assert changed == sorted(changed)
        assert set(changed) >= {1, 2, 3}
        assert set(up) == {2, 3}, "one engine at a time"
    assert batch.windows["gpu_memory_gb"][0] < memory, "smaller weights"
