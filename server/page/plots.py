"""Plots of an episode as HTML: curves that stretch with the page, labels that keep their size.

A curve is an SVG without text, stretched to its place with lines of constant width; titles, keys and ticks
are HTML around it. So they are legible at any width and follow the page's colours, light or dark. The style
is in ui.css.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from math import ceil, floor, isfinite, isnan, log10
from typing import TYPE_CHECKING

import numpy as np

from llmserve_env.actions import finite
from llmserve_env.hardware.profile import TIERS
from server.page.ui_trace import PARTS

if TYPE_CHECKING:
    from llmserve_env.schema import GradeResult
    from server.page.ui_trace import Trace

_MOST_POINTS = 400
_W, _H = 1000.0, 100.0  # of every SVG's own coordinates
_SWITCHES = ("prefill_decode_split", "priority_routing")


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
    use = "" if trace.live else _use(trace)
    panels = _load(trace) + _ttft(trace) + use + _reward(trace) + _settings(trace)
    parts.append(f'<div class="ls-plots" data-windows="{len(trace)}">{panels}</div>')
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
    scale = _Scale(trace.shown_s, 0.0, top)
    curves = _stack(scale, time_s, [("--ls-blue", running), ("--ls-orange", waiting)])
    keys = _key("running", "--ls-blue") + _key("waiting", "--ls-orange")
    return _panel("Requests", "", keys, scale=scale, curves=curves, ticks=_ticks(0, top))


def _ttft(trace: Trace) -> str:
    time_s, median, worst = _thinned(trace, "p50_ttft_ms", "p99_ttft_ms", worst=True)
    seen = [v for v in (*median, *worst, trace.slo_ms) if isfinite(v) and v > 0]
    steps = [factor * 10.0**power for power in range(-3, 8) for factor in (1, 2, 5)]
    low = max(step for step in steps if step <= min(seen) / 1.1)
    high = min(step for step in steps if step >= max(seen) * 1.1)
    scale = _Scale(trace.shown_s, log10(low), log10(high))
    slo = f'<path class="dash" d="M0 {scale.y(log10(trace.slo_ms)):.2f}H{_W:g}"/>'
    curves = "".join(
        f'<path style="stroke:var({colour})" d="{_line(scale, time_s, np.log10(values))}"/>'
        for colour, values in (("--ls-orange", worst), ("--ls-blue", median))
    )
    keys = _key("p50", "--ls-blue", "line") + _key("p99", "--ls-orange", "line")
    keys += _key(f"tightest SLO {_number(trace.slo_ms)}", "--ls-ink", "dash")
    round_ones = [step for step in steps if low <= step <= high]
    if len(round_ones) > 7:
        round_ones = [step for step in round_ones if log10(step) % 1 == 0]
    ticks = [(log10(step), _number(step)) for step in round_ones]
    return _panel("Time to first token", "(ms)", keys, scale=scale, curves=slo + curves, ticks=ticks)


def _use(trace: Trace) -> str:
    time_s, kv, busy, up = _thinned(trace, "kv", "busy", "up")
    scale = _Scale(trace.shown_s, 0.0, 104.0)
    curves = _stack(scale, time_s, [("--ls-latency", kv)])
    curves += f'<path style="stroke:var(--ls-ink);stroke-width:1px" d="{_line(scale, time_s, busy)}"/>'
    curves += (
        '<path style="stroke:var(--ls-orange);stroke-dasharray:2 2" ' + f'd="{_line(scale, time_s, up)}"/>'
    )
    keys = _key("KV blocks", "--ls-latency") + _key("GPU busy", "--ls-ink", "line")
    keys += _key("engines up", "--ls-orange", "dash")
    return _panel(
        "In use", "(%)", keys, scale=scale, curves=curves, ticks=[(v, f"{v:g}") for v in (0, 25, 50, 75, 100)]
    )


def _reward(trace: Trace) -> str:
    time_s, *parts = _thinned(trace, *PARTS)
    span = max(len(time_s) // 60, 1)  # windows vary with the requests that happen to end in them
    smooth = [_running_mean(part, span) for part in parts]
    top = _top(1.0, np.sum(smooth, axis=0))
    scale = _Scale(trace.shown_s, 0.0, top)
    curves = _stack(scale, time_s, [(f"--ls-{name}", part) for name, part in zip(PARTS, smooth, strict=True)])
    keys = "".join(_key(name, f"--ls-{name}") for name in PARTS)
    unit = "per window" if span == 1 else f"mean of {span} windows"
    return _panel("Reward", unit, keys, scale=scale, curves=curves, ticks=_ticks(0, top))


def _settings(trace: Trace) -> str:
    """A lane for each control that the agent has: where its value lies in the grid, lowest to highest."""
    height = 34 * len(trace.lanes)
    time_s, step = np.array(trace.columns["time_s"]), _H / max(len(trace.lanes), 1)
    starts = np.concatenate([[0.0], time_s])
    scale = _Scale(trace.shown_s, 0.0, 1.0)
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
    area = _area(scale, curves, [], labels, height)
    unit = "each from the lowest to the highest value of the task's grid; time (s)"
    head = f"<figcaption><b>Actions</b> <i>{unit}</i></figcaption>"
    return f'<figure class="ls-plot ls-wide">{head}{area}</figure>'


class _Scale:
    """From times and values to the coordinates of an SVG."""

    def __init__(self, end_s: float, low: float, high: float) -> None:
        self.end_s, self.low, self.high = end_s, low, high

    def x(self, time_s: float) -> float:
        return _W * time_s / self.end_s

    def y(self, value: float) -> float:
        return _H * (1.0 - (value - self.low) / (self.high - self.low))


def _panel(
    title: str, unit: str, keys: str, *, scale: _Scale, curves: str, ticks: Sequence[tuple[float, str]]
) -> str:
    head = f"<figcaption><b>{title}</b> <i>{unit}</i>{keys}</figcaption>"
    return f'<figure class="ls-plot">{head}{_area(scale, curves, ticks)}</figure>'


def _area(
    scale: _Scale, curves: str, ticks: Sequence[tuple[float, str]], labels: str = "", lanes_px: int = 0
) -> str:
    times = [t for t, _ in _ticks(0, scale.end_s)]
    grid = "".join(f"M{scale.x(t):.1f} 0V{_H:g}" for t in times)
    grid += "".join(f"M0 {scale.y(value):.2f}H{_W:g}" for value, _ in ticks)
    marks = "".join(
        f'<span class="y" style="bottom:{100 - scale.y(value):.2f}%">{text}</span>' for value, text in ticks
    )
    for t in times:
        share = 100 * t / scale.end_s
        text = f"{t:g} s" if t == times[-1] else f"{t:g}"
        marks += f'<span class="x{" last" if share > 94 else ""}" style="left:{share:.2f}%">{text}</span>'
    svg = f'<svg viewBox="0 0 {_W:g} {_H:g}" preserveAspectRatio="none" aria-hidden="true">'
    place = f'class="ls-area ls-lanes" style="height:{lanes_px}px"' if lanes_px else 'class="ls-area"'
    return f'<div {place}>{svg}<path class="grid" d="{grid}"/>{curves}</svg>{marks}{labels}</div>'


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
