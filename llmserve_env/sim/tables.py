"""What the kernel is given: a profile, tenants and prompts as tables and records, and engines that idle."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from llmserve_env.backend import MAX_TENANTS, WINDOW
from llmserve_env.errors import InputError
from llmserve_env.hardware.constants import constants
from llmserve_env.hardware.latency import compile_latency
from llmserve_env.hardware.memory import kv_blocks
from llmserve_env.hardware.profile import TIERS, Profile
from llmserve_env.sim.state import (
    ACCEPT_ONE,
    BLOCK_TOKENS,
    ENGINE,
    MAX_CLASSES,
    MAX_RUNNING,
    NEVER_PS,
    NODE,
    PLACE,
    PS_PER_S,
    SEGMENT,
    SLOTS,
    TENANT,
    Cost,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from numpy.typing import NDArray

    from llmserve_env.workloads.workload import Workload

_SMALL_ID = 1 << 40


def to_ps(time_s: NDArray[np.float64]) -> NDArray[np.int64]:
    """Seconds in picoseconds, at most NEVER_PS."""
    ps: NDArray[np.int64] = np.rint(np.minimum(time_s * PS_PER_S, NEVER_PS)).astype(np.int64)
    return np.minimum(ps, NEVER_PS)


def idle_engines(episodes: int, count: int, budget: int) -> NDArray[np.void]:
    """ENGINE[episodes, count], in which nothing runs; `budget` is the tokens of an iteration."""
    engines = np.zeros((episodes, count), ENGINE)
    engines["next_ps"] = NEVER_PS
    engines["leave_ps"] = NEVER_PS
    engines["token_budget"] = budget
    engines["slots_free"] = MAX_RUNNING
    for name in ("run_head", "run_tail", "partial", "limbo_head", "resumed_head", "fresh_head", "fresh_tail"):
        engines[name] = -1
    return engines


@cache
def empty_slots() -> NDArray[np.void]:
    """SLOTS[1] of an engine in which nothing runs."""
    slots = np.zeros(1, SLOTS)
    slots["free_slot"] = np.arange(MAX_RUNNING - 1, -1, -1)
    return slots


def tenant_rows(workload: Workload) -> tuple[NDArray[np.void], NDArray[np.int64], tuple[int, bool]]:
    """A workload's tenants as records, and how they speculate.

    Returns:
        TENANT[tenant]; int64[class, depth], tokens a step; how many decoder layers a draft token runs, and
        whether the LM head.
    """
    tenants = workload.tenants
    if len(tenants) > MAX_TENANTS:
        raise InputError(f"expected at most {MAX_TENANTS}, found {len(tenants)}", field="tenants")
    classes = sorted({tenant.speculation_class for tenant in tenants})
    known = constants().speculation
    for name in classes:
        if name not in known:
            raise InputError(f"expected one of {', '.join(known)}, found '{name}'", field="speculation_class")
    if len(classes) > MAX_CLASSES:
        raise InputError(
            f"expected at most {MAX_CLASSES} classes, found {classes}", field="speculation_class"
        )
    accept = np.array([known[name].tokens_per_step for name in classes])
    ranks = sorted({tenant.priority for tenant in tenants})
    drafting = max((known[name].draft_layers, known[name].draft_head) for name in classes)
    rows = np.zeros(len(tenants), TENANT)
    rows["patience_ps"] = to_ps(np.array([min(tenant.patience_s, tenant.deadline_s) for tenant in tenants]))
    rows["deadline_ps"] = to_ps(np.array([tenant.deadline_s for tenant in tenants]))
    rows["retries"] = [tenant.retries for tenant in tenants]
    rows["retry_after_ps"] = to_ps(np.array([tenant.retry_after_s for tenant in tenants]))
    rows["rank"] = [ranks.index(tenant.priority) for tenant in tenants]
    rows["speculation_class"] = [classes.index(tenant.speculation_class) for tenant in tenants]
    rows["ttft_slo_ps"] = to_ps(np.array([tenant.ttft_slo_s for tenant in tenants]))
    rows["tpot_slo_ps"] = to_ps(np.array([tenant.tpot_slo_s for tenant in tenants]))
    return rows, np.rint(accept * ACCEPT_ONE).astype(np.int64), drafting


def shortest_wait_ps(tenants: NDArray[np.void]) -> int:
    """The shortest wait of clients who give up and try again, NEVER_PS without any (ps)."""
    come_back = (tenants["retries"] > 0) & (tenants["patience_ps"] < NEVER_PS)
    return int(tenants["retry_after_ps"][come_back].min(initial=NEVER_PS))


@lru_cache(maxsize=32)
def cost_of(profile: Profile) -> Cost:
    """A profile's latency tables in integer picoseconds; decode attention as base and slope per segment."""
    arrays = compile_latency(profile)
    decode = np.maximum.accumulate(np.rint(arrays.decode_s * PS_PER_S), axis=-1).astype(np.int64)
    knots = arrays.decode_kv.astype(np.int64)
    slope = np.zeros_like(decode)
    slope[..., :-1] = np.rint(np.diff(decode, axis=-1) / np.diff(knots)).astype(np.int64)
    slope[..., -1] = slope[..., -2]
    return Cost(
        dense_ps=np.rint(arrays.dense_s * PS_PER_S).astype(np.int64),
        head_ps=np.rint(arrays.head_s * PS_PER_S).astype(np.int64),
        decode_kv=knots,
        decode_ps=decode,
        decode_slope=slope,
        prefill_chunk=arrays.prefill_chunk,
        prefill_kv=arrays.prefill_kv,
        prefill_ps=arrays.prefill_s * PS_PER_S,
        mixed_chunk=arrays.mixed_chunk,
        mixed_kv=arrays.mixed_kv,
        mixed_ps=arrays.mixed_s * PS_PER_S,
        mixed_skew=float(arrays.mixed_skew),
        blocks=np.array(
            [kv_blocks(profile, name if name in profile.tier_names else "FP16") for name in TIERS]
        ),
    )


def prefix_tokens_of(workloads: Sequence[Workload]) -> int:
    """Tokens in a prefix block of the workloads, 0 if no prompts share any."""
    tokens = workloads[0].prefix_block_tokens
    if tokens % BLOCK_TOKENS:
        raise InputError(
            f"prefix blocks of {tokens} tokens: expected a multiple of {BLOCK_TOKENS}, vLLM's own. "
            "block_tokens=N in a trace's address says another size",
            file=workloads[0].source or None,
            field="prefix_block_tokens",
        )
    return tokens


def small_ids(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Small numbers for prefix ids: any integer may name a block; the kernel's keys are multiples of them."""
    if len(ids) == 0 or (ids.min() >= 0 and ids.max() < _SMALL_ID):
        return ids
    return np.unique(ids, return_inverse=True)[1].astype(np.int64)


def block_records(
    engines: int, cost: Cost, shared: bool
) -> tuple[NDArray[np.void], NDArray[np.void], NDArray[np.void]]:
    """SEGMENT, NODE, PLACE[row, n]: the free queue; where prompts share prefixes, a node for each block."""
    blocks = int(cost.blocks.max())
    ring = 1 << (2 * blocks + 4096).bit_length() if shared else 4096
    table = 1 << (3 * blocks // 2).bit_length() if shared else 1  # at most two thirds full
    return (
        np.zeros((engines, ring), SEGMENT),
        np.zeros((engines, blocks if shared else 0), NODE),
        np.zeros((engines, table), PLACE),
    )


def idle_window(cell: Any, engines: int) -> NDArray[np.void]:
    """WINDOW of a cell in which nothing has happened yet, as its record CELL says."""
    window: Any = np.zeros(1, WINDOW)[0]
    for name in ("mean_ttft_s", "p50_ttft_s", "p99_ttft_s", "p50_gap_s", "p99_gap_s"):
        window[name] = np.nan
    window["engines_up"] = engines
    window["engines_tier"][cell["tier"]] = engines
    window["engines_split"] = engines * cell["split"]
    window["gpu_memory_gb"] = engines * cell["weight_bytes"][cell["tier"]] / 1e9
    found: NDArray[np.void] = window
    return found


def set_switching(cells: NDArray[np.void], profile: Profile) -> None:
    """Set in CELL[n] what a change of precision takes."""
    shared = constants()
    cells["restart_ps"] = round(shared.switching.restart_s * PS_PER_S)
    for index, name in enumerate(TIERS):
        tier = profile.tier(name)
        if tier is not None:
            load_s = tier.weight_bytes / (shared.switching.weight_load_gb_per_s * 1e9)
            cells["load_ps"][:, index] = round(load_s * PS_PER_S)
            cells["weight_bytes"][:, index] = tier.weight_bytes
            cells["has_tier"][:, index] = True


def set_link(cells: NDArray[np.void], profile: Profile, engines: int) -> str:
    """Set in CELL[n] what a KV transfer takes; returns why a cell cannot split, "" if it can."""
    if engines == 1:
        return "a cell of one engine cannot be split"
    gpu = profile.gpu
    try:
        link = constants().kv_link(gpu.name)
    except InputError as error:
        return str(error)
    latency_s = link.duration_s(0)
    token_s = link.duration_s(profile.model.kv_bytes_per_token, gpu.count) - latency_s
    cells["transfer_latency_ps"] = round(latency_s * PS_PER_S)
    cells["transfer_ps_per_token"] = round(token_s * PS_PER_S)
    return ""
