"""The simulated backend: a cell of engines that serves a workload window by window."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from llmserve_env.backend import WindowRecord
from llmserve_env.errors import InputError
from llmserve_env.hardware.constants import constants
from llmserve_env.hardware.latency import MAX_TOKENS, compile_latency
from llmserve_env.hardware.memory import kv_blocks
from llmserve_env.hardware.profile import TIERS, Profile
from llmserve_env.schema import ServeAction
from llmserve_env.sim import kernel
from llmserve_env.sim.state import (
    ACCEPT_ONE,
    BLOCK_TOKENS,
    CELL,
    COLOCATED,
    COUNTERS,
    DECODE,
    ENGINE,
    FAILED,
    MAX_BLOCKS,
    MAX_CLASSES,
    MAX_RUNNING,
    MAX_TENANTS,
    NEVER_PS,
    OUTCOME,
    PREFILL,
    PS_PER_S,
    REQUEST,
    RUNNING,
    STATUS_NAMES,
    TRANSFER,
    WAITING,
    Cost,
    Pool,
    Prefixes,
    Tenants,
    Transfers,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from numpy.typing import NDArray

    from llmserve_env.workloads.workload import Workload


_LONGEST_S = 4e6
"""Last arrival that leaves room to serve out before NEVER_PS."""


@dataclass(frozen=True)
class Outcomes:
    """What became of every request, in order of arrival.

    Attributes:
        arrival_s: float64[n] (s).
        ttft_s: float64[n], from arrival to first token (s; nan without one).
        tpot_s: float64[n], mean time between output tokens (s; nan with fewer than two).
        worst_gap_s: float64[n], longest time between two of its tokens (s; nan with fewer than two).
        e2e_s: float64[n], from arrival to last token (s; nan if not completed).
        finish_s: float64[n], time of the last token, or of failing (s; nan while in flight).
        preemptions: uint16[n].
        status_code: int8[n], index into sim.state.STATUS_NAMES.
    """

    arrival_s: NDArray[np.float64]
    ttft_s: NDArray[np.float64]
    tpot_s: NDArray[np.float64]
    worst_gap_s: NDArray[np.float64]
    e2e_s: NDArray[np.float64]
    finish_s: NDArray[np.float64]
    preemptions: NDArray[np.uint16]
    status_code: NDArray[np.int8]

    @property
    def status(self) -> NDArray[np.str_]:
        """str[n], one of sim.state.STATUS_NAMES."""
        return np.array(STATUS_NAMES)[self.status_code]


class SimulatorBatch:
    """Independent episodes on like cells, served together by one call of the kernel.

    Args:
        profile: hardware and model of every engine.
        workloads: one for each episode, with the same tenants.
        engines: engines in each cell.
        prefill_engines: of those, how many prefill when prefill and decode are split (default: half).
        max_num_batched_tokens: token budget of an iteration (default: the profile's); no engine runs more
            sequences than that.
        kv_blocks: KV blocks that the requests of one engine can hold, at any precision (default: what
            `hardware.memory.kv_blocks` says of the profile).
        prefix_cache: whether freed blocks can be found again.
        action: what the cells start with, at no cost.
        parallel: spread the episodes over Numba's threads.

    Raises:
        InputError: something does not fit, with its name.
    """

    def __init__(
        self,
        profile: Profile,
        workloads: Sequence[Workload],
        *,
        engines: int = 1,
        prefill_engines: int | None = None,
        max_num_batched_tokens: int | None = None,
        kv_blocks: int | None = None,
        prefix_cache: bool = True,
        action: ServeAction | None = None,
        parallel: bool = False,
    ) -> None:
        budget = (
            profile.engine.max_num_batched_tokens
            if max_num_batched_tokens is None
            else max_num_batched_tokens
        )
        if not 1 <= budget <= MAX_TOKENS:
            raise InputError(
                f"expected 1..{MAX_TOKENS} tokens, found {budget}", field="max_num_batched_tokens"
            )
        if kv_blocks is not None and not 1 <= kv_blocks <= MAX_BLOCKS:
            raise InputError(f"expected 1..{MAX_BLOCKS}, found {kv_blocks}", field="kv_blocks")
        if not 1 <= engines <= 64:
            raise InputError(f"expected 1..64, found {engines}", field="engines")
        if profile.engine.block_tokens != BLOCK_TOKENS:
            raise InputError(
                f"expected {BLOCK_TOKENS}, found {profile.engine.block_tokens}", field="block_tokens"
            )
        if not workloads:
            raise InputError("expected at least one", field="workloads")
        self.profile = profile
        self.workloads = tuple(workloads)
        self.now_s = 0.0
        self._over = False
        self._parallel = parallel
        self._tenants = self.workloads[0].tenants
        if any(workload.tenants != self._tenants for workload in self.workloads):
            raise InputError("the episodes of a batch need the same tenants", field="workloads")
        self._tenant_arrays, drafting = _tenants(self.workloads[0])
        self._cost = _cost(profile)
        if kv_blocks is not None:
            self._cost = self._cost._replace(blocks=np.full_like(self._cost.blocks, kv_blocks))
        self._first = np.concatenate([[0], np.cumsum([len(workload) for workload in self.workloads])])
        self.requests = _requests(self.workloads)
        self.outcomes = np.zeros(len(self.requests), OUTCOME)
        self.outcomes["next"] = -1
        self.outcomes["segment"] = -1
        self._prefixes = _prefixes(self.workloads) if prefix_cache else _no_prefixes()
        self.engines = _engines(len(self.workloads), engines, budget)
        self.cells = np.zeros(len(self.workloads), CELL)
        self.cells["classes"] = self._tenant_arrays.speculation_class.max() + 1
        self.cells["tenants"] = len(self._tenants)
        self.cells["prefix_cache"] = prefix_cache
        self.cells["most_blocks"] = self._cost.blocks.min()
        self.cells["prefill_engines"] = engines // 2 if prefill_engines is None else prefill_engines
        self.cells["draft_layers"] = drafting[0] * compile_latency(profile).draft_layer_fraction
        self.cells["draft_head"] = drafting[1]
        if engines > 1 and not 1 <= self.cells["prefill_engines"][0] < engines:
            raise InputError(f"expected 1..{engines - 1}, found {prefill_engines}", field="prefill_engines")
        self._set_switching()
        self._pool = _pool(self.engines, self._cost, self._prefixes.per_id > 0)
        transfers = len(self.requests) if engines > 1 else 0
        self._transfers = Transfers(np.zeros(transfers, np.int64), np.zeros(transfers, np.int32))
        self.counters = np.zeros(len(self.workloads), COUNTERS)
        self._start(action or ServeAction())

    def _set_switching(self) -> None:
        shared, profile = constants(), self.profile
        self.cells["restart_ps"] = round(shared.switching.restart_s * PS_PER_S)
        for index, name in enumerate(TIERS):
            tier = profile.tier(name)
            if tier is not None:
                load_s = tier.weight_bytes / (shared.switching.weight_load_gb_per_s * 1e9)
                self.cells["load_ps"][:, index] = round(load_s * PS_PER_S)
        self._no_split = "a cell of one engine cannot be split" if self.engines.shape[1] == 1 else ""
        if self._no_split:
            return
        try:
            link = shared.kv_link(profile.gpu.name)
        except InputError as error:
            self._no_split = str(error)
            return
        latency_s = link.duration_s(0)
        token_s = link.duration_s(profile.model.kv_bytes_per_token, profile.gpu.count) - latency_s
        self.cells["transfer_latency_ps"] = round(latency_s * PS_PER_S)
        self.cells["transfer_ps_per_token"] = round(token_s * PS_PER_S)

    def _start(self, action: ServeAction) -> None:
        """Put every cell in the configuration of an action, at no cost."""
        self._not_applied: list[dict[str, str]] = [{} for _ in self.workloads]
        for episode in range(len(self.workloads)):
            self._apply(episode, action)
        for index in range(self.engines.shape[1]):
            roles = np.where(index < self.cells["prefill_engines"], PREFILL, DECODE)
            self.engines["role"][:, index] = np.where(self.cells["split"], roles, COLOCATED)
        self.engines["tier"] = self.cells["tier"][:, None]
        self.engines["next_role"] = self.engines["role"]
        self.engines["next_tier"] = self.engines["tier"]
        kernel.reset_blocks(self.engines, self._pool, self._cost)

    def _apply(self, episode: int, action: ServeAction) -> None:
        engines, cell, missing = self.engines[episode], self.cells[episode], {}
        budget = int(engines["token_budget"][0])
        engines["batch_cap"] = min(action.batch_cap, budget)
        if action.batch_cap > budget:
            missing["batch_cap"] = f"{budget} tokens an iteration are room for {budget} running sequences"
        engines["kv_fraction"] = action.kv_budget_fraction
        engines["block_cap"] = (action.kv_budget_fraction * engines["blocks"]).astype(np.int64)
        engines["depth"] = action.speculation_depth
        engines["priority"] = action.priority_routing
        tier = action.quantization_tier.value
        if tier in self.profile.tier_names:
            cell["tier"] = TIERS.index(tier)
        else:
            missing["quantization_tier"] = f"profile '{self.profile.name}' has no {tier} weights"
        if action.prefill_decode_split and self._no_split:
            missing["prefill_decode_split"] = self._no_split
        else:
            cell["split"] = action.prefill_decode_split
        self._not_applied[episode] = missing

    def serve(self, actions: Sequence[ServeAction], window_s: float) -> list[WindowRecord]:
        """Apply one action to each episode, serve all for `window_s` seconds (inf: until nothing is left)."""
        if self._over:
            raise InputError("the episodes are over: what was unfinished has failed")
        if not window_s > 0:
            raise InputError(f"expected seconds > 0, found {window_s}", field="window_s")
        if len(actions) != len(self.workloads):
            raise InputError(f"expected {len(self.workloads)}, found {len(actions)}", field="actions")
        for episode, action in enumerate(actions):
            self._apply(episode, action)
        start_s, self.now_s = self.now_s, self.now_s + window_s
        self.counters[:] = 0
        bounds = [np.full(len(actions), _ps(time_s), np.int64) for time_s in (start_s, self.now_s)]
        call = kernel.serve_parallel if self._parallel else kernel.serve
        call(
            self.engines,
            self.counters,
            self.cells,
            self._first,
            self.requests,
            self.outcomes,
            self._tenant_arrays,
            self._pool,
            self._prefixes,
            self._cost,
            self._transfers,
            *bounds,
        )
        return [self._record(episode, start_s) for episode in range(len(actions))]

    def _record(self, episode: int, start_s: float) -> WindowRecord:
        counters, engines = self.counters[episode], self.engines[episode]
        tenants = len(self._tenants)
        # what has ended by the window's end no longer runs, though the engine frees it at its next decision
        over = np.where(engines["limbo_ps"] <= _ps(self.now_s), engines["limbo_count"], 0)
        running = int((engines["running"] - over).sum())
        transfers = int(self.cells[episode]["transfers"])
        waiting = int(engines["waiting"].sum()) + transfers
        busy_ps = max(float(counters["busy_ps"]), 1.0)
        blocks = int(engines["blocks"].sum())
        first_tokens = int(counters["first_tokens"])
        return WindowRecord(
            start_s=start_s,
            end_s=self.now_s,
            arrived=int(counters["arrived"]),
            completed=int(counters["completed"]),
            failed=int(counters["failed"]),
            cancelled=int(counters["cancelled"]),
            in_flight=waiting + int((engines["running"] - engines["limbo_count"]).sum()),
            waiting=waiting,
            running=running,
            kv_occupancy=float(engines["held"].sum()) / blocks,
            preemptions=int(counters["preemptions"]),
            prefill_tokens=int(counters["prefill_tokens"]),
            cached_tokens=int(counters["cached_tokens"]),
            output_tokens=int(counters["output_tokens"]),
            iterations=int(counters["iterations"]),
            busy_s=busy_ps / PS_PER_S,
            mean_running=float(counters["sequence_ps"]) / busy_ps,
            mean_kv_occupancy=float(counters["block_ps"]) / busy_ps,
            evictions=int(counters["evictions"]),
            drafted_tokens=int(counters["draft_steps"]),
            accepted_tokens=int(counters["accepted_tokens"]),
            transfers=int(counters["transfers"]),
            mean_ttft_s=float(counters["ttft_ps"]) / first_tokens / PS_PER_S
            if first_tokens
            else float("nan"),
            ttft_histogram=counters["ttft_histogram"].copy(),
            gap_histogram=counters["gap_histogram"].copy(),
            tenant_arrived=counters["tenant_arrived"][:tenants].copy(),
            tenant_completed=counters["tenant_completed"][:tenants].copy(),
            tenant_failed=counters["tenant_failed"][:tenants].copy(),
            tenant_in_slo=counters["tenant_in_slo"][:tenants].copy(),
            tenant_output_tokens=counters["tenant_output_tokens"][:tenants].copy(),
            not_applied=self._not_applied[episode],
        )

    def fail_unfinished(self) -> int:
        """End the episodes here: what has arrived and is not over fails; returns how many requests did."""
        unfinished = np.isin(self.outcomes["status"], (WAITING, RUNNING, TRANSFER))
        self.outcomes["status"][unfinished] = FAILED
        for episode in range(len(self.workloads)):
            part = slice(self._first[episode], self._first[episode + 1])
            # served out: the end is when the last engine stopped
            end_ps = min(_ps(self.now_s), NEVER_PS - 1)
            if self.now_s == float("inf"):
                end_ps = int(self.engines["busy_ps"][episode].max())
            own = np.flatnonzero(unfinished[part]) + part.start
            self.outcomes["finish_ps"][own] = np.maximum(end_ps, self.requests["arrival_ps"][own])
        self._over = self._over or bool(unfinished.any())
        return int(unfinished.sum())

    def outcomes_of(self, episode: int) -> Outcomes:
        """What became of each request of an episode so far."""
        low, high = self._first[episode], self._first[episode + 1]
        return _outcomes(self.requests[low:high], self.outcomes[low:high])


class Simulator:
    """One cell that serves one workload: a batch of one. See `SimulatorBatch` for the arguments.

    Example:
        >>> simulator = Simulator(load_profile("h100-llama-3.1-8b"), open_workload("gamma://?rate=8"))
        >>> record = simulator.serve(ServeAction(batch_cap=64), window_s=10.0)
        >>> simulator.serve_out().ttft_s.mean()
    """

    def __init__(self, profile: Profile, workload: Workload, **cell: Any) -> None:
        self.batch = SimulatorBatch(profile, [workload], **cell)
        self._action = cell.get("action") or ServeAction()

    @property
    def now_s(self) -> float:
        """Time up to which the cell has served (s)."""
        return self.batch.now_s

    def serve(self, action: ServeAction, window_s: float) -> WindowRecord:
        """Apply an action, serve for `window_s` seconds (inf: until nothing is left), tell what happened."""
        self._action = action
        return self.batch.serve([action], window_s)[0]

    def serve_out(self) -> Outcomes:
        """Serve all that is left under the last action; a request that never fits its memory limit fails."""
        self.serve(self._action, float("inf"))
        self.batch.fail_unfinished()
        return self.outcomes()

    def outcomes(self) -> Outcomes:
        """What became of each request so far."""
        return self.batch.outcomes_of(0)


def _ps(time_s: float) -> int:
    return NEVER_PS if time_s * PS_PER_S >= NEVER_PS else round(time_s * PS_PER_S)


def _requests(workloads: Sequence[Workload]) -> NDArray[np.void]:
    requests = np.zeros(sum(len(workload) for workload in workloads), REQUEST)
    low = 0
    for workload in workloads:
        if workload.duration_s > _LONGEST_S:
            raise InputError(
                f"expected at most {_LONGEST_S:,.0f} s, found {workload.duration_s}", field="arrival_s"
            )
        part = requests[low : low + len(workload)]
        part["arrival_ps"] = np.rint(workload.arrival_s * PS_PER_S)
        part["prompt_tokens"] = workload.prompt_tokens
        part["output_tokens"] = workload.output_tokens
        part["tenant"] = workload.tenant
        low += len(workload)
    return requests


def _engines(episodes: int, count: int, budget: int) -> NDArray[np.void]:
    engines = np.zeros((episodes, count), ENGINE)
    engines["next_ps"] = NEVER_PS
    engines["token_budget"] = budget
    engines["slots_free"] = MAX_RUNNING
    engines["free_slot"] = np.arange(MAX_RUNNING - 1, -1, -1)
    for name in ("run_head", "run_tail", "partial", "limbo_head", "resumed_head", "fresh_head", "fresh_tail"):
        engines[name] = -1
    return engines


def _tenants(workload: Workload) -> tuple[Tenants, tuple[int, bool]]:
    """Arrays of a workload's tenants, and (decoder layers, LM head) that one draft token runs."""
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
    return (
        Tenants(
            patience_ps=np.array([min(_ps(tenant.patience_s), NEVER_PS) for tenant in tenants], np.int64),
            rank=np.array([ranks.index(tenant.priority) for tenant in tenants], np.int64),
            speculation_class=np.array(
                [classes.index(tenant.speculation_class) for tenant in tenants], np.int64
            ),
            ttft_slo_ps=np.array([_ps(tenant.ttft_slo_s) for tenant in tenants], np.int64),
            tpot_slo_ps=np.array([_ps(tenant.tpot_slo_s) for tenant in tenants], np.int64),
            accept=np.rint(accept * ACCEPT_ONE).astype(np.int64),
        ),
        drafting,
    )


@lru_cache(maxsize=32)
def _cost(profile: Profile) -> Cost:
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


def _no_prefixes() -> Prefixes:
    return Prefixes(np.zeros(1, np.int64), np.zeros(0, np.int64), 0)


def _prefixes(workloads: Sequence[Workload]) -> Prefixes:
    tokens = {workload.prefix_block_tokens for workload in workloads}
    if tokens == {0}:
        return _no_prefixes()
    if len(tokens) > 1:
        raise InputError("the episodes of a batch need the same prefix block size", field="workloads")
    per_id, rest = divmod(tokens.pop(), BLOCK_TOKENS)
    if rest:
        raise InputError(f"expected a multiple of {BLOCK_TOKENS}", field="prefix_block_tokens")
    offsets, low = [], 0
    for workload in workloads:
        offsets.append(workload.prefix_offsets + low)
        low += len(workload.prefix_ids)
    # small numbers for the ids: any integer may name a block, and keys are multiples of them
    ids = np.unique(np.concatenate([w.prefix_ids for w in workloads]), return_inverse=True)[1]
    return Prefixes(np.concatenate(offsets), ids.astype(np.int64), per_id)


def _pool(engines: NDArray[np.void], cost: Cost, shared: bool) -> Pool:
    """Room for the free queue and, where prompts share prefixes, for a node per block."""
    count = engines.size
    blocks = int(cost.blocks.max())
    ring = 1 << (2 * blocks + 4096).bit_length() if shared else 4096
    nodes = blocks if shared else 0
    table = 1 << (2 * blocks).bit_length() if shared else 1
    return Pool(
        queue_owner=np.full((count, ring), -1, np.int64),
        queue_length=np.zeros((count, ring), np.int64),
        node_key=np.zeros((count, nodes), np.int64),
        node_references=np.zeros((count, nodes), np.int32),
        node_segment=np.zeros((count, nodes), np.int64),
        node_free=np.zeros((count, nodes), np.int32),
        table_key=np.full((count, table), -1, np.int64),
        table_node=np.zeros((count, table), np.int32),
    )


def _outcomes(requests: NDArray[np.void], outcomes: NDArray[np.void]) -> Outcomes:
    arrival_ps, first_ps = requests["arrival_ps"], outcomes["first_ps"]
    status = outcomes["status"]
    completed = status == STATUS_NAMES.index("completed")
    over = status >= STATUS_NAMES.index("completed")
    gaps = requests["output_tokens"] - 1
    ttft_s = np.where(first_ps > 0, (first_ps - arrival_ps) / PS_PER_S, np.nan)
    finish_ps = outcomes["finish_ps"]
    with np.errstate(divide="ignore", invalid="ignore"):
        tpot_s = np.where(completed & (gaps > 0), (finish_ps - first_ps) / gaps / PS_PER_S, np.nan)
    return Outcomes(
        arrival_s=arrival_ps / PS_PER_S,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        worst_gap_s=np.where(np.isnan(tpot_s), np.nan, outcomes["worst_gap_ps"] / PS_PER_S),
        e2e_s=np.where(completed, (finish_ps - arrival_ps) / PS_PER_S, np.nan),
        finish_s=np.where(over, finish_ps / PS_PER_S, np.nan),
        preemptions=outcomes["preemptions"].copy(),
        status_code=status.copy(),
    )
