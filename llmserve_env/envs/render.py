"""Pictures of an episode: a dashboard as text, as an image, as a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llmserve_env.actions import CONTROLS, finite
from llmserve_env.hardware.profile import TIERS
from llmserve_env.report.figures import BLUE, GREY, INK, ORANGE, new_figure, picture_file
from llmserve_env.rewards import COMPONENTS

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from llmserve_env.tasks import Task

_SIZE = (11.0, 6.4)  # inches
_DPI = 100
_PARTS = (BLUE, "#7fb2d9", "#9bbf85", "#e8c15c", "#b08fc7")
"""Colours of the reward's components."""


def dashboard_text(
    task: Task, windows: NDArray[np.void], actions: NDArray[np.void], components: NDArray[np.float64]
) -> str:
    """The last window and the score so far in a few lines.

    Args:
        task: what is played.
        windows: WINDOW[k], the windows so far.
        actions: ACTION[k], what was set in each.
        components: float64[k, 5], parts of each reward.
    """
    lines = [f"{task.title} ({task.id})  window {len(windows)}/{task.windows}"]
    if not len(windows):
        return "\n".join([*lines, "no window has been served yet"])
    window, promise_s = windows[-1], min(tenant.ttft_slo_s for tenant in task.tenants)
    parts = components[-1]
    score = components.sum() / task.windows
    lines[0] += f"  t {window['end_s']:g} s  reward {parts.sum():.3f}  score so far {score:.3f}"
    ended = window["completed"] + window["failed"] + window["cancelled"]
    met = f"{window['tenant_in_slo'].sum()}/{ended}"
    rows = (
        (
            "requests",
            f"arrived {window['arrived']}  waiting {window['waiting']}  running {window['running']}  "
            f"in SLO {met} of those that ended",
        ),
        (
            "TTFT",
            f"p50 {_ms(window['p50_ttft_s'])}  p99 {_ms(window['p99_ttft_s'])}  "
            f"(tightest SLO {_ms(promise_s)})",
        ),
        ("between steps", f"p50 {_ms(window['p50_gap_s'])}  p99 {_ms(window['p99_gap_s'])}"),
        ("KV cache", f"{_bar(window['kv_occupancy'])} {window['kv_occupancy']:4.0%}"),
        ("GPU busy", f"{_bar(_busy(task, windows)[-1])} {_busy(task, windows)[-1]:4.0%}"),
        ("reward", "  ".join(f"{name} {part:.3f}" for name, part in zip(COMPONENTS, parts, strict=True))),
        ("set", "  ".join(f"{name} {_value(name, actions[-1][name])}" for name in CONTROLS)),
    )
    return "\n".join([*lines, *(f"  {name:<14}{text}" for name, text in rows)])


def dashboard_image(
    task: Task, windows: NDArray[np.void], actions: NDArray[np.void], components: NDArray[np.float64]
) -> NDArray[np.uint8]:
    """The episode so far as a picture, uint8[640, 1100, 3]; arguments as `dashboard_text`."""
    with new_figure(_SIZE) as figure:
        figure.set_dpi(_DPI)
        _draw(figure, task, windows, actions, components)
        figure.canvas.draw()
        picture = np.asarray(figure.canvas.buffer_rgba())[..., :3]  # type: ignore[attr-defined] # of Agg
    return np.ascontiguousarray(picture)


def draw_episode(
    path: Path,
    task: Task,
    windows: NDArray[np.void],
    actions: NDArray[np.void],
    components: NDArray[np.float64],
) -> None:
    """Write the picture of an episode to a file, whose suffix is the format; arguments as `dashboard_text`.

    Raises:
        InputError: the file cannot be written.
    """
    with picture_file(path, _SIZE) as figure:
        _draw(figure, task, windows, actions, components)


def _draw(
    figure: Figure,
    task: Task,
    windows: NDArray[np.void],
    actions: NDArray[np.void],
    components: NDArray[np.float64],
) -> None:
    figure.set_layout_engine("none")  # the panels stay where they are from frame to frame
    grid = figure.add_gridspec(
        3, 2, left=0.045, right=0.945, bottom=0.085, top=0.885, hspace=0.42, wspace=0.29
    )
    score = components.sum() / task.windows
    figure.text(0.012, 0.955, task.title, fontsize=13, weight="bold", color=INK, va="center")
    state = f"{task.cell.engines} x {task.profile.name}    window {len(windows)} of {task.windows}"
    figure.text(0.985, 0.955, f"{state}    score {score:.3f}", color=GREY, ha="right", va="center")
    time_s = windows["end_s"]
    panels = [figure.add_subplot(grid[row, column]) for row in range(3) for column in range(2)]
    load, ttft, use, gaps, reward, setting = panels
    _load(load, time_s, windows)
    ttft.set_title("Time to first token (ms)")
    _latency(ttft, windows, "ttft", {tenant.ttft_slo_s for tenant in task.tenants})
    gaps.set_title("Time between steps (ms)")
    _latency(gaps, windows, "gap", {tenant.tpot_slo_s for tenant in task.tenants})
    _use(use, task, time_s, windows)
    _reward(reward, time_s, components)
    _settings(setting, task, time_s, actions)
    for axes in panels:
        axes.set_xlim(0, task.horizon_s)
    for axes in panels[:4]:
        axes.tick_params(labelbottom=False)
    setting.set_xlabel("time (s)")


def _load(axes: Axes, time_s: NDArray[np.float64], windows: NDArray[np.void]) -> None:
    axes.stackplot(
        time_s,
        windows["running"],
        windows["waiting"],
        colors=[BLUE, ORANGE],
        labels=["running", "waiting"],
        alpha=0.8,
        lw=0,
    )
    axes.set_title("Requests")
    axes.set_ylim(0, max(4.0, 1.05 * _top(windows["running"] + windows["waiting"])))
    _legend(axes)


def _latency(axes: Axes, windows: NDArray[np.void], name: str, promises_s: set[float]) -> None:
    """Median and 99th percentile of the latency `name` of WINDOW, with what the tenants were promised."""
    time_s = windows["end_s"]
    for promise_s in sorted(promises_s):
        axes.axhline(1e3 * promise_s, color=INK, lw=1.0, ls=(0, (4, 2)))
    axes.plot([], [], color=INK, lw=1.0, ls=(0, (4, 2)), label="SLO")
    median, worst = (1e3 * windows[f"{share}_{name}_s"] for share in ("p50", "p99"))
    axes.fill_between(time_s, median, worst, color=ORANGE, alpha=0.18, lw=0)
    axes.plot(time_s, worst, color=ORANGE, lw=1.2, label="p99")
    axes.plot(time_s, median, color=BLUE, lw=1.2, label="p50")
    axes.set_yscale("log")
    seen = np.concatenate([median, worst, [1e3 * promise for promise in promises_s]])
    seen = seen[np.isfinite(seen) & (seen > 0)]
    axes.set_ylim(seen.min() / 1.6, seen.max() * 1.6)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    _legend(axes)


def _use(axes: Axes, task: Task, time_s: NDArray[np.float64], windows: NDArray[np.void]) -> None:
    axes.fill_between(
        time_s, 100 * windows["kv_occupancy"], color=BLUE, alpha=0.35, lw=0, label="KV blocks held"
    )
    axes.plot(time_s, 100 * _busy(task, windows), color=INK, lw=1.0, label="GPU busy")
    up = 100 * windows["engines_up"] / task.cell.engines
    axes.plot(time_s, up, color=ORANGE, lw=1.2, ls=(0, (1, 1)), label="engines up")
    axes.set_title("In use (%)")
    axes.set_ylim(0, 104)
    _legend(axes)


def _reward(axes: Axes, time_s: NDArray[np.float64], components: NDArray[np.float64]) -> None:
    span = max(len(time_s) // 60, 1)  # windows vary with the requests that happen to end in them
    smooth = np.array([_mean(part, span) for part in components.T]).reshape(len(COMPONENTS), -1)
    axes.stackplot(time_s, smooth, colors=_PARTS, labels=COMPONENTS, alpha=0.9, lw=0)
    axes.set_title("Reward")
    axes.set_xlabel("time (s)" if span == 1 else f"time (s), mean of {span} windows")
    axes.set_ylim(0, max(1.0, 1.05 * _top(smooth.sum(axis=0))))
    _legend(axes)


def _settings(axes: Axes, task: Task, time_s: NDArray[np.float64], actions: NDArray[np.void]) -> None:
    """A lane for each control that the agent has: where its value lies between the grid's first and last."""
    everything = task.grid.all()
    lanes = [name for name, count in zip(CONTROLS, task.grid.nvec, strict=True) if count > 1]
    start_s = np.concatenate([np.zeros(min(len(time_s), 1)), time_s])
    for lane, name in enumerate(reversed(lanes)):
        codes = np.unique(everything[name])
        share = np.interp(finite(actions[name]), finite(codes), np.linspace(0, 1, len(codes)))
        steps = np.concatenate([share[:1], share])
        axes.fill_between(
            start_s, lane + 0.1, lane + 0.1 + 0.75 * steps, step="pre", color=BLUE, alpha=0.25, lw=0
        )
        axes.step(start_s, lane + 0.1 + 0.75 * steps, where="pre", color=BLUE, lw=1.0)
        if len(actions):
            place: Any = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 8}
            axes.text(1.012, lane + 0.48, _value(name, actions[-1][name]), color=INK, weight="bold", **place)
    axes.set_yticks(
        [lane + 0.48 for lane in range(len(lanes))], [name.replace("_", " ") for name in reversed(lanes)]
    )
    axes.set_ylim(0, max(len(lanes), 1))
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.grid(False, axis="y")
    axes.set_title("Set by the agent")


def _legend(axes: Axes) -> None:
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.005, 0.985), ncols=5, fontsize=8, handlelength=1.2,
        columnspacing=1.0, borderaxespad=0.1, handletextpad=0.5,
    )  # fmt: skip


def _top(values: NDArray[Any]) -> float:
    return float(values.max()) if len(values) else 0.0


def _mean(values: NDArray[np.float64], span: int) -> NDArray[np.float64]:
    """Each value's mean with the span - 1 before it (fewer at the start)."""
    total = np.cumsum(np.concatenate([np.zeros(1), values]))
    ends = np.arange(1, len(total))
    starts = np.maximum(ends - span, 0)
    mean: NDArray[np.float64] = (total[ends] - total[starts]) / (ends - starts)
    return mean


def _busy(task: Task, windows: NDArray[np.void]) -> NDArray[np.float64]:
    return np.minimum(windows["busy_s"] / (task.window_s * task.cell.engines), 1.0)


def _value(name: str, code: Any) -> str:
    if name == "quantization_tier":
        return TIERS[int(code)]
    if name in ("prefill_decode_split", "priority_routing"):
        return "on" if code else "off"
    return "none" if code == np.inf else f"{code:g}"


def _ms(seconds: float) -> str:
    return "-" if np.isnan(seconds) else f"{1e3 * seconds:.0f} ms"


def _bar(share: float) -> str:
    filled = round(20 * min(float(share), 1.0))
    return "#" * filled + "." * (20 - filled)
