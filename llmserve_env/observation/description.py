"""A window in the words of the schema."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llmserve_env.backend import WINDOW
from llmserve_env.hardware.gpus import known_gpus
from llmserve_env.schema import QuantizationTier, ServeObservation, TenantObservation

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from llmserve_env.tasks import Task


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
        task: the task, which gives names, sizes and prices.
        window: one record.
        step: windows served so far.
        reward: reward of the window.
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
