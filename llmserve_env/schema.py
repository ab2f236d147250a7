"""The contract, in every world (simulated, served over HTTP, live): what an agent sets, sees and gets."""

from __future__ import annotations

from enum import Enum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class QuantizationTier(str, Enum):
    """Precision of the weights: 16 bits, 8 bits, 4 bits weight-only."""

    FP16 = "FP16"
    INT8 = "INT8"
    INT4 = "INT4"


class ServeAction(BaseModel):
    """Configuration of the service for the next window.

    Attributes:
        batch_cap: running sequences per engine; lowering it drains, it never preempts.
        kv_budget_fraction: share of an engine's KV blocks that running requests may hold; the rest keeps the
            prefix cache. Lowering it stops admissions and then preempts.
        speculation_depth: draft tokens per step, 0 for none.
        quantization_tier: precision of the weights. A change drains an engine and loads other weights.
        prefill_decode_split: prefill and decode in pools of their own. A change drains and restarts engines.
        priority_routing: requests of more urgent tenants are admitted first and preempted last.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_cap: int = Field(256, ge=1, le=512)
    kv_budget_fraction: float = Field(1.0, ge=0.1, le=1.0)
    speculation_depth: int = Field(0, ge=0, le=8)
    quantization_tier: QuantizationTier = QuantizationTier.FP16
    prefill_decode_split: bool = False
    priority_routing: bool = False


class TenantObservation(BaseModel):
    """A tenant's window.

    Attributes:
        arrived: requests that it sent.
        in_flight: requests that are not over (gauge).
        completed: requests that got their last token.
        failed: requests given up or refused.
        in_slo: completed within its SLO.
        mean_ttft_ms: mean time to first token (ms; None without any).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    arrived: int
    in_flight: int
    completed: int
    failed: int
    in_slo: int
    mean_ttft_ms: float | None


class ServeObservation(BaseModel):
    """What an agent sees after a window. Counts and rates are of that window, gauges of its end.

    Attributes:
        queue_depth: waiting requests (gauge).
        active_requests: running requests (gauge).
        in_flight: requests that are not over (gauge).
        oldest_wait_ms: age of the oldest request that waits for its first admission (ms, gauge).
        kv_cache_occupancy: share of KV blocks held (gauge).
        mean_prompt_length: mean prompt of the arrivals (tokens; 0 without any).
        mean_ttft_ms: mean time to first token (ms; None without any, as all latencies here).
        p50_ttft_ms: its median.
        p99_ttft_ms: its 99th percentile.
        p50_itl_ms: median time between steps of a sequence (ms).
        p99_itl_ms: its 99th percentile.
        throughput_tps: output tokens per second.
        slo_compliance_rate: share of the requests that ended within their SLO (1 without any).
        failed_requests: requests given up or refused.
        gpu_memory_used_gb: weights and held KV blocks of all engines (GB, gauge).
        estimated_cost_per_1k: price of the cell's GPU time per 1,000 output tokens (USD; None without
            output).
        request_arrival_rate: requests per second.
        spec_acceptance_rate: accepted of the drafted tokens (None without drafts).
        prefix_hit_rate: share of prefill tokens that the prefix cache spared (None without prefill).
        eviction_events: cached KV blocks overwritten.
        preemptions: running requests thrown back to the queue.
        gpu_busy_share: share of engine time in which a batch ran.
        engines_up: engines that are neither draining nor loading (gauge).
        engines_by_tier: engines by the precision of their weights (gauge).
        engines_split: engines in prefill or decode pools (gauge).
        tenants: by name: arrivals, requests in flight, completed, failed, within the SLO, mean TTFT (ms).
        step_index: windows served so far.
        time_s: end of the window (s).
        task_id: the task.
        reward: of the window.
        done: whether the episode is over.
        metadata: reward components, cost, fields of the action that were not applied with the reason.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    queue_depth: int
    active_requests: int
    in_flight: int
    oldest_wait_ms: float
    kv_cache_occupancy: float
    mean_prompt_length: float
    mean_ttft_ms: float | None
    p50_ttft_ms: float | None
    p99_ttft_ms: float | None
    p50_itl_ms: float | None
    p99_itl_ms: float | None
    throughput_tps: float
    slo_compliance_rate: float
    failed_requests: int
    gpu_memory_used_gb: float
    estimated_cost_per_1k: float | None
    request_arrival_rate: float
    spec_acceptance_rate: float | None
    prefix_hit_rate: float | None
    eviction_events: int
    preemptions: int
    gpu_busy_share: float
    engines_up: int
    engines_by_tier: dict[QuantizationTier, int]
    engines_split: int
    tenants: dict[str, TenantObservation]
    step_index: int
    time_s: float
    task_id: str
    reward: float
    done: bool
    metadata: dict[str, Any]


class EpisodeLog(BaseModel):
    """What an episode was, complete enough to replay it.

    Attributes:
        format: version of this record.
        package_version: of llmserve_env; another version's dynamics may differ.
        task: the whole task, its traffic included.
        seed: of the episode.
        live: whether real engines served: such a log cannot be replayed.
        actions: one for each window.
        rewards: of each window.
        digests: after each window, a hash of all records up to there (hex).
        terminated: whether it ended before its horizon.
        score: its grade, the mean reward over all windows of the horizon.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    package_version: str
    task: dict[str, Any]
    seed: int
    live: bool = False
    actions: list[ServeAction]
    rewards: list[float]
    digests: list[str]
    terminated: bool
    score: float


class GradeResult(BaseModel):
    """The grade of an episode.

    Attributes:
        task_id: what the log's task calls itself.
        custom: whether that is another task than the shipped one of this id: such scores compare with no
            others.
        seed: of the episode.
        held_out: whether the seed is one of evaluation.
        score: 0..1, the mean reward over all windows of the horizon.
        components: parts of the score by name, they sum to it; none of a live episode.
        windows: windows that were played.
        complete: whether the episode reached its end; what is missing earned nothing.
        requests: how many of the episode's requests arrived, completed, in_slo (completed within the SLO),
            failed, unfinished (in flight at the end), to_come (not arrived yet): arrived = completed +
            failed + unfinished. None of a live episode.
        verified: whether the score comes from a replay that matched the log. False of a live episode, which
            cannot be replayed: its score is what the log states.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task_id: str
    custom: bool
    seed: int
    held_out: bool
    score: float = Field(ge=0, le=1)
    components: dict[str, float]
    windows: int
    complete: bool
    requests: dict[str, int]
    verified: bool
