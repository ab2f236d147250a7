"""Cells, workloads and actions that the tests of the simulator draw from seeds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from llmserve_env.hardware import load_profile
from llmserve_env.schema import QuantizationTier, ServeAction
from llmserve_env.sim.simulator import SimulatorBatch
from llmserve_env.sim.state import PS_PER_S
from llmserve_env.workloads.workload import Tenant, Workload

PROFILE = load_profile("rtx4090-llama-3.1-8b")
COUNTS = (
    "arrived", "completed", "failed", "cancelled", "preemptions", "prefill_tokens", "cached_tokens",
    "output_tokens", "iterations", "evictions", "drafted_tokens", "accepted_tokens", "transfers",
)  # fmt: skip
ANYONE = (Tenant(),)


def small(blocks, profile=PROFILE):
    """The profile with so little memory that its FP16 engine has `blocks` KV blocks."""
    need = profile.tier("FP16").weight_bytes + (blocks + 1) * profile.model.kv_bytes_per_token * 16
    memory = (
        math.ceil((need + profile.engine.reserved_bytes_per_gpu) / profile.engine.gpu_memory_utilization) + 1
    )
    engine = profile.engine.model_copy(update={"kv_blocks": None})
    gpu = profile.gpu.model_copy(update={"memory_bytes": memory})
    return profile.model_copy(update={"engine": engine, "gpu": gpu})


def requests(arrival_s, prompt, output, tenant=0, tenants=ANYONE):
    """A workload from arrival times and, for each request or for all, tokens and tenant."""
    n = len(arrival_s)
    return Workload(np.asarray(arrival_s, float), np.zeros(n) + prompt, np.zeros(n) + output,
                    np.zeros(n) + tenant, tenants)  # fmt: skip


def impatient(rng, tenants):
    """The tenants with clients who, some of them, wait for the whole answer only so long and try again."""
    return tuple(
        replace(
            tenant,
            deadline_s=float(rng.choice([math.inf, 0.1, 0.7, 4.0])),
            retries=int(rng.choice([0, 1, 3, 7])),
            retry_after_s=float(rng.choice([0.001, 0.05, 0.5])),
        )
        for tenant in tenants
    )


def random_tenants(rng):
    return tuple(
        Tenant(
            name=str(i),
            patience_s=float(rng.choice([math.inf, 0.05, 0.5, 3.0])),
            priority=int(rng.integers(0, 3)),
            speculation_class=str(rng.choice(["chat", "math", "ngram"])),
        )
        for i in range(rng.integers(1, 4))
    )


def random_workload(rng, count, tenants, longest=1500, shared=False):
    """Bursty arrivals of prompts and answers of mixed lengths; `shared`: turns of a few conversations."""
    arrival_s = np.cumsum(rng.choice([0.0, 0.0, 1e-6, 0.003, 0.02, 0.2, 1.0], count))
    brief = rng.random(count) < 0.5
    prompt = np.where(brief, rng.integers(1, 65, count), rng.integers(1, longest + 1, count))
    output = np.where(rng.random(count) < 0.3, rng.integers(1, 6, count), rng.integers(1, 121, count))
    workload = Workload(arrival_s, prompt, output, rng.integers(0, len(tenants), count), tenants)
    if not shared:
        return workload
    size = int(rng.choice([16, 64]))
    ids, offsets = [], [0]
    for tokens in prompt:
        conversation, common = int(rng.integers(0, 4)), int(rng.integers(0, 41))
        ids += [
            conversation * 1000 + k if k < common else 10_000 + len(ids) + k
            for k in range(-(-tokens // size))
        ]
        offsets.append(len(ids))
    return replace(
        workload, prefix_block_tokens=size, prefix_offsets=np.array(offsets), prefix_ids=np.array(ids)
    )


def random_action(rng, tiers=tuple(QuantizationTier)):
    return ServeAction(
        batch_cap=int(rng.choice([1, 2, 5, 64, 512])),
        kv_budget_fraction=float(rng.choice([0.1, 0.4, 0.75, 1.0, 1.0])),
        speculation_depth=int(rng.choice([0, 0, 0, 1, 3, 8])),
        quantization_tier=tiers[rng.integers(0, len(tiers))],
        prefill_decode_split=bool(rng.integers(0, 2)),
        priority_routing=bool(rng.integers(0, 2)),
    )


class Episode(NamedTuple):
    """A cell and what to do to it: (action, window in s), the last one until nothing is left."""

    batch: SimulatorBatch
    windows: list


def random_episode(seed, *, retries=False, **fixed):
    """A small cell with quick switches under a random workload and random actions.

    With `retries` clients have deadlines and come back, and actions bound the rate of admission.
    """
    rng = np.random.default_rng(seed)
    tenants = random_tenants(rng)
    if retries:
        tenants = impatient(rng, tenants)
    shared, engines = bool(rng.integers(0, 2)), int(rng.choice([1, 1, 2, 3]))
    workload = random_workload(rng, int(rng.integers(20, 80)), tenants, longest=2000, shared=shared)
    actions = [random_action(rng) for _ in range(rng.integers(2, 7))]
    if retries:
        rates = [rng.choice([None, None, 0.3, 4.0, 50.0]) for _ in actions]
        actions = [
            action.model_copy(update={"admission_rate": rate})
            for action, rate in zip(actions, rates, strict=True)
        ]
    window_s = float(rng.choice([0.05, 0.3, 1.0, 2.0]))
    cell = {
        "engines": engines,
        "prefix_cache": bool(rng.random() < 0.7),
        "max_num_batched_tokens": int(rng.choice([512, 2048])),
        "action": actions[0],
        **fixed,
    }
    batch = SimulatorBatch(small(int(rng.choice([110, 130, 200, 1000]))), [workload], **cell)
    batch.cells["restart_ps"] = PS_PER_S // 2
    batch.cells["load_ps"] = PS_PER_S // 3
    actions = [action for action in actions for _ in range(rng.integers(1, 4))]
    return Episode(batch, [*((action, window_s) for action in actions), (actions[-1], math.inf)])
