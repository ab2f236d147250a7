"""The features of the observation, each declared once: its name, its group, and what it reads.

Quantities without an upper bound are mapped by x / (x + half), so that `half` becomes 0.5 and no bound 1:
monotone, never clipped, the same for every task. Shares stand as they are. A latency without any request
is 0.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from llmserve_env.controls import SPECS, ControlSpec
from llmserve_env.schema import QuantizationTier

if TYPE_CHECKING:
    from llmserve_env.tasks import Task

TENANT_SLOTS = 6
"""Tenants that an observation has room for, in the workload's order; further ones are not seen by name."""


@dataclass(frozen=True)
class Feature:
    """One entry of the observation vector.

    Its value is the sum of what it reads, divided by that of `whole` where there is any.

    Attributes:
        name: name in the style of the records' fields.
        meaning: what it measures, over the last window unless it says otherwise.
        group: a task sees it where it has this group.
        reads: names in its source.
        whole: names of what it is a share of.
        without: value where `whole` is 0.
        per: what it is divided by further: the number of engines, engines and the window's length, or the
            tenant's TTFT SLO.
        top: value that counts as 1.
        half: value (in the feature's unit) that maps to 0.5, None for a share that stands as it is.
        code: 1 where the sum is this code, 0 elsewhere.
        source: kind of its names: figures of the window, controls (the codes that are set), or what the task
            says (`Observer`).
        index: place along the first axis of a figure; None sums over all places.
        slot: the same, of the tenant whom it describes.
    """

    name: str
    meaning: str
    group: str
    reads: tuple[str, ...]
    whole: tuple[str, ...] = ()
    without: float = 0.0
    per: Literal["", "engine", "engine_s", "ttft_slo"] = ""
    top: float = 1.0
    half: float | None = None
    code: int | None = None
    source: Literal["window", "action", "task"] = "window"
    index: int | None = None
    slot: int | None = None


_ENDED = ("completed", "failed", "cancelled")

_CELL = (
    Feature("progress", "share of the episode that is over", "time", ("progress",), source="task"),
    Feature(
        "queue_depth",
        "waiting requests per engine, at the window's end",
        "load",
        ("waiting",),
        per="engine",
        half=32.0,
    ),
    Feature(
        "active_requests",
        "running requests per engine, at the window's end",
        "load",
        ("running",),
        per="engine",
        half=64.0,
    ),
    Feature(
        "in_flight",
        "requests that are not over, per engine, at the window's end",
        "load",
        ("in_flight",),
        per="engine",
        half=64.0,
    ),
    Feature(
        "oldest_wait",
        "age of the oldest attempt not yet admitted, at the window's end (s)",
        "load",
        ("oldest_wait_s",),
        half=1.0,
    ),
    Feature(
        "kv_cache_occupancy", "share of KV blocks held, at the window's end", "memory", ("kv_occupancy",)
    ),
    Feature(
        "mean_kv_occupancy",
        "share of KV blocks held, averaged over busy time",
        "memory",
        ("mean_kv_occupancy",),
    ),
    Feature(
        "request_arrival_rate",
        "arrivals per engine (requests/s)",
        "load",
        ("arrived",),
        per="engine_s",
        half=4.0,
    ),
    Feature(
        "mean_prompt_length",
        "mean prompt of the arrivals (tokens)",
        "load",
        ("arrived_prompt_tokens",),
        whole=("arrived",),
        half=1024.0,
    ),
    Feature(
        "prompt_arrival_rate",
        "prompt tokens that arrived, per engine (tokens/s)",
        "load",
        ("arrived_prompt_tokens",),
        per="engine_s",
        half=4096.0,
    ),
    Feature(
        "throughput",
        "output tokens per engine (tokens/s)",
        "service",
        ("output_tokens",),
        per="engine_s",
        half=1024.0,
    ),
    Feature(
        "prefill_rate",
        "prefill tokens computed, per engine (tokens/s)",
        "service",
        ("prefill_tokens",),
        per="engine_s",
        half=4096.0,
    ),
    Feature(
        "mean_running",
        "running requests per busy engine, averaged over busy time",
        "load",
        ("mean_running",),
        half=64.0,
    ),
    Feature("busy", "share of engine time in which a batch ran", "engines", ("busy_s",), per="engine_s"),
    Feature("mean_ttft", "mean time to first token (s)", "latency", ("mean_ttft_s",), half=1.0),
    Feature("p50_ttft", "median time to first token (s)", "latency", ("p50_ttft_s",), half=1.0),
    Feature("p99_ttft", "99th percentile of time to first token (s)", "latency", ("p99_ttft_s",), half=1.0),
    Feature("p50_gap", "median time between steps of a sequence (s)", "latency", ("p50_gap_s",), half=0.03),
    Feature(
        "p99_gap",
        "99th percentile of time between steps of a sequence (s)",
        "latency",
        ("p99_gap_s",),
        half=0.1,
    ),
    Feature(
        "slo_compliance",
        "requests within their SLO, of those that ended; 1 without any",
        "service",
        ("tenant_in_slo",),
        whole=_ENDED,
        without=1.0,
    ),
    Feature(
        "failed",
        "requests given up or refused, of those that ended",
        "service",
        ("failed", "cancelled"),
        whole=_ENDED,
    ),
    Feature("preemptions", "preemptions per engine", "memory", ("preemptions",), per="engine", half=4.0),
    Feature(
        "prefix_hits",
        "share of prefill tokens that the prefix cache spared",
        "memory",
        ("cached_tokens",),
        whole=("cached_tokens", "prefill_tokens"),
    ),
    Feature(
        "evictions",
        "cached KV blocks overwritten, per engine",
        "memory",
        ("evictions",),
        per="engine",
        half=1024.0,
    ),
    Feature(
        "acceptance",
        "accepted of the drafted tokens",
        "service",
        ("accepted_tokens",),
        whole=("drafted_tokens",),
    ),
    Feature(
        "engines_up",
        "share of engines that are neither draining nor loading, at the window's end",
        "engines",
        ("engines_up",),
        per="engine",
    ),
    *(
        Feature(
            f"engines_{tier.lower()}",
            f"share of engines with {tier} weights, at the window's end",
            "engines",
            ("engines_tier",),
            per="engine",
            index=index,
        )
        for index, tier in enumerate(each.value for each in QuantizationTier)
        if index > 0
    ),
    Feature(
        "engines_split",
        "share of engines in prefill or decode pools, at the window's end",
        "engines",
        ("engines_split",),
        per="engine",
    ),
    Feature(
        "refused",
        "attempts that the admission rate did not let in, per engine (attempts/s)",
        "load",
        ("refused",),
        per="engine_s",
        half=4.0,
    ),
    Feature(
        "timeouts",
        "attempts that their client gave up, per engine (attempts/s)",
        "load",
        ("timeouts",),
        per="engine_s",
        half=4.0,
    ),
    Feature(
        "retries",
        "attempts after a request's first, per engine (attempts/s)",
        "load",
        ("retries",),
        per="engine_s",
        half=4.0,
    ),
    Feature(
        "retrying",
        "requests whose client waits to send them again, per engine, at the window's end",
        "load",
        ("retrying",),
        per="engine",
        half=64.0,
    ),
)

_TENANT = (
    Feature(
        "arrival_rate",
        "arrivals per engine (requests/s)",
        "tenants",
        ("tenant_arrived",),
        per="engine_s",
        half=2.0,
    ),
    Feature(
        "in_flight",
        "requests that are not over, per engine, at the window's end",
        "tenants",
        ("tenant_in_flight",),
        per="engine",
        half=32.0,
    ),
    Feature(
        "slo_compliance",
        "requests within the SLO, of those that ended; 1 without any",
        "tenants",
        ("tenant_in_slo",),
        whole=("tenant_completed", "tenant_failed"),
        without=1.0,
    ),
    Feature(
        "ttft_to_slo",
        "mean time to first token, in units of the tenant's SLO",
        "tenants",
        ("tenant_ttft_s",),
        whole=("tenant_first_tokens",),
        per="ttft_slo",
        half=1.0,
    ),
    Feature("weight", "its weight, of the heaviest tenant's", "tenants", ("weight",), source="task"),
    Feature(
        "ttft_slo",
        "its promised time to first token (s)",
        "tenants",
        ("ttft_slo_s",),
        half=1.0,
        source="task",
    ),
    Feature(
        "tpot_slo",
        "its promised time per output token (s)",
        "tenants",
        ("tpot_slo_s",),
        half=0.05,
        source="task",
    ),
)


def _settings(spec: ControlSpec) -> list[Feature]:
    """The features that tell what is set: of an enumeration one for each member but the first."""
    declared = spec.declared
    label, name = spec.label_in_text, declared.short or spec.name
    rows: list[tuple[str, str, int | None]]
    if spec.options and spec.type is not bool:
        rows = [
            (option.lower(), f"1 if {option} is set", code)
            for code, option in enumerate(spec.options)
            if code
        ]
    elif spec.options:
        rows = [(name, f"1 if {spec.name} is set", None)]
    elif declared.half is None:
        of = f", of {spec.high:g}" if spec.high != 1 else ""
        rows = [(name, f"{label} that is set{of}", None)]
    else:
        per_engine = ", per engine" if declared.of_cell else ""
        none = "; 1 for none" if spec.optional else ""
        rows = [(name, f"{label} that is set{per_engine} ({declared.unit}){none}", None)]
    return [
        Feature(
            f"set_{shown}",
            meaning,
            declared.group,
            (spec.name,),
            per="engine" if declared.of_cell else "",
            top=spec.high if declared.half is None and not spec.options else 1.0,
            half=declared.half,
            code=code,
            source="action",
        )
        for shown, meaning, code in rows
    ]


def distinct(features: tuple[Feature, ...]) -> tuple[Feature, ...]:
    """The features, of which no two have one name: policies read them by it."""
    first: dict[str, Feature] = {}
    for feature in features:
        other = first.setdefault(feature.name, feature)
        if other is not feature:
            of = " and ".join(f"{', '.join(each.reads)} ({each.meaning})" for each in (other, feature))
            raise ValueError(f"two features are called {feature.name}: of {of}")
    return features


FEATURES: tuple[Feature, ...] = distinct(
    (
        *_CELL,
        *(feature for spec in SPECS.values() for feature in _settings(spec)),
        *(
            replace(
                each, name=f"tenant_{slot}_{each.name}", meaning=f"tenant {slot}: {each.meaning}", slot=slot
            )
            for slot in range(TENANT_SLOTS)
            for each in _TENANT
        ),
    )
)
"""All features in order: of the cell, of what is set, of the tenants. The slots of tenants that a task does
not have are 0."""


def features(groups: Collection[str]) -> tuple[Feature, ...]:
    """The features of some groups, in order: those of `Task.groups` are what an agent sees."""
    return tuple(feature for feature in FEATURES if feature.group in groups)


def feature_names(task: Task) -> list[str]:
    """Names of the observation's entries in a task."""
    return [feature.name for feature in features(task.groups)]
