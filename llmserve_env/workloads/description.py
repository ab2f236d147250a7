"""A workload in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from llmserve_env.errors import InputError
from llmserve_env.workloads.workload import Workload

SCALES_S = (1.0, 10.0, 60.0)
"""Widths of the windows in which arrivals are counted (s)."""

SPARSE_SILENT_SHARE = 0.5
"""A workload is sparse if more than this share of its 10 s windows holds no request."""

BURSTY_CV = 1.5
"""Otherwise it is bursty from this inter-arrival CV (Poisson 1, Azure conversations 1.09) ..."""

BURSTY_DISPERSION = 10.0
"""... or from this index of dispersion at 10 s (Poisson 1, Azure conversations 3.9)."""

_CLASS_SCALE_S = 10.0

MOST_WINDOWS = 2**24
"""Windows of which each is counted: more than half a year of seconds takes memory, and says nothing."""


@dataclass(frozen=True)
class LengthStatistics:
    """Moments and quantiles of a length (tokens); quantiles interpolate linearly."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: int


@dataclass(frozen=True)
class ScaleStatistics:
    """Arrivals counted in windows of one width; the last, partial window is left out.

    Attributes:
        window_s: the width (s).
        dispersion: variance over mean of the counts (Poisson: 1); None with fewer than two windows, or more
            than `MOST_WINDOWS`.
        peak_to_mean: largest count over the mean; None as `dispersion`.
    """

    window_s: float
    dispersion: float | None
    peak_to_mean: float | None


@dataclass(frozen=True)
class PrefixReuse:
    """What an infinite prefix cache that keeps every prompt block would hit.

    Attributes:
        block_tokens: tokens in a block.
        hit_share: part of all blocks that an earlier request had.
        mostly_hit_share: part of the requests with more than half of their blocks hit.
    """

    block_tokens: int
    hit_share: float
    mostly_hit_share: float


@dataclass(frozen=True)
class Description:
    """A workload's statistics.

    Attributes:
        source: URI or file.
        requests: their number.
        duration_s: from the first arrival to the last (s).
        rate_rps: requests over the duration; None if all arrive at once.
        gap_cv: coefficient of variation of the inter-arrival times; None if there is no gap > 0.
        scales: arrivals counted at 1, 10 and 60 s.
        prompt: prompt lengths.
        output: output lengths.
        length_correlation: Pearson's, of prompt and output length; None if one of them does not vary.
        prefix_reuse: None if the workload names no prefix blocks.
        tenants: requests by tenant.
        traffic: "sparse", "bursty" or "steady" by the thresholds above; "undetermined" below two windows.
    """

    source: str
    requests: int
    duration_s: float
    rate_rps: float | None
    gap_cv: float | None
    scales: tuple[ScaleStatistics, ...]
    prompt: LengthStatistics
    output: LengthStatistics
    length_correlation: float | None
    prefix_reuse: PrefixReuse | None
    tenants: dict[str, int]
    traffic: str

    def as_dict(self) -> dict[str, object]:
        """Plain types, as they go to JSON."""
        return asdict(self)

    def as_table(self) -> str:
        """Lines for a terminal."""
        scales = [f"{scale.window_s:g}" for scale in self.scales]
        rows = [
            ("requests", f"{self.requests:,} over {self.duration_s:,.1f} s"),
            ("rate", f"{_number(self.rate_rps)} requests/s"),
            ("traffic", self.traffic),
            ("inter-arrival CV", _number(self.gap_cv)),
            (
                f"index of dispersion at {'/'.join(scales)} s",
                " / ".join(_number(scale.dispersion) for scale in self.scales),
            ),
            (
                f"peak/mean at {'/'.join(scales)} s",
                " / ".join(_number(scale.peak_to_mean) for scale in self.scales),
            ),
            ("prompt tokens mean/p50/p90/p99/max", _lengths(self.prompt)),
            ("output tokens mean/p50/p90/p99/max", _lengths(self.output)),
            ("prompt-output correlation", _number(self.length_correlation)),
        ]
        if self.prefix_reuse is not None:
            reuse = self.prefix_reuse
            rows.append(
                (
                    f"prefix blocks of {reuse.block_tokens} hit, infinite cache",
                    f"{reuse.hit_share:.1%}; {reuse.mostly_hit_share:.1%} of requests more than half",
                )
            )
        if len(self.tenants) > 1:
            shares = [f"{name} {count / self.requests:.1%}" for name, count in list(self.tenants.items())[:6]]
            more = ", ..." if len(self.tenants) > len(shares) else ""
            rows.append(("tenants", ", ".join(shares) + more))
        width = max(len(name) for name, _ in rows)
        return "\n".join([self.source, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def describe(workload: Workload) -> Description:
    """Measure a workload.

    Args:
        workload: at least one request.

    Raises:
        InputError: it holds no request.
    """
    if len(workload) == 0:
        raise InputError("holds no request to describe", file=workload.source or None)
    gaps = np.diff(workload.arrival_s)
    duration_s = float(workload.arrival_s[-1] - workload.arrival_s[0])
    scales = tuple(_scale(workload.arrival_s, window_s) for window_s in SCALES_S)
    gap_cv = float(gaps.std() / gaps.mean()) if duration_s > 0 else None
    counts = np.bincount(workload.tenant, minlength=len(workload.tenants))
    return Description(
        source=workload.source,
        requests=len(workload),
        duration_s=duration_s,
        rate_rps=len(workload) / duration_s if duration_s > 0 else None,
        gap_cv=gap_cv,
        scales=scales,
        prompt=_length_statistics(workload.prompt_tokens),
        output=_length_statistics(workload.output_tokens),
        length_correlation=_correlation(workload.prompt_tokens, workload.output_tokens),
        prefix_reuse=prefix_reuse(workload),
        tenants={tenant.name: int(count) for tenant, count in zip(workload.tenants, counts, strict=True)},
        traffic=_traffic(workload.arrival_s, gap_cv, scales[SCALES_S.index(_CLASS_SCALE_S)]),
    )


def window_counts(arrival_s: NDArray[np.float64], window_s: float) -> NDArray[np.int64]:
    """Arrivals in each full window since the first one, int64[windows]; no last, partial window."""
    since = arrival_s - arrival_s[0]
    windows = int(since[-1] // window_s)
    return np.bincount((since // window_s).astype(np.int64), minlength=windows)[:windows]


def prefix_reuse(workload: Workload) -> PrefixReuse | None:
    """Hits of an infinite prefix cache: blocks that an earlier request had, by id and depth."""
    blocks = len(workload.prefix_ids)
    if not workload.prefix_block_tokens or blocks == 0:
        return None
    counts = np.diff(workload.prefix_offsets)
    request = np.repeat(np.arange(len(workload)), counts)
    depth = np.arange(blocks) - np.repeat(workload.prefix_offsets[:-1], counts)
    _, number = np.unique(workload.prefix_ids, return_inverse=True)
    _, first, text = np.unique(
        number * (int(depth.max()) + 1) + depth, return_index=True, return_inverse=True
    )
    hit = request[first[text]] < request
    hits = np.bincount(request, weights=hit, minlength=len(workload))
    return PrefixReuse(workload.prefix_block_tokens, float(hit.mean()), float((hits > counts / 2).mean()))


def _scale(arrival_s: NDArray[np.float64], window_s: float) -> ScaleStatistics:
    if (arrival_s[-1] - arrival_s[0]) / window_s > MOST_WINDOWS:
        return ScaleStatistics(window_s, None, None)
    counts = window_counts(arrival_s, window_s)
    if len(counts) < 2:
        return ScaleStatistics(window_s, None, None)
    return ScaleStatistics(window_s, float(counts.var() / counts.mean()), float(counts.max() / counts.mean()))


def _traffic(arrival_s: NDArray[np.float64], gap_cv: float | None, scale: ScaleStatistics) -> str:
    if len(arrival_s) < SPARSE_SILENT_SHARE * ((arrival_s[-1] - arrival_s[0]) // scale.window_s):
        return "sparse"
    if scale.dispersion is None or gap_cv is None:
        return "undetermined"
    silent = (window_counts(arrival_s, scale.window_s) == 0).mean()
    if silent > SPARSE_SILENT_SHARE:
        return "sparse"
    return "bursty" if gap_cv >= BURSTY_CV or scale.dispersion >= BURSTY_DISPERSION else "steady"


def _length_statistics(tokens: NDArray[np.int32]) -> LengthStatistics:
    p50, p90, p99 = np.percentile(tokens, (50, 90, 99))
    return LengthStatistics(float(tokens.mean()), float(p50), float(p90), float(p99), int(tokens.max()))


def _correlation(prompt: NDArray[np.int32], output: NDArray[np.int32]) -> float | None:
    if prompt.min() == prompt.max() or output.min() == output.max():
        return None
    return float(np.corrcoef(prompt, output)[0, 1])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"


def _lengths(lengths: LengthStatistics) -> str:
    parts = (lengths.mean, lengths.p50, lengths.p90, lengths.p99, lengths.max)
    return " / ".join(f"{value:,.0f}" for value in parts)
