"""What the commands draw of requests that have been served."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmserve_env.figures import BLUE, GREY, INK, ORANGE, picture_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from llmserve_env.commands._measured import Latencies
    from llmserve_env.commands._serving import Served

_PANELS = (("ttft", "Time to first token", "s", 1.0), ("tpot", "Time per output token", "ms", 1e3))
_E2E = ("e2e", "End to end", "s", 1.0)


def draw_validation(measured: Latencies, simulated: Latencies, title: str, path: Path) -> None:
    """Draw the latencies of a measured run and of its replay, and the requests that decode over time.

    Args:
        measured: the real engine's.
        simulated: the replay's, of the same requests.
        title: of the picture.
        path: its file; the suffix is the format.

    Raises:
        InputError: the file cannot be written.
    """
    runs = (("measured", measured, INK, "-"), ("simulated", simulated, ORANGE, (0, (4, 1.5))))
    with picture_file(path, (9.0, 5.6)) as figure:
        axes = figure.subplot_mosaic([["ttft", "tpot", "e2e"], ["decoding"] * 3], height_ratios=[1.25, 1.0])
        figure.suptitle(title, fontsize=11, x=0.01, ha="left", color=INK)
        for name, label, unit, factor in (*_PANELS, _E2E):
            for run, latencies, colour, style in runs:
                _cdf(axes[name], factor * getattr(latencies, f"{name}_s"), color=colour, ls=style, label=run)
            axes[name].set(title=label, xlabel=unit)
            axes[name].set_xlim(left=0)
        axes["ttft"].set_ylabel("share of requests")
        figure.legend(*axes["ttft"].get_legend_handles_labels(), loc="upper right", ncols=2)
        span_s = max(measured.makespan_s, simulated.makespan_s)
        for run, latencies, colour, style in runs:
            time_s, count = _decoding(latencies, span_s)
            axes["decoding"].plot(time_s, count, color=colour, ls=style, lw=1.5, label=run)
        axes["decoding"].set(
            title="Requests between their first and last token",
            xlabel="time since the first arrival (s)",
            ylabel="requests",
            xlim=(0, span_s),
        )
        axes["decoding"].set_ylim(bottom=0)


def draw_demo(runs: Sequence[tuple[str, Served]], title: str, path: Path) -> None:
    """Draw what the users of several cells got, and how full the cells were.

    Args:
        runs: a name for each cell, and what it served; all with the same tenants.
        title: of the picture.
        path: its file; the suffix is the format.

    Raises:
        InputError: the file cannot be written.
    """
    colours = (BLUE, ORANGE)
    with picture_file(path, (10.0, 8.0)) as figure:
        columns = range(len(runs))
        panels: list[Any] = [
            [name for name, *_ in _PANELS],
            [f"load {i}" for i in columns],
            [f"kv {i}" for i in columns],
        ]
        axes = figure.subplot_mosaic(panels, height_ratios=[1.2, 1.0, 0.8])
        figure.suptitle(title, fontsize=11, x=0.01, ha="left", color=INK)
        for name, label, unit, factor in _PANELS:
            _slo_panel(axes[name], runs, colours, name, factor)
            axes[name].set(title=label, xlabel=unit, ylabel="share of requests")
        figure.legend(*axes["ttft"].get_legend_handles_labels(), loc="upper right", ncols=len(runs))
        for column, (run, served) in enumerate(runs):
            load, kv = axes[f"load {column}"], axes[f"kv {column}"]
            _load_panels(load, kv, served, colours[column])
            load.set_title(f"{run}: requests in the cell")
            kv.set_title(f"{run}: KV cache held")


def _slo_panel(
    axes: Axes, runs: Sequence[tuple[str, Served]], colours: Sequence[str], name: str, factor: float
) -> None:
    """Distribution of a latency for each cell on a log axis, with the tenants' promises."""
    for (run, served), colour in zip(runs, colours, strict=True):
        values = factor * getattr(served.outcomes, f"{name}_s")
        _cdf(axes, values, color=colour, label=run)
    for tenant in runs[0][1].workload.tenants:
        promise = factor * getattr(tenant, f"{name}_slo_s")
        axes.axvline(promise, color=GREY, lw=1.0, ls=(0, (3, 2)))
        place: dict[str, Any] = {
            "rotation": 90,
            "ha": "right",
            "va": "bottom",
            "transform": axes.get_xaxis_transform(),
        }
        axes.text(promise, 0.02, f"{tenant.name} SLO ", color=GREY, fontsize=8, **place)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _load_panels(load: Axes, kv: Axes, served: Served, colour: str) -> None:
    """Running and waiting requests, and KV occupancy, at the end of each window."""
    windows = [window for window in served.windows if np.isfinite(window.end_s)]
    time_s = [window.end_s for window in windows]
    waiting = [window.waiting for window in windows]
    running = [window.running for window in windows]
    load.stackplot(
        time_s, running, waiting, colors=[colour, INK], alpha=0.75, labels=["running", "waiting"], lw=0
    )
    kv.fill_between(time_s, [100 * window.kv_occupancy for window in windows], color=colour, alpha=0.75, lw=0)
    load.set(ylabel="requests", xlim=(0, time_s[-1]))
    load.tick_params(labelbottom=False)
    load.legend(loc="upper left", ncols=2)
    load.set_ylim(0, load.get_ylim()[1] * 1.15)  # room for the legend
    kv.set(xlabel="time (s)", ylabel="% of blocks", xlim=(0, time_s[-1]), ylim=(0, 102))


def _cdf(axes: Axes, values: NDArray[np.float64], **look: Any) -> None:
    values = values[~np.isnan(values)]
    if len(values):
        axes.ecdf(values, lw=1.6, **look)
    axes.set_ylim(0, 1.01)


def _decoding(latencies: Latencies, span_s: float) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Times, and how many requests have their first but not their last token then."""
    time_s = np.linspace(0.0, span_s, 600)
    first_s = np.sort(latencies.arrival_s + latencies.ttft_s)  # nan goes last
    last_s = np.sort(latencies.arrival_s + latencies.e2e_s)
    begun, ended = (np.searchsorted(times, time_s, side="right") for times in (first_s, last_s))
    return time_s, begun - ended
