"""What an agent sees: a flat float32 vector in [0, 1], every feature with a fixed scaling.

Quantities without an upper bound are mapped by x / (x + half), so that `half` becomes 0.5 and no bound 1:
monotone, never clipped, the same for every task. Shares stand as they are. A latency without any request
is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numba import njit

from llmserve_env.backend import WINDOW
from llmserve_env.hardware.gpus import known_gpus
from llmserve_env.schema import QuantizationTier, ServeObservation, TenantObservation

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from llmserve_env.tasks import Task

TENANT_SLOTS = 6
"""Tenants that an observation has room for, in the workload's order; further ones are not seen by name."""


@dataclass(frozen=True)
class Feature:
    """One entry of the observation vector.

    Attributes:
        name: in the style of the records' fields.
        meaning: what it measures, over the last window unless it says otherwise.
        half: value (in the feature's unit) that maps to 0.5, None for a share that stands as it is.
    """

    name: str
    meaning: str
    half: float | None = None


_CELL = (
    Feature("progress", "share of the episode that is over"),
    Feature("queue_depth", "waiting requests per engine, at the window's end", 32.0),
    Feature("active_requests", "running requests per engine, at the window's end", 64.0),
    Feature("in_flight", "requests that are not over, per engine, at the window's end", 64.0),
    Feature("oldest_wait", "age of the oldest try not yet admitted, at the window's end (s)", 1.0),
    Feature("kv_cache_occupancy", "share of KV blocks held, at the window's end"),
    Feature("mean_kv_occupancy", "share of KV blocks held, averaged over busy time"),
    Feature("request_arrival_rate", "arrivals per engine (requests/s)", 4.0),
    Feature("mean_prompt_length", "mean prompt of the arrivals (tokens)", 1024.0),
    Feature("prompt_arrival_rate", "prompt tokens that arrived, per engine (tokens/s)", 4096.0),
    Feature("throughput", "output tokens per engine (tokens/s)", 1024.0),
    Feature("prefill_rate", "prefill tokens computed, per engine (tokens/s)", 4096.0),
    Feature("mean_running", "running requests per busy engine, averaged over busy time", 64.0),
    Feature("busy", "share of engine time in which a batch ran"),
    Feature("mean_ttft", "mean time to first token (s)", 1.0),
    Feature("p50_ttft", "median time to first token (s)", 1.0),
    Feature("p99_ttft", "99th percentile of time to first token (s)", 1.0),
    Feature("p50_gap", "median time between steps of a sequence (s)", 0.03),
    Feature("p99_gap", "99th percentile of time between steps of a sequence (s)", 0.1),
    Feature("slo_compliance", "requests within their SLO, of those that ended; 1 without any"),
    Feature("failed", "requests given up or refused, of those that ended"),
    Feature("preemptions", "preemptions per engine", 4.0),
    Feature("prefix_hits", "share of prefill tokens that the prefix cache spared"),
    Feature("evictions", "cached KV blocks overwritten, per engine", 1024.0),
    Feature("acceptance", "accepted of the drafted tokens"),
    Feature("engines_up", "share of engines that are neither draining nor loading, at the window's end"),
    Feature("engines_int8", "share of engines with INT8 weights, at the window's end"),
    Feature("engines_int4", "share of engines with INT4 weights, at the window's end"),
    Feature("engines_split", "share of engines in prefill or decode pools, at the window's end"),
    Feature("refused", "tries that the admission rate did not let in, per engine (tries/s)", 4.0),
    Feature("timeouts", "tries that their client gave up, per engine (tries/s)", 4.0),
    Feature("retries", "tries after a request's first, per engine (tries/s)", 4.0),
    Feature(
        "retrying", "requests whose client waits to send them again, per engine, at the window's end", 64.0
    ),
)
_ACTION = (
    Feature("set_batch_cap", "batch cap that is set, of 512"),
    Feature("set_kv_budget_fraction", "KV budget that is set"),
    Feature("set_speculation_depth", "draft tokens that are set, of 8"),
    Feature("set_int8", "1 if INT8 weights are set"),
    Feature("set_int4", "1 if INT4 weights are set"),
    Feature("set_split", "1 if prefill and decode are set to be split"),
    Feature("set_priority", "1 if priority routing is set"),
    Feature("set_admission_rate", "admission rate that is set, per engine (requests/s); 1 for none", 4.0),
)
_TENANT = (
    Feature("arrival_rate", "arrivals per engine (requests/s)", 2.0),
    Feature("in_flight", "requests that are not over, per engine, at the window's end", 32.0),
    Feature("slo_compliance", "requests within the SLO, of those that ended; 1 without any"),
    Feature("ttft_to_slo", "mean time to first token, in units of the tenant's SLO", 1.0),
    Feature("weight", "its weight, of the heaviest tenant's"),
    Feature("ttft_slo", "its promised time to first token (s)", 1.0),
    Feature("tpot_slo", "its promised time per output token (s)", 0.05),
)

FEATURES: tuple[Feature, ...] = (
    *_CELL,
    *_ACTION,
    *(
        Feature(f"tenant_{slot}_{each.name}", f"tenant {slot}: {each.meaning}", each.half)
        for slot in range(TENANT_SLOTS)
        for each in _TENANT
    ),
)
"""All entries in order. The slots of tenants that a task does not have are 0."""


class Observer:
    """Turns records into observations of a task.

    Args:
        task: gives the size of the cell, the tenants and the length of an episode.
    """

    def __init__(self, task: Task) -> None:
        seen = task.tenants[:TENANT_SLOTS]
        heaviest = max(tenant.weight for tenant in task.tenants)
        self._tenants = np.array([[t.weight / heaviest, t.ttft_slo_s, t.tpot_slo_s] for t in seen])
        self._halves = np.array([feature.half or 0.0 for feature in FEATURES])
        self._windows = task.windows
        self._window_s = task.window_s
        self._engines = task.cell.engines

    def of(
        self, windows: NDArray[np.void], actions: NDArray[np.void], steps: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """float32[n, features] from WINDOW[n], the ACTION[n] in force and the windows served, int64[n]."""
        observations = np.zeros((len(windows), len(FEATURES)), np.float32)
        _fill(
            windows,
            actions,
            steps / self._windows,
            self._window_s,
            self._engines,
            self._tenants,
            self._halves,
            observations,
        )
        return observations


def describe(
    task: Task,
    window: NDArray[np.void],
    step: int,
    *,
    reward: float,
    done: bool,
    metadata: dict[str, Any],
) -> ServeObservation:
    """A WINDOW record in the words of the schema.

    Args:
        task: gives names, sizes and prices.
        window: one record.
        step: windows served so far.
        reward: of the window.
        done: whether the episode is over.
        metadata: goes into the observation as it is.
    """
    w: dict[str, Any] = dict(zip(WINDOW.names or (), window.item(), strict=True))
    over = w["completed"] + w["failed"] + w["cancelled"]
    prefill = w["cached_tokens"] + w["prefill_tokens"]
    tenants = {}
    for i, tenant in enumerate(task.tenants):
        first_tokens = int(w["tenant_first_tokens"][i])
        tenants[tenant.name] = TenantObservation(
            arrived=w["tenant_arrived"][i],
            in_flight=w["tenant_in_flight"][i],
            completed=w["tenant_completed"][i],
            failed=w["tenant_failed"][i],
            in_slo=w["tenant_in_slo"][i],
            mean_ttft_ms=float(w["tenant_ttft_s"][i]) / first_tokens * 1e3 if first_tokens else None,
        )
    return ServeObservation(
        queue_depth=w["waiting"],
        active_requests=w["running"],
        in_flight=w["in_flight"],
        retrying_requests=w["retrying"],
        oldest_wait_ms=w["oldest_wait_s"] * 1e3,
        kv_cache_occupancy=w["kv_occupancy"],
        mean_prompt_length=w["arrived_prompt_tokens"] / w["arrived"] if w["arrived"] else 0.0,
        mean_ttft_ms=_ms(w["mean_ttft_s"]),
        p50_ttft_ms=_ms(w["p50_ttft_s"]),
        p99_ttft_ms=_ms(w["p99_ttft_s"]),
        p50_itl_ms=_ms(w["p50_gap_s"]),
        p99_itl_ms=_ms(w["p99_gap_s"]),
        throughput_tps=w["output_tokens"] / task.window_s,
        slo_compliance_rate=float(w["tenant_in_slo"].sum()) / over if over else 1.0,
        failed_requests=w["failed"] + w["cancelled"],
        refused_tries=w["refused"],
        timed_out_tries=w["timeouts"],
        retries=w["retries"],
        gpu_memory_used_gb=w["gpu_memory_gb"],
        estimated_cost_per_1k=_cost_per_1k(task, w["output_tokens"]),
        request_arrival_rate=w["arrived"] / task.window_s,
        spec_acceptance_rate=w["accepted_tokens"] / w["drafted_tokens"] if w["drafted_tokens"] else None,
        prefix_hit_rate=w["cached_tokens"] / prefill if prefill else None,
        eviction_events=w["evictions"],
        preemptions=w["preemptions"],
        gpu_busy_share=min(w["busy_s"] / (task.window_s * task.cell.engines), 1.0),
        engines_up=w["engines_up"],
        engines_by_tier={tier: int(w["engines_tier"][i]) for i, tier in enumerate(QuantizationTier)},
        engines_split=w["engines_split"],
        tenants=tenants,
        step_index=step,
        time_s=w["end_s"],
        task_id=task.id,
        reward=reward,
        done=done,
        metadata=metadata,
    )


def _ms(seconds: float) -> float | None:
    return None if np.isnan(seconds) else seconds * 1e3


def _cost_per_1k(task: Task, output_tokens: int) -> float | None:
    """USD of the cell's GPU time per 1,000 output tokens; None without output or a known price."""
    gpu = known_gpus().get(task.profile.gpu.name)
    if gpu is None or output_tokens <= 0:
        return None
    gpu_hours = task.window_s / 3600 * task.cell.engines * task.profile.gpu.count
    return gpu.usd_per_hour * gpu_hours / output_tokens * 1e3


@njit(cache=True, error_model="numpy")
def _scaled(value, half):  # type: ignore[no-untyped-def]
    if half > 0.0:
        return 1.0 if value == np.inf else value / (value + half)
    return min(max(value, 0.0), 1.0)


@njit(cache=True, error_model="numpy")
def _share(part, whole, without):  # type: ignore[no-untyped-def]
    return part / whole if whole > 0 else without


@njit(cache=True, error_model="numpy")
def _fill(windows, actions, progress, window_s, engines, tenants, halves, observations):  # type: ignore[no-untyped-def]  # noqa: PLR0915
    raw = np.zeros(len(halves))
    for i in range(len(windows)):
        w = windows[i]
        a = actions[i]
        per_s = 1.0 / (window_s * engines)
        completed_in_slo = 0
        failed = w.failed + w.cancelled
        for tenant in range(len(w.tenant_in_slo)):
            completed_in_slo += w.tenant_in_slo[tenant]
        over = w.completed + failed
        raw[0] = progress[i]
        raw[1] = w.waiting / engines
        raw[2] = w.running / engines
        raw[3] = w.in_flight / engines
        raw[4] = w.oldest_wait_s
        raw[5] = w.kv_occupancy
        raw[6] = w.mean_kv_occupancy
        raw[7] = w.arrived * per_s
        raw[8] = _share(w.arrived_prompt_tokens, w.arrived, 0.0)
        raw[9] = w.arrived_prompt_tokens * per_s
        raw[10] = max(w.output_tokens, 0) * per_s
        raw[11] = w.prefill_tokens * per_s
        raw[12] = w.mean_running
        raw[13] = w.busy_s * per_s
        raw[14] = 0.0 if np.isnan(w.mean_ttft_s) else w.mean_ttft_s
        raw[15] = 0.0 if np.isnan(w.p50_ttft_s) else w.p50_ttft_s
        raw[16] = 0.0 if np.isnan(w.p99_ttft_s) else w.p99_ttft_s
        raw[17] = 0.0 if np.isnan(w.p50_gap_s) else w.p50_gap_s
        raw[18] = 0.0 if np.isnan(w.p99_gap_s) else w.p99_gap_s
        raw[19] = _share(completed_in_slo, over, 1.0)
        raw[20] = _share(failed, over, 0.0)
        raw[21] = w.preemptions / engines
        raw[22] = _share(w.cached_tokens, w.cached_tokens + w.prefill_tokens, 0.0)
        raw[23] = w.evictions / engines
        raw[24] = _share(w.accepted_tokens, w.drafted_tokens, 0.0)
        raw[25] = w.engines_up / engines
        raw[26] = w.engines_tier[1] / engines
        raw[27] = w.engines_tier[2] / engines
        raw[28] = w.engines_split / engines
        raw[29] = w.refused * per_s
        raw[30] = w.timeouts * per_s
        raw[31] = w.retries * per_s
        raw[32] = w.retrying / engines
        raw[33] = a.batch_cap / 512.0
        raw[34] = a.kv_budget_fraction
        raw[35] = a.speculation_depth / 8.0
        raw[36] = a.quantization_tier == 1
        raw[37] = a.quantization_tier == 2
        raw[38] = a.prefill_decode_split
        raw[39] = a.priority_routing
        raw[40] = a.admission_rate / engines
        place = 41
        for slot in range(len(tenants)):
            ended = w.tenant_completed[slot] + w.tenant_failed[slot]
            first_tokens = w.tenant_first_tokens[slot]
            raw[place] = w.tenant_arrived[slot] * per_s
            raw[place + 1] = w.tenant_in_flight[slot] / engines
            raw[place + 2] = _share(w.tenant_in_slo[slot], ended, 1.0)
            raw[place + 3] = _share(w.tenant_ttft_s[slot], first_tokens, 0.0) / tenants[slot, 1]
            raw[place + 4] = tenants[slot, 0]
            raw[place + 5] = tenants[slot, 1]
            raw[place + 6] = tenants[slot, 2]
            place += 7
        for k in range(place):
            observations[i, k] = _scaled(raw[k], halves[k])
