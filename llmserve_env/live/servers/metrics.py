"""What a vLLM server shows at /metrics, by meaning, whatever its version calls it.

`METRICS` has the names. Those of 0.32 are read off a running server; the older ones are from vLLM's sources
(`vllm/v1/metrics/loggers.py`, before 0.11 also `vllm/engine/metrics.py`) and its pull requests, whose numbers
stand there. A server that shows an old name beside the new one is read by the new one alone.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from math import inf, isfinite, isnan, nan
from typing import TYPE_CHECKING, Literal

from llmserve_env.errors import InputError, missing_package

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence, Set

Labels = tuple[tuple[str, str], ...]
"""Labels of a series, sorted."""


@dataclass(frozen=True)
class Metric:
    """One meaning.

    Attributes:
        kind: as Prometheus has it.
        names: without `vllm:` and the counters' `_total`, newest first.
        meaning: meaning in words.
        history: which names changed when.
        by: label by which it is told apart.
        needed: whether a live run needs it.
    """

    kind: Literal["gauge", "counter", "histogram"]
    names: tuple[str, ...]
    meaning: str
    history: str = ""
    by: str | None = None
    needed: bool = False


METRICS = {
    "waiting": Metric("gauge", ("num_requests_waiting",), "requests in the queue", needed=True),
    "running": Metric("gauge", ("num_requests_running",), "requests in a batch", needed=True),
    "kv_occupancy": Metric(
        "gauge",
        ("kv_cache_usage_perc", "gpu_cache_usage_perc"),
        "share of KV blocks that are held",
        "gpu_cache_usage_perc deprecated in 0.9 (18354), removed after 0.11 (29330)",
        needed=True,
    ),
    "preemptions": Metric("counter", ("num_preemptions",), "requests thrown back to the queue", needed=True),
    "prompt_tokens": Metric("counter", ("prompt_tokens",), "tokens of prompts, cached ones too", needed=True),
    "output_tokens": Metric("counter", ("generation_tokens",), "tokens generated", needed=True),
    "prefix_queried_tokens": Metric(
        "counter",
        ("prefix_cache_queries", "gpu_prefix_cache_queries"),
        "tokens looked up in the prefix cache",
        "gpu_prefix_cache_queries deprecated in 0.9 (18354), removed after 0.11 (29330); "
        "counted blocks before 0.9 (18003); not in engine V0",
    ),
    "cached_tokens": Metric(
        "counter",
        ("prefix_cache_hits", "gpu_prefix_cache_hits"),
        "tokens that the prefix cache had",
        "as the queries",
    ),
    "drafted_tokens": Metric(
        "counter",
        ("spec_decode_num_draft_tokens",),
        "draft tokens; only with speculation",
    ),
    "accepted_tokens": Metric(
        "counter",
        ("spec_decode_num_accepted_tokens",),
        "draft tokens that were accepted; only with speculation",
    ),
    "finished": Metric(
        "counter", ("request_success",), "requests over, by reason", by="finished_reason", needed=True
    ),
    "rejected": Metric(
        "counter",
        ("admission_rejections",),
        "requests that a limit of the queue refused, by reason",
        "not in older servers",
        by="reason",
    ),
    "ttft_s": Metric("histogram", ("time_to_first_token_seconds",), "time to first token", needed=True),
    "gap_s": Metric(
        "histogram",
        ("inter_token_latency_seconds", "time_per_output_token_seconds"),
        "time between steps of a sequence",
        "time_per_output_token_seconds, which measured the same, deprecated in 0.11 (24110), hidden in 0.12, "
        "removed in 2026 (32661)",
        needed=True,
    ),
    "e2e_s": Metric("histogram", ("e2e_request_latency_seconds",), "arrival to last token", needed=True),
    "queue_s": Metric(
        "histogram", ("request_queue_time_seconds",), "time in the queue", "not in older servers"
    ),
}
"""Meanings by the names that `telemetry` gives them, units in the names."""

_CONFIG = "cache_config_info"
_STARTED = ("process_start_time_seconds", "vllm:generation_tokens_created")
_NAMES = "|".join([_CONFIG, *(name for metric in METRICS.values() for name in metric.names)])
_OURS = re.compile(
    rf"^(?:{_STARTED[0]}|vllm:(?:{_NAMES})(?:_total|_bucket|_sum|_count|_created)?)[ \t{{].*$", re.MULTILINE
)
_MAX_LINE_CHARS = 8192
_MAX_NUMBER = 2.0**53
"""Of counts beyond it a float does not hold every one; nothing that a server counts comes near."""
_VLLM_LABELS = {"engine", "model_name", "le", "pid"} | {each.by for each in METRICS.values() if each.by}
"""Labels by which a server tells its own series apart; others were added on the way to it."""


@dataclass(frozen=True)
class Histogram:
    """Observations by bucket.

    Attributes:
        bounds: upper bounds of the buckets, ascending, the last one infinite.
        cumulative: observations up to each bound.
        total: sum of what was observed.
    """

    bounds: tuple[float, ...]
    cumulative: tuple[float, ...]
    total: float

    @property
    def count(self) -> float:
        """Observations."""
        return self.cumulative[-1]

    @property
    def mean(self) -> float:
        """Their mean; nan without any."""
        return self.total / self.count if self.count > 0 else nan

    def quantile(self, q: float) -> float:
        """Quantile for 0 < q <= 1, linear within its bucket, as Prometheus' `histogram_quantile` has it.

        One beyond the last finite bound is that bound: nothing tells how far beyond. nan without observations
        or without a finite bound.
        """
        if not 0 < q <= 1:
            raise ValueError(f"expected 0 < q <= 1, found {q}")
        if not self.count > 0 or len(self.bounds) < 2:
            return nan
        rank = q * self.count
        bucket = bisect_left(self.cumulative, rank)
        if bucket >= len(self.bounds) - 1:
            return self.bounds[-2]
        end = self.bounds[bucket]
        if bucket == 0 and end <= 0:
            return end
        start, before = (self.bounds[bucket - 1], self.cumulative[bucket - 1]) if bucket else (0.0, 0.0)
        share = (rank - before) / (self.cumulative[bucket] - before)
        return min(start + (end - start) * share, end)

    def since(self, before: Histogram) -> Histogram:
        """What was observed since; all of it where `before` is of another life or has other buckets."""
        if before.bounds != self.bounds or any(
            new < old for new, old in zip(self.cumulative, before.cumulative, strict=True)
        ):
            return self
        grown, most = [], 0.0
        for new, old in zip(self.cumulative, before.cumulative, strict=True):
            most = max(most, new - old)  # buckets are not read in one instant
            grown.append(most)
        return Histogram(self.bounds, tuple(grown), max(0.0, self.total - before.total))


def add_histograms(histograms: Sequence[Histogram]) -> Histogram:
    """All observations together, by the bounds that all have in common: those of versions differ."""
    common = set.intersection(*(set(each.bounds) for each in histograms))
    bounds = tuple(sorted(common))
    at = [dict(zip(each.bounds, each.cumulative, strict=True)) for each in histograms]
    return Histogram(
        bounds,
        tuple(sum(each[bound] for each in at) for bound in bounds),
        sum(each.total for each in histograms),
    )


@dataclass(frozen=True)
class Scrape:
    """What a server showed at one time.

    Attributes:
        at_s: when it was asked (s of the reader's clock).
        gauges: gauges by meaning, over the server's engines: requests summed, shares weighted by capacity.
        counters: counters by meaning, each series for itself.
        histograms: the same.
        names: metric names by meaning.
        kv_tokens: capacity of the KV cache of all engines; None where an engine does not tell.
        config: what the first engine tells of its cache.
        engines: labels `engine` of its series.
        models: labels `model_name`.
        started: times at which the process and its metrics began, by series.
        servers: servers that the text is of, as `server_of` has them; one without labels where nothing was
            added on the way.
    """

    at_s: float
    gauges: dict[str, float]
    counters: dict[str, dict[Labels, float]]
    histograms: dict[str, dict[Labels, Histogram]]
    names: dict[str, str]
    kv_tokens: float | None
    config: dict[str, str]
    engines: tuple[str, ...]
    models: tuple[str, ...]
    started: dict[Labels, float]
    servers: frozenset[Labels]


def server_of(labels: Labels) -> Labels:
    """Which server of a text a series is of: labels added on the way, such as a gateway's `upstream`."""
    return tuple(label for label in labels if label[0] not in _VLLM_LABELS and label[0] != "series")


def read_metrics(text: str, at_s: float = 0.0) -> Scrape:
    """Read the metrics of a server, or of several in one text that a label tells apart, such as `upstream`.

    Args:
        text: in Prometheus' text format.
        at_s: when the server was asked.

    Raises:
        InputError: it is no such text, has no metric of vLLM, or a number of one that cannot be;
            `prometheus_client` is missing.
    """
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError as error:
        raise missing_package(error) from error

    series: dict[str, dict[Labels, float]] = defaultdict(dict)
    lines = _OURS.findall(text)  # most of the text is of no use here, and the parser is slow
    if max(map(len, lines), default=0) > _MAX_LINE_CHARS:  # and slow by the square of a line's length
        raise InputError(f"a line of more than {_MAX_LINE_CHARS} characters", field="/metrics")
    try:
        for family in text_string_to_metric_families("\n".join(lines) + "\n"):
            for sample in family.samples:
                _note(series[sample.name], sample.name, tuple(sorted(sample.labels.items())), sample.value)
    except InputError:
        raise
    except Exception as error:  # of a parser that was given anybody's text
        said = str(error) or type(error).__name__
        raise InputError(f"expected Prometheus' text format: {said[:200]}", field="/metrics") from error
    if not any(name.startswith("vllm:") for name in series):
        raise InputError("expected metrics of vLLM (vllm:...)", field="/metrics")

    seen = [
        labels
        for name, found in series.items()
        if name.startswith("vllm:") and name != f"vllm:{_CONFIG}"
        for labels in found
    ]
    servers = frozenset(map(server_of, seen))
    added = {name for labels in servers for name, _ in labels}
    config = {_engine(labels, added): dict(labels) for labels in series.get(f"vllm:{_CONFIG}", {})}
    tokens = {engine: _tokens(each) for engine, each in config.items()}
    names: dict[str, str] = {}
    gauges: dict[str, float] = {}
    counters: dict[str, dict[Labels, float]] = {}
    histograms: dict[str, dict[Labels, Histogram]] = {}
    for meaning, metric in METRICS.items():
        for name in (f"vllm:{each}" for each in metric.names):
            if metric.kind == "histogram" and (found := _histograms(name, series)):
                histograms[meaning] = found
            elif metric.kind == "counter" and (counts := _counts(name, series)):
                counters[meaning] = counts
            elif metric.kind == "gauge" and (held := _gauges(name, series, added)):
                share = meaning == "kv_occupancy"
                weights = [tokens.get(engine) for engine, _ in held]
                values = list(held.values())
                gauges[meaning] = weighted_mean(values, weights) if share else sum(values)
            else:
                continue
            names[meaning] = name
            break
    return Scrape(
        at_s,
        gauges,
        counters,
        histograms,
        names,
        _sum_known(tokens.values()),
        next((config[engine] for engine in sorted(config)), {}),
        _values(seen, "engine"),
        _values(seen, "model_name"),
        {
            (("series", name), *labels): value
            for name in _STARTED
            for labels, value in series.get(name, {}).items()
        },
        servers,
    )


def _note(found: dict[Labels, float], name: str, labels: Labels, value: float) -> None:
    """Take a sample of the text.

    Raises:
        InputError: it is there twice, or its number cannot be.
    """
    if labels in found:
        raise InputError(f"{name} is there twice, with the same labels", field="/metrics")
    if abs(value) > _MAX_NUMBER and value not in (inf, -inf):
        raise InputError(f"a number out of range: {name}", field="/metrics")
    found[labels] = float(value)


def weighted_mean(values: Sequence[float], weights: Sequence[float | None]) -> float:
    """Mean by weight; all alike where one is unknown."""
    known = [weight for weight in weights if weight is not None]
    if len(known) < len(values) or not sum(known) > 0:
        return sum(values) / len(values)
    return sum(v * w for v, w in zip(values, known, strict=True)) / sum(known)


def _gauges(
    name: str, series: Mapping[str, dict[Labels, float]], added: Set[str]
) -> dict[tuple[Labels, Labels], float]:
    """By engine and series; some versions repeat a series for each process of the API server."""
    found: dict[tuple[Labels, Labels], float] = {}
    for labels, value in series.get(name, {}).items():
        if 0 <= value < inf:
            key = _engine(labels, added), tuple(label for label in labels if label[0] != "pid")
            found[key] = max(value, found.get(key, value))
    return found


def _counts(name: str, series: Mapping[str, dict[Labels, float]]) -> dict[Labels, float]:
    found = series.get(f"{name}_total") or series.get(name) or {}
    return {labels: value for labels, value in found.items() if 0 <= value < inf}


def _histograms(name: str, series: Mapping[str, dict[Labels, float]]) -> dict[Labels, Histogram]:
    buckets: dict[Labels, dict[float, float]] = defaultdict(dict)
    for labels, value in series.get(f"{name}_bucket", {}).items():
        bound = next((text for key, text in labels if key == "le"), None)
        if bound is not None:
            buckets[tuple(label for label in labels if label[0] != "le")][_bound(name, bound)] = value
    found = {}
    for labels, by_bound in buckets.items():
        if inf in by_bound and all(0 <= value < inf for value in by_bound.values()):  # else it has no count
            bounds = tuple(sorted(by_bound))
            total = series.get(f"{name}_sum", {}).get(labels, nan)
            cumulative = accumulate((by_bound[bound] for bound in bounds), max)
            found[labels] = Histogram(bounds, tuple(cumulative), total if isfinite(total) else nan)
    return found


def _bound(name: str, text: str) -> float:
    with suppress(ValueError):
        if not isnan(bound := float(text)):
            return bound
    raise InputError(f"expected a number as the bound of a bucket of {name}", field="/metrics")


def _tokens(config: Mapping[str, str]) -> float | None:
    blocks, block_tokens = config.get("num_gpu_blocks", ""), config.get("block_size", "")
    if not (blocks.isdecimal() and block_tokens.isdecimal()):
        return None
    tokens = float(blocks) * float(block_tokens)
    return tokens if tokens <= _MAX_NUMBER else None


def _sum_known(values: Iterable[float | None]) -> float | None:
    given = list(values)
    known = [value for value in given if value is not None]
    return sum(known) if given and len(known) == len(given) else None


def _engine(labels: Labels, added: Set[str]) -> Labels:
    """Which engine of which server, by the labels that were added on the way."""
    return tuple(label for label in labels if label[0] == "engine" or label[0] in added)


def _values(series: Iterable[Labels], label: str) -> tuple[str, ...]:
    return tuple(sorted({value for labels in series for name, value in labels if name == label}))
