"""A workload in one picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmserve_env.report.figures import BLUE, INK, ORANGE, picture_file
from llmserve_env.workloads.description import Description

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from llmserve_env.workloads.workload import Workload


def draw(workload: Workload, description: Description, path: Path) -> None:
    """Draw arrivals over time, the gaps between them, and the lengths.

    Args:
        workload: what to draw.
        description: its statistics, from `describe`.
        path: path of the picture; its suffix is the format.

    Raises:
        InputError: the suffix is none of png, svg and pdf, or the file cannot be written.
    """
    with picture_file(path, (9.0, 6.2)) as figure:
        axes = figure.subplot_mosaic([["rate"] * 3, ["gaps", "prompt", "output"]], height_ratios=[1.15, 1.0])
        figure.suptitle(_title(description), fontsize=11, x=0.01, ha="left", color=INK)
        _rate(axes["rate"], workload, description)
        _gaps(axes["gaps"], workload, description)
        _lengths(axes["prompt"], workload.prompt_tokens, "Prompt", BLUE)
        _lengths(axes["output"], workload.output_tokens, "Output", ORANGE)


def _title(description: Description) -> str:
    source = description.source
    if "://" not in source:
        source = Path(source).name
    source = source if len(source) <= 90 else f"{source[:40]} ... {source[-45:]}"
    return f"{source}\n{description.requests:,} requests, {description.traffic}"


def _rate(axes: Axes, workload: Workload, description: Description) -> None:
    since = workload.arrival_s - workload.arrival_s[0]
    span = max(description.duration_s, 1.0)
    fine_s = _nice(span / 600)
    for window_s, colour, width, alpha in ((fine_s, BLUE, 0.6, 0.45), (_nice(span / 40), BLUE, 1.8, 1.0)):
        edges = np.arange(0.0, span + window_s, window_s)
        if len(edges) > 2:
            edges = edges[edges <= span + 1e-9]
        rate = np.histogram(since, edges)[0] / window_s
        axes.stairs(
            rate, edges, color=colour, lw=width, alpha=alpha, label=f"{window_s:g} s windows", baseline=None
        )
    if description.rate_rps is not None:
        mean = f"mean {description.rate_rps:,.3g}/s"
        axes.axhline(description.rate_rps, color=ORANGE, lw=1.2, ls=(0, (4, 3)), label=mean)
    axes.set(title="Arrivals", xlabel="time since the first arrival (s)", ylabel="requests/s", xlim=(0, span))
    axes.set_ylim(0, axes.get_ylim()[1] * 1.12)  # room for the legend
    axes.legend(loc="upper right", ncols=3)


def _gaps(axes: Axes, workload: Workload, description: Description) -> None:
    gaps = np.diff(workload.arrival_s)
    positive = gaps[gaps > 0]
    axes.set(title="Inter-arrival times", xlabel="gap (s)", ylabel="share of gaps")
    if len(positive) == 0:
        return
    low, high = np.quantile(positive, 0.001), positive.max()
    bins = np.geomspace(low, high * 1.001, 45) if high > low else np.array([low * 0.9, low * 1.1])
    weights = np.full(len(positive), 1 / len(gaps))
    axes.hist(positive, bins.tolist(), weights=weights, color=BLUE, alpha=0.75, label="workload")
    exponential = -np.diff(np.exp(-bins / gaps.mean()))
    axes.stairs(exponential, bins, color=ORANGE, lw=1.3, label="Poisson", baseline=None)
    axes.set_xscale("log")
    axes.legend(loc="upper left", title=f"CV {description.gap_cv:.2f}", alignment="left")


def _lengths(axes: Axes, tokens: NDArray[np.int32], name: str, colour: str) -> None:
    low, high = max(1, int(tokens.min())), int(tokens.max())
    bins = np.geomspace(low, high + 1, 45) if high > low else np.array([low * 0.9, low * 1.1])
    axes.hist(tokens, bins.tolist(), weights=np.full(len(tokens), 1 / len(tokens)), color=colour, alpha=0.75)
    axes.set(title=f"{name} lengths", xlabel="tokens", ylabel="share of requests", xscale="log")
    for quantile, label in ((50, "p50"), (99, "p99")):
        value = float(np.percentile(tokens, quantile))
        axes.axvline(value, color="#374151", lw=1.0, ls=(0, (2, 2)))
        text = f" {label} {value:,.0f}"
        axes.text(
            value,
            0.98,
            text,
            transform=axes.get_xaxis_transform(),
            va="top",
            fontsize=8,
            rotation=90,
            ha="right",
        )


def _nice(width: float) -> float:
    """The next of 1, 2, 5, 10, 20, 50, ... at or above a width, at least 1 (s)."""
    power = 10.0 ** np.floor(np.log10(max(width, 1.0)))
    return float(
        next(step * power for step in (1, 2, 5, 10) if step * power >= min(max(width, 1.0), 10 * power))
    )
