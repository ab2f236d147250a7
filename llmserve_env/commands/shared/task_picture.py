"""What `llmserve tasks` draws: one episode's traffic, and what it does to a cell that nobody steers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llmserve_env.controls import to_array
from llmserve_env.episode import EpisodeBatch
from llmserve_env.report.figures import BLUE, GREY, INK, ORANGE, picture_file
from llmserve_env.schema import ServeAction

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from llmserve_env.tasks import Task

SEED = 1
"""A training seed: pictures show nothing of those that results are reported on."""

_BINS = 180  # at most: finer ones are all noise
_TENANTS = (BLUE, ORANGE, "#9bbf85", "#b08fc7", "#e8c15c", GREY)
_BANDS = ("#eef2f7", "#ffffff")
_NARROW = 0.045  # share of an episode that a regime's name needs


def draw_task(task: Task, path: Path) -> None:
    """Draw the episode of a training seed: arrivals, prompt tokens and requests in flight, by tenant.

    Args:
        task: task that is drawn; its cell stays in the configuration that it starts with.
        path: file of the picture; its suffix is the format.

    Raises:
        InputError: the file cannot be written.
    """
    requests, windows = task.requests(SEED), _play(task)
    step_s = task.window_s * max(-(-task.windows // _BINS), 1)
    edges_s = np.append(np.arange(0, task.horizon_s - 1e-9, step_s), task.horizon_s)
    count, tokens = np.zeros((2, len(task.tenants), len(edges_s) - 1))
    for index in range(len(task.tenants)):
        own = requests.tenant == index
        count[index] = np.histogram(requests.arrival_s[own], edges_s)[0]
        tokens[index] = np.histogram(requests.arrival_s[own], edges_s, weights=requests.prompt_tokens[own])[0]
    in_flight = windows["tenant_in_flight"][:, : len(task.tenants)].T
    with picture_file(path, (10.0, 6.8)) as figure:
        panels: Any = figure.subplots(3, 1, sharex=True)
        figure.suptitle(
            f"{task.title}\n{task.id}, training seed {SEED}: {len(requests):,} requests on "
            f"{task.cell.engines} x {task.profile.name}",
            fontsize=11, x=0.01, ha="left", color=INK,
        )  # fmt: skip
        _stack(panels[0], task, edges_s, count / np.diff(edges_s))
        _stack(panels[1], task, edges_s, tokens / np.diff(edges_s))
        _stack(panels[2], task, np.append(0.0, windows["end_s"]), in_flight.astype(float))
        default = task.start == ServeAction()
        held = "vLLM's defaults" if default else "the configuration that it starts with"
        panels[0].set(title="Arrivals (requests/s)")
        panels[1].set(title="Arrivals (prompt tokens/s)")
        panels[2].set(title=f"Requests in flight under {held}", xlabel="time (s)", xlim=(0, task.horizon_s))
        for axes in panels:
            _bands(axes, task, named=axes is panels[0])
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6))


def _play(task: Task) -> NDArray[np.void]:
    """WINDOW[windows] of the episode in the configuration that the cell starts with."""
    batch = EpisodeBatch(task)
    batch.reset([SEED])
    action, windows = to_array([task.start]), []
    while not batch.over[0]:
        batch.step(action)
        windows.append(batch.windows[0].copy())
    return np.array(windows)


def _stack(axes: Axes, task: Task, edges_s: NDArray[np.float64], values: NDArray[np.float64]) -> None:
    """Steps of float64[tenant, len(edges_s) - 1] on top of each other."""
    base = np.zeros(values.shape[1])
    for index, (tenant, row) in enumerate(zip(task.tenants, values, strict=True)):
        top = base + row
        colour = _TENANTS[index % len(_TENANTS)]
        axes.stairs(top, edges_s, baseline=base, fill=True, color=colour, alpha=0.85, lw=0, label=tenant.name)
        base = top
    axes.set_ylim(0, 1.05 * max(float(base.max(initial=0.0)), 1e-9))


def _bands(axes: Axes, task: Task, *, named: bool) -> None:
    """Shade the regimes, and write their names above the panel."""
    if task.scenario is None:
        return
    axes.grid(False, axis="x")
    visits: list[tuple[float, str]] = []
    for visit in task.scenario.timeline(SEED, task.horizon_s):
        if not visits or visits[-1][1] != visit[1]:
            visits.append(visit)
    names = [regime.name for regime in task.scenario.regimes]
    ends_s = [start_s for start_s, _ in visits[1:]] + [task.horizon_s]
    for number, ((start_s, name), end_s) in enumerate(zip(visits, ends_s, strict=True)):
        shade = names.index(name) if len(names) == len(_BANDS) else number
        axes.axvspan(start_s, end_s, color=_BANDS[shade % len(_BANDS)], lw=0, zorder=0)
        if number:
            axes.axvline(start_s, color=GREY, lw=0.8, ls=(0, (3, 3)))
        if named and end_s - start_s > _NARROW * task.horizon_s:
            place: Any = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "top"}
            axes.text((start_s + end_s) / 2, 0.97, name, color=INK, fontsize=8.5, style="italic", **place)
    if named:
        axes.set_ylim(0, axes.get_ylim()[1] * 1.18)  # room for the names
