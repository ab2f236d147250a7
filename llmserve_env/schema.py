"""The contract, in every world (simulated, served over HTTP, live): what an agent sets, sees and gets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

_MODEL = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

GROUPS = ("time", "load", "service", "latency", "memory", "engines", "tenants", "controls")
"""Groups of controls, window figures and features that belong to every task."""

EXTRA_GROUPS: tuple[str, ...] = ()
"""Further groups, which a task has where it names them or grants a control of theirs."""


@dataclass(frozen=True)
class Control:
    """What a field of ServeAction says of itself beside its type, range, default and docstring.

    `llmserve_env.controls` derives from both what agents, forms, commands and documents need.

    Attributes:
        label: name in a form or a table.
        scale: how far two values are apart: by their ratio (log), by their difference (linear), by the whole
            numbers between them (whole), or not at all (choice). Of a control that may be None, the finite
            values.
        unit: unit of a number.
        restarts: whether a change drains engines and starts them anew.
        limits_capacity: whether a lower value serves fewer requests at a time.
        of_cell: whether a number is of the whole cell rather than of each engine.
        half: value per engine that an observation shows as 0.5 (default: the range is shown from 0 to 1).
        unset: what None is called in a form.
        short: its name in the observation after `set_` (default: the field's).
        flag: its name on the command line of `llmserve simulate` (default: the field's).
        group: a task sees it where it has this group.
    """

    label: str
    scale: Literal["log", "linear", "whole", "choice"]
    unit: str = ""
    restarts: bool = False
    limits_capacity: bool = False
    of_cell: bool = False
    half: float | None = None
    unset: str = "none"
    short: str = ""
    flag: str = ""
    group: str = "controls"


class QuantizationTier(str, Enum):
    """Precision of the weights: 16 bits, 8 bits, 4 bits weight-only."""

    FP16 = "FP16"
    INT8 = "INT8"
    INT4 = "INT4"


class ServeAction(BaseModel):
    """Configuration of the service for the next window."""

    model_config = _MODEL

    batch_cap: Annotated[
        int,
        Field(ge=1, le=512),
        Control("Batch cap", "log", "sequences per engine", limits_capacity=True, flag="max_num_seqs"),
    ] = 256
    """Running sequences per engine; lowering it drains, it never preempts."""
    kv_budget_fraction: Annotated[
        float,
        Field(ge=0.1, le=1.0),
        Control("KV budget", "linear", "share of KV blocks", limits_capacity=True),
    ] = 1.0
    """Share of an engine's KV blocks that running requests may hold; the rest keeps the prefix cache.
    Lowering it stops admissions and then preempts.
    """
    speculation_depth: Annotated[
        int, Field(ge=0, le=8), Control("Speculation depth", "whole", "draft tokens")
    ] = 0
    """Draft tokens per step, 0 for none."""
    quantization_tier: Annotated[
        QuantizationTier, Control("Precision of the weights", "choice", restarts=True)
    ] = QuantizationTier.FP16
    """Precision of the weights. A change drains an engine and loads other weights."""
    prefill_decode_split: Annotated[
        bool, Control("Split prefill and decode", "choice", restarts=True, short="split", flag="split")
    ] = False
    """Prefill and decode in pools of their own. A change drains and restarts engines."""
    priority_routing: Annotated[bool, Control("Priority routing", "choice", short="priority")] = False
    """Requests of more urgent tenants are admitted first and preempted last."""
    admission_rate: Annotated[
        float | None,
        Field(gt=0, le=1000),
        Control(
            "Admission rate",
            "log",
            "requests/s",
            limits_capacity=True,
            of_cell=True,
            half=4.0,
            unset="everybody",
        ),
    ] = None
    """Requests per second of the whole cell that are let into the queue; the others are refused at once.
    None lets all in.
    """

    @field_validator("*", mode="before")
    @classmethod
    def _unset(cls, value: Any, info: ValidationInfo) -> Any:
        """None for infinity, which stands for it in ACTION records and in Gymnasium's infos."""
        if value == math.inf and type(None) in get_args(cls.model_fields[str(info.field_name)].annotation):
            return None
        return value


def bounds(control: str) -> dict[str, Any]:
    """The range of a control that is a number, as the arguments of pydantic's `Field`."""
    found = ServeAction.model_fields[control].metadata
    return {key: getattr(each, key) for each in found for key in ("ge", "gt", "le") if hasattr(each, key)}


class TenantObservation(BaseModel):
    """A tenant's window."""

    model_config = _MODEL

    arrived: int
    """Requests that it sent."""
    in_flight: int
    """Requests that are not over (gauge)."""
    completed: int
    """Requests that got their last token."""
    failed: int
    """Requests given up or refused."""
    in_slo: int
    """Completed within its SLO."""
    mean_ttft_ms: float | None
    """Mean time to first token (ms; None without any)."""


class ServeObservation(BaseModel):
    """What an agent sees after a window. Counts and rates are of that window, gauges of its end."""

    model_config = _MODEL

    queue_depth: int
    """Waiting requests (gauge)."""
    active_requests: int
    """Running requests (gauge)."""
    in_flight: int
    """Requests that are not over (gauge)."""
    retrying_requests: int
    """Requests in flight whose client waits to send them again (gauge)."""
    oldest_wait_ms: float
    """Age of the oldest attempt that waits for its first admission (ms, gauge)."""
    kv_cache_occupancy: float
    """Share of KV blocks held (gauge)."""
    mean_prompt_length: float
    """Mean prompt of the arrivals (tokens; 0 without any)."""
    mean_ttft_ms: float | None
    """Mean time to first token (ms; None without any, as all latencies here)."""
    p50_ttft_ms: float | None
    """Median of the time to first token (ms)."""
    p99_ttft_ms: float | None
    """99th percentile of the time to first token (ms)."""
    p50_itl_ms: float | None
    """Median of the time between steps of a sequence (ms)."""
    p99_itl_ms: float | None
    """99th percentile of the time between steps of a sequence (ms)."""
    throughput_tps: float
    """Output tokens per second."""
    slo_compliance_rate: float
    """Share of the requests that ended within their SLO (1 without any)."""
    failed_requests: int
    """Requests given up or refused for good."""
    refused_tries: int
    """Attempts that the admission rate did not let in."""
    timed_out_tries: int
    """Attempts that their client gave up, waiting for the first token or for the whole answer."""
    retries: int
    """Attempts that followed a refused or given up one of the same request."""
    gpu_memory_used_gb: float
    """Weights and held KV blocks of all engines (GB, gauge)."""
    estimated_cost_per_1k: float | None
    """Price of the cell's GPU time per 1,000 output tokens (USD; None without output)."""
    request_arrival_rate: float
    """Requests per second."""
    spec_acceptance_rate: float | None
    """Accepted of the drafted tokens (None without drafts)."""
    prefix_hit_rate: float | None
    """Share of prefill tokens that the prefix cache spared (None without prefill)."""
    eviction_events: int
    """Cached KV blocks overwritten."""
    preemptions: int
    """Running requests thrown back to the queue."""
    gpu_busy_share: float
    """Share of engine time in which a batch ran."""
    engines_up: int
    """Engines that are neither draining nor loading (gauge)."""
    engines_by_tier: dict[QuantizationTier, int]
    """Engines by the precision of their weights (gauge)."""
    engines_split: int
    """Engines in prefill or decode pools (gauge)."""
    tenants: dict[str, TenantObservation]
    """By name: arrivals, requests in flight, completed, failed, within the SLO, mean TTFT (ms)."""
    step_index: int
    """Windows served so far."""
    time_s: float
    """End of the window (s)."""
    task_id: str
    """Id of the task."""
    reward: float
    """Reward of the window."""
    done: bool
    """Whether the episode is over."""
    metadata: dict[str, Any]
    """Seed, reward components, cost and score so far, the action in force, the fields that were set and not
    applied with the reason, and how the episode ended: terminated before its horizon, or truncated at it.
    """


class ServeState(BaseModel):
    """Where the episode of a session stands."""

    # Not "forbid": a newer server may say more.
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    session_id: str | None = None
    """Name of the session, by which another connection can attach to it."""
    episode_id: str | None = None
    """Name of the episode; None before the first reset, as task and seed."""
    step_count: int = Field(0, ge=0)
    """Windows served so far."""
    task_id: str | None = None
    """Id of the task."""
    seed: int | None = None
    """Seed of the episode."""
    windows: int = 0
    """Windows of the whole episode."""
    done: bool = False
    """Whether the episode is over."""
    score: float = 0.0
    """Its grade so far, 0..1: what is still to come counts as nothing."""


class EpisodeLog(BaseModel):
    """What an episode was, complete enough to replay it."""

    model_config = _MODEL

    format: Literal[1] = 1
    """Version of this record."""
    package_version: str
    """Version of llmserve_env; another version's dynamics may differ."""
    task: dict[str, Any]
    """The whole task, its traffic included."""
    seed: int
    """Seed of the episode."""
    live: bool = False
    """Whether real engines served: such a log cannot be replayed."""
    actions: list[ServeAction]
    """Actions in force, one for each window."""
    rewards: list[float]
    """Reward of each window."""
    components: list[dict[str, float]] = []
    """Parts of each reward by name, of a live episode; those of a simulated one come from its replay."""
    digests: list[str]
    """After each window, a hash of all records up to there (hex)."""
    terminated: bool
    """Whether it ended before its horizon."""
    score: float
    """Its grade, the mean reward over all windows of the horizon."""


class GradeResult(BaseModel):
    """The grade of an episode."""

    model_config = _MODEL

    task_id: str
    """What the log's task calls itself."""
    custom: bool
    """Whether that is another task than the shipped one of this id: such scores compare with no others."""
    seed: int
    """Seed of the episode."""
    held_out: bool
    """Whether the seed is one of evaluation."""
    score: float = Field(ge=0, le=1)
    """0..1, the mean reward over all windows of the horizon."""
    components: dict[str, float]
    """Parts of the score by name, they sum to it; of a live episode as its log states them, if it does."""
    windows: int
    """Windows that were played."""
    complete: bool
    """Whether the episode reached its end; what is missing earned nothing."""
    requests: dict[str, int]
    """How many of the episode's requests arrived, completed, in_slo (completed within the SLO), failed,
    unfinished (in flight at the end), to_come (not arrived yet): arrived = completed + failed + unfinished.
    None of a live episode.
    """
    verified: bool
    """Whether the score comes from a replay that matched the log. False of a live episode, which cannot be
    replayed: its score is what the log states.
    """
