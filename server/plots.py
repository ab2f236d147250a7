"""Plots of an episode as HTML: curves that stretch with the page, labels that keep their size.

A curve is an SVG without text, stretched to its place with lines of constant width; titles, keys and ticks are
HTML around it. So they are legible at any width and follow the page's colours, light or dark.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from math import ceil, floor, isfinite, isnan, log10
from typing import TYPE_CHECKING

import numpy as np

from llmserve_env.actions import finite
from llmserve_env.hardware.profile import TIERS
from server.ui_trace import PARTS

if TYPE_CHECKING:
    from llmserve_env.schema import GradeResult
    from server.ui_trace import Trace

_MOST_POINTS = 400
_W, _H = 1000.0, 100.0  # of every SVG's own coordinates
_SWITCHES = ("prefill_decode_split", "priority_routing")

CSS = """
.ls { --ls-blue: #2b6ca3; --ls-orange: #d9772b; --ls-ink: #111827; --ls-grey: #6b7280; --ls-grid: #e5e7eb;
  --ls-goodput: #2b6ca3; --ls-latency: #7fb2d9; --ls-memory: #9bbf85; --ls-cost: #e8c15c; --ls-quality: #b08fc7;
  font-size: 13px; color: var(--body-text-color); }
.dark .ls { --ls-blue: #6cb0e8; --ls-orange: #f0a060; --ls-ink: #f3f4f6; --ls-grey: #a1a1aa; --ls-grid: #2b2b30;
  --ls-goodput: #4a8fcb; --ls-latency: #3d6c92; --ls-memory: #7da566; --ls-cost: #c9a23d; --ls-quality: #9673b0; }
.ls-head { display: flex; flex-wrap: wrap; align-items: baseline; justify-content: space-between; gap: 2px 12px;
  margin: 0 0 10px; }
.ls-head h2 { margin: 0; font-size: 16px; font-weight: 600; }
.ls-head span { color: var(--ls-grey); }
.ls-numbers { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); margin: 0 0 12px; padding: 0;
  border: 1px solid var(--border-color-primary); border-radius: 10px; overflow: hidden; }
.ls-numbers div { padding: 8px 12px; min-width: 0; }
.ls-numbers div + div { border-left: 1px solid var(--border-color-primary); }
.ls-numbers dt { font-size: 12px; color: var(--ls-grey); white-space: nowrap; }
.ls-numbers dd { margin: 0; font-size: 17px; font-weight: 600; font-variant-numeric: tabular-nums; white-space: nowrap; }
.ls-numbers small { font-size: 12px; font-weight: 400; color: var(--ls-grey); }
.ls-plots { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px 20px; }
.ls-plot { margin: 0; min-width: 0; }
.ls-wide { grid-column: 1 / -1; }
.ls-plot figcaption { display: flex; flex-wrap: wrap; gap: 0 10px; align-items: baseline; margin-bottom: 4px;
  min-height: 20px; line-height: 20px; }
.ls-plot figcaption b { font-weight: 600; }
.ls-plot figcaption i { font-style: normal; color: var(--ls-grey); margin-left: -5px; }
.ls-key { font-size: 12px; color: var(--ls-grey); white-space: nowrap; }
.ls-key::before { content: ""; display: inline-block; width: 10px; height: 10px; margin-right: 4px; border-radius: 2px;
  background: var(--c); vertical-align: -1px; }
.ls-key.line::before { height: 2px; vertical-align: 3px; border-radius: 0; }
.ls-key.dash::before { height: 0; border-top: 2px dashed var(--c); background: none; vertical-align: 3px; }
.ls-area { position: relative; height: 150px; margin: 0 0 18px 44px; }
.ls-area svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: hidden; display: block; }
.ls-area path { vector-effect: non-scaling-stroke; fill: none; stroke-width: 1.5px; stroke-linejoin: round; }
.ls-area .grid { stroke: var(--ls-grid); stroke-width: 1px; }
.ls-area .dash { stroke: var(--ls-ink); stroke-width: 1.2px; stroke-dasharray: 5 3; }
.ls-area span { position: absolute; font-size: 11px; line-height: 12px; color: var(--ls-grey); white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.ls-area .y { right: 100%; margin-right: 6px; transform: translateY(50%); }
.ls-area .x { top: 100%; margin-top: 5px; transform: translateX(-50%); }
.ls-area .x.last { transform: translateX(-100%); }
.ls-area .now { left: 100%; margin-left: 8px; transform: translateY(50%); color: var(--ls-ink); font-weight: 600; }
.ls-lanes { height: auto; margin-left: 132px; margin-right: 46px; }
.ls-note, .ls-message { margin: 0 0 12px; padding: 8px 12px; border-radius: 8px; border: 1px solid var(--ls-grid);
  border-left: 3px solid var(--ls-orange); overflow-wrap: anywhere; }
.ls-message { border-left-color: #b42318; }
.ls-empty { margin: 0; padding: 40px 16px; text-align: center; color: var(--ls-grey);
  border: 1px dashed var(--ls-grid); border-radius: 10px; }
.ls-grade { width: 100%; border-collapse: collapse; margin: 0; }
.ls-grade caption { text-align: left; font-size: 16px; font-weight: 600; padding: 4px 0 8px; }
.ls-grade th, .ls-grade td { padding: 6px 0; border: 0; border-top: 1px solid var(--border-color-primary); text-align: left;
  vertical-align: top; font-weight: 400; background: none; }
.ls-grade th { width: 130px; color: var(--ls-grey); }
.ls-grade td span { display: inline-block; margin-right: 14px; white-space: nowrap; font-variant-numeric: tabular-nums; }
.ls-grade b { font-weight: 600; }
@media (max-width: 640px) {
  .ls-numbers { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .ls-numbers div:nth-child(4) { border-left: 0; }
  .ls-numbers div:nth-child(n+4) { border-top: 1px solid var(--border-color-primary); }
  .ls-plots { grid-template-columns: minmax(0, 1fr); }
  .ls-grade th { width: 96px; }
}
"""


def board(trace: Trace, note: str = "") -> str:
    """An episode so far: headline numbers, what was not applied, plots.

    Args:
        trace: of the episode.
        note: where it comes from, if not from this page.
    """
    parts = [_head(trace, note), _numbers(trace)]
    if trace.not_applied:
        lost = "; ".join(f"<b>{escape(name)}</b>: {escape(why)}" for name, why in trace.not_applied.items())
        parts.append(f'<p class="ls-note" data-key="not-applied">Not applied in the last window: {lost}</p>')
    panels = (_load(trace), _ttft(trace), _use(trace), _reward(trace), _settings(trace))
    parts.append(f'<div class="ls-plots" data-windows="{len(trace)}">{"".join(panels)}</div>')
    return f'<div class="ls">{"".join(parts)}</div>'


def empty_board() -> str:
    """What stands in the place of the plots before an episode."""
    return '<div class="ls"><p class="ls-empty">Begin an episode, or let an agent play one.</p></div>'


def message(text: str) -> str:
    """Something that went wrong, for the visitor to read."""
    return f'<div class="ls"><p class="ls-message" role="alert">{escape(text)}</p></div>' if text else ""


def grade_table(result: GradeResult) -> str:
    """The grade of an episode."""
    parts = "".join(f"<span>{name} <b>{value:.4f}</b></span>" for name, value in result.components.items())
    requests = "".join(
        f"<span>{name.replace('_', ' ').replace('slo', 'SLO')} <b>{count:,}</b></span>"
        for name, count in result.requests.items()
    )
    played = f"{result.windows} windows, " + ("complete" if result.complete else "not complete")
    rows = (
        ("Score", f'<b data-key="score" data-value="{result.score!r}">{result.score:.4f}</b> of 1'),
        ("Parts", parts),
        ("Requests", requests),
        ("Played", played),
        (
            "Task",
            escape(result.task_id) + (", changed: compares with no other score" if result.custom else ""),
        ),
        ("Seed", f"{result.seed}, of {'evaluation' if result.held_out else 'training'}"),
        ("Verified", "yes, by replay" if result.verified else "no, real engines cannot be replayed"),
    )
    body = "".join(f"<tr><th scope=row>{name}</th><td>{cell}</td></tr>" for name, cell in rows if cell)
    return (
        f'<div class="ls"><table class="ls-grade"><caption>Grade</caption><tbody>{body}</tbody></table></div>'
    )


def _head(trace: Trace, note: str) -> str:
    where = f"{escape(trace.cell)}, seed {trace.seed}"
    return f"<div class=ls-head><h2>{escape(note or trace.title)}</h2><span>{where}</span></div>"


def _numbers(trace: Trace) -> str:
    last = {name: (values[-1] if values else 0.0) for name, values in trace.columns.items()}
    met = f"{100 * trace.in_slo / trace.ended:.1f}<small> %</small>" if trace.ended else "–"
    worst = last["p99_ttft_ms"]
    shown = (
        ("window", "Window", f"{len(trace)}<small> / {trace.windows}</small>"),
        ("time", "Time", f"{last['time_s']:g}<small> s</small>"),
        ("score", "Score so far", f"{trace.score:.4f}"),
        ("slo", "Within SLO", met),
        ("waiting", "Waiting", f"{last['waiting']:g}"),
        ("ttft", "TTFT p99", f"{_number(worst)}<small> ms</small>" if worst and isfinite(worst) else "–"),
    )
    items = "".join(
        f'<div><dt>{label}</dt><dd data-key="{key}">{value}</dd></div>' for key, label, value in shown
    )
    return f'<dl class="ls-numbers">{items}</dl>'


def _load(trace: Trace) -> str:
    time_s, running, waiting = _thinned(trace, "running", "waiting")
    top = _top(4.0, running + waiting)
    scale = _Scale(trace.horizon_s, 0.0, top)
    curves = _stack(scale, time_s, [("--ls-blue", running), ("--ls-orange", waiting)])
    keys = _key("running", "--ls-blue") + _key("waiting", "--ls-orange")
    return _panel("Requests", "at the window's end", keys, scale, curves, _ticks(0, top))


def _ttft(trace: Trace) -> str:
    time_s, median, worst = _thinned(trace, "p50_ttft_ms", "p99_ttft_ms", worst=True)
    seen = [v for v in (*median, *worst, trace.slo_ms) if isfinite(v) and v > 0]
    low, high = 10 ** floor(log10(min(seen) / 1.2)), 10 ** ceil(log10(max(seen) * 1.2))
    scale = _Scale(trace.horizon_s, log10(low), log10(high))
    slo = f'<path class="dash" d="M0 {scale.y(log10(trace.slo_ms)):.2f}H{_W:g}"/>'
    curves = "".join(
        f'<path style="stroke:var({colour})" d="{_line(scale, time_s, np.log10(values))}"/>'
        for colour, values in (("--ls-orange", worst), ("--ls-blue", median))
    )
    keys = _key("p50", "--ls-blue", "line") + _key("p99", "--ls-orange", "line")
    keys += _key(f"tightest SLO, {_number(trace.slo_ms)} ms", "--ls-ink", "dash")
    decades = range(round(log10(low)), round(log10(high)) + 1)
    ticks = [(float(power), _number(10.0**power)) for power in decades]
    return _panel("Time to first token", "(ms)", keys, scale, slo + curves, ticks)


def _use(trace: Trace) -> str:
    time_s, kv, busy, up = _thinned(trace, "kv", "busy", "up")
    scale = _Scale(trace.horizon_s, 0.0, 104.0)
    curves = _stack(scale, time_s, [("--ls-latency", kv)])
    curves += f'<path style="stroke:var(--ls-ink);stroke-width:1px" d="{_line(scale, time_s, busy)}"/>'
    curves += (
        '<path style="stroke:var(--ls-orange);stroke-dasharray:2 2" ' + f'd="{_line(scale, time_s, up)}"/>'
    )
    keys = _key("KV blocks held", "--ls-latency") + _key("GPU busy", "--ls-ink", "line")
    keys += _key("engines up", "--ls-orange", "dash")
    return _panel("In use", "(%)", keys, scale, curves, [(v, f"{v:g}") for v in (0, 25, 50, 75, 100)])


def _reward(trace: Trace) -> str:
    time_s, *parts = _thinned(trace, *PARTS)
    span = max(len(time_s) // 60, 1)  # windows vary with the requests that happen to end in them
    smooth = [_running_mean(part, span) for part in parts]
    top = _top(1.0, np.sum(smooth, axis=0))
    scale = _Scale(trace.horizon_s, 0.0, top)
    curves = _stack(scale, time_s, [(f"--ls-{name}", part) for name, part in zip(PARTS, smooth, strict=True)])
    keys = "".join(_key(name, f"--ls-{name}") for name in PARTS)
    unit = "per window" if span == 1 else f"mean of {span} windows"
    return _panel("Reward", unit, keys, scale, curves, _ticks(0, top))


def _settings(trace: Trace) -> str:
    """A lane for each control that the agent has: where its value lies in the grid, lowest to highest."""
    height = 34 * len(trace.lanes)
    time_s, step = np.array(trace.columns["time_s"]), _H / max(len(trace.lanes), 1)
    starts = np.concatenate([[0.0], time_s])
    scale = _Scale(trace.horizon_s, 0.0, 1.0)
    curves, labels = "", ""
    for lane, (name, codes) in enumerate(trace.lanes.items()):
        base, rise = (lane + 0.88) * step, 0.74 * step
        values = np.array(trace.columns[name])
        shares = np.interp(finite(values), finite(np.array(codes)), np.linspace(0, 1, len(codes)))
        middle = _H - (lane + 0.5) * step
        labels += f'<span class="y" style="bottom:{middle:.2f}%">{name.replace("_", " ")}</span>'
        curves += f'<path class="grid" d="M0 {base:.2f}H{_W:g}"/>'
        if not len(values):
            continue
        labels += f'<span class="now" style="bottom:{middle:.2f}%">{_setting(name, values[-1])}</span>'
        corners = []
        changes = [0, *(np.flatnonzero(np.diff(shares)) + 1).tolist()]
        for index in changes:
            corners.append(f"H{scale.x(starts[index]):.1f}V{base - rise * shares[index]:.2f}")
        line = f"M0 {base - rise * shares[0]:.2f}" + "".join(corners) + f"H{scale.x(time_s[-1]):.1f}"
        curves += f'<path style="fill:var(--ls-blue);opacity:.22;stroke:none" d="{line}V{base:.2f}H0Z"/>'
        curves += f'<path style="stroke:var(--ls-blue)" d="{line}"/>'
    area = _area(scale, curves, [], labels, f' ls-lanes" style="height:{height}px')
    return (
        '<figure class="ls-plot ls-wide"><figcaption><b>Actions</b> <i>each from the lowest to the highest value of '
        f"the task's grid; time (s)</i></figcaption>{area}</figure>"
    )


class _Scale:
    """From times and values to the coordinates of an SVG."""

    def __init__(self, horizon_s: float, low: float, high: float) -> None:
        self.horizon_s, self.low, self.high = horizon_s, low, high

    def x(self, time_s: float) -> float:
        return _W * time_s / self.horizon_s

    def y(self, value: float) -> float:
        return _H * (1.0 - (value - self.low) / (self.high - self.low))


def _panel(
    title: str, unit: str, keys: str, scale: _Scale, curves: str, ticks: Sequence[tuple[float, str]]
) -> str:
    head = f"<figcaption><b>{title}</b> <i>{unit}</i>{keys}</figcaption>"
    return f'<figure class="ls-plot">{head}{_area(scale, curves, ticks)}</figure>'


def _area(
    scale: _Scale, curves: str, ticks: Sequence[tuple[float, str]], labels: str = "", place: str = ""
) -> str:
    times = [t for t, _ in _ticks(0, scale.horizon_s)]
    grid = "".join(f"M{scale.x(t):.1f} 0V{_H:g}" for t in times)
    grid += "".join(f"M0 {scale.y(value):.2f}H{_W:g}" for value, _ in ticks)
    marks = "".join(
        f'<span class="y" style="bottom:{100 - scale.y(value):.2f}%">{text}</span>' for value, text in ticks
    )
    for t in times:
        share = 100 * t / scale.horizon_s
        text = f"{t:g} s" if t == times[-1] else f"{t:g}"
        marks += f'<span class="x{" last" if share > 94 else ""}" style="left:{share:.2f}%">{text}</span>'
    svg = f'<svg viewBox="0 0 {_W:g} {_H:g}" preserveAspectRatio="none" aria-hidden="true">'
    return (
        f'<div class="ls-area{place}">{svg}<path class="grid" d="{grid}"/>{curves}</svg>{marks}{labels}</div>'
    )


def _key(name: str, colour: str, form: str = "") -> str:
    return f'<span class="ls-key {form}" style="--c:var({colour})">{name}</span>'


def _stack(scale: _Scale, time_s: np.ndarray, layers: Iterable[tuple[str, np.ndarray]]) -> str:
    """Areas on top of each other; a window's value holds from the window before to its end."""
    if not len(time_s):
        return ""
    paths, below = [], np.zeros(len(time_s))
    for colour, values in layers:
        above = below + values
        there = _points(scale, time_s, above)
        back = _points(scale, time_s[::-1], below[::-1])
        paths.append(f'<path style="fill:var({colour});stroke:none" d="M{there}L{back}Z"/>')
        below = above
    return "".join(paths)


def _points(scale: _Scale, time_s: np.ndarray, values: np.ndarray) -> str:
    return " ".join(f"{scale.x(t):.1f} {scale.y(v):.2f}" for t, v in zip(time_s, values, strict=True))


def _line(scale: _Scale, time_s: np.ndarray, values: np.ndarray) -> str:
    """A path that is interrupted where there is no value."""
    path, pen = [], "M"
    for t, v in zip(time_s, values, strict=True):
        if isnan(v):
            pen = "M"
            continue
        x, y = scale.x(t), scale.y(v)
        path.append(f"{pen}{x:.1f} {y:.2f}" if pen == "L" else f"M{x:.1f} {y:.2f}h.01")
        pen = "L"
    return "".join(path)


def _thinned(trace: Trace, *names: str, worst: bool = False) -> list[np.ndarray]:
    """Time and columns, in long episodes one point for several windows: their mean, or the worst of them."""
    arrays = [np.array(trace.columns[name]) for name in ("time_s", *names)]
    span = ceil(len(trace) / _MOST_POINTS)
    if span <= 1:
        return arrays
    whole = len(trace) // span * span
    thinned = [arrays[0][:whole].reshape(-1, span)[:, -1]]
    for array in arrays[1:]:
        groups = array[:whole].reshape(-1, span)
        seen = np.isfinite(groups)
        if worst:
            merged = np.where(seen, groups, -np.inf).max(axis=1)
            thinned.append(np.where(seen.any(axis=1), merged, np.nan))
        else:
            thinned.append(groups.mean(axis=1))
    return thinned


def _running_mean(values: np.ndarray, span: int) -> np.ndarray:
    """Each value's mean with the span - 1 before it (fewer at the start)."""
    total = np.cumsum(np.concatenate([np.zeros(1), values]))
    ends = np.arange(1, len(total))
    starts = np.maximum(ends - span, 0)
    mean: np.ndarray = (total[ends] - total[starts]) / (ends - starts)
    return mean


def _top(least: float, values: np.ndarray) -> float:
    return max(least, 1.05 * float(values.max())) if len(values) else least


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Four to six round values, with their texts."""
    rough = (high - low) / 5
    unit = 10 ** floor(log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough)
    count = floor((high - low) / step + 1e-9)
    return [(low + step * i, _number(low + step * i)) for i in range(count + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _setting(name: str, code: float) -> str:
    if name == "quantization_tier":
        return TIERS[int(code)]
    if name in _SWITCHES:
        return "on" if code else "off"
    return "none" if code == np.inf else f"{code:g}"
