"""What the commands draw of requests that have been served."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmserve_env.report.figures import INK, ORANGE, picture_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from llmserve_env.commands.shared.measured import Latencies

_PANELS = (("ttft", "Time to first token", "s", 1.0), ("tpot", "Time per output token", "ms", 1e3))
_E2E = ("e2e", "End to end", "s", 1.0)


def draw_validation(measured: Latencies, simulated: Latencies, title: str, path: Path) -> None:
    """Draw the latencies of a measured run and of its replay, and the requests that decode over time.

    Args:
        measured: the real engine's.
        simulated: the replay's, of the same requests.
        title: title of the picture.
        path: file of the picture; the suffix is the format.

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
