"""Fit a profile's latency model to measured kernel times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmserve_env.errors import InputError
from llmserve_env.hardware.fit import curve_knots, fit_table, read_table, rising, spread_knots
from llmserve_env.hardware.profile import Latency
from llmserve_env.hardware.tables import KernelTables, Skew

Array = NDArray[np.float64]

ONCE = ("embedding", "final_layernorm")
"""Layers of dense.csv that a model has once."""

TWICE = ("layernorm",)
"""Layers that a decoder layer has twice."""

COMMON = frozenset({"act_fn", "down_proj", "gate_up_proj", "o_proj", "qkv_proj", "rotary_emb", *ONCE, *TWICE})
"""Layers that Llama has; others count once a decoder layer and are listed in the report."""

ASSUMED_SKEW = 2.0
"""`mixed_skew` where none was measured; the two GPUs that measured it are near (docs/hardware.md)."""


@dataclass(frozen=True)
class Regime:
    """How the fit compares with the measurements of one regime.

    Percentiles weigh each measurement by its time: an error in a launch of 10 us costs an engine nothing.

    Attributes:
        points: measurements.
        median_percent: median absolute error (%).
        p90_percent: its 90th percentile (%).
        max_percent: the largest of any measurement (%).
        bias_percent: error of the sum of all times (%).
    """

    points: int
    median_percent: float
    p90_percent: float
    max_percent: float
    bias_percent: float


@dataclass(frozen=True)
class Calibration:
    """A fitted latency model and what is to be said of it.

    Attributes:
        latency: the model.
        regimes: its error by regime. That of `mixed` is of prefill and decode together, as a batch has them.
        notes: assumptions, and what was unusual in the tables.
    """

    latency: Latency
    regimes: dict[str, Regime]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Fit:
    knots: list[Array]
    table: Array

    def at(self, *coordinates: Array) -> Array:
        return read_table(np.stack(coordinates, axis=1), self.table, self.knots)


def calibrate(tables: KernelTables, layers: int, source: str) -> Calibration:
    """Fit the latency model to a folder of kernel times.

    Args:
        tables: times of one layer on one rank.
        layers: decoder layers of the model.
        source: what the profile is to say of where the times come from.

    Raises:
        InputError: the tables lack a regime that the model needs; names the file and the regime.
    """
    dense_us, notes = _model_dense(tables, layers)
    head_us = np.sum(list(tables.heads.values()), axis=0)
    skew, skew_notes = _mixed_skew(tables)
    dense, head = _curve(tables.tokens, dense_us, limit=48), _curve(tables.sequences, head_us, limit=24)
    chunk, cached, decodes, context = tables.attention.T
    attention_us = layers * tables.attention_us
    # A residual counts by its share of the whole iteration: attention, dense layers and head.
    whole_us = attention_us + np.interp(chunk + decodes, tables.tokens, dense_us)
    whole_us += np.interp(np.maximum(decodes, 1), tables.sequences, head_us)
    file = str(tables.folder / "attention.csv")

    def fit(rows: NDArray[np.bool_], targets: Array, axes: dict[str, tuple[Array, int]], regime: str) -> _Fit:
        knots = []
        for name, (values, limit) in axes.items():
            knots.append(spread_knots(values[rows], limit))
            if len(knots[-1]) < 2:
                raise InputError(
                    f"{regime} has {len(knots[-1])} values of it among {rows.sum()} rows, expected 2 or more",
                    file=file,
                    field=name,
                )
        points = np.stack([values[rows] for values, _ in axes.values()], axis=1)
        table = fit_table(points, targets[rows], 1 / whole_us[rows], knots)
        # More decodes or a longer context never take less; a longer prefill may make theirs cheaper.
        return _Fit(knots, rising(table, (1, 2) if len(axes) == 3 else (0, 1)))

    alone, filling, both = (
        (chunk == 0) & (decodes > 0),
        (chunk > 0) & (decodes == 0),
        (chunk > 0) & (decodes > 0),
    )
    decode = fit(
        alone,
        attention_us,
        {"n_decode": (decodes, 16), "kv_decode": (context, 8)},
        "pure decode (prefill_chunk 0, n_decode > 0)",
    )
    prefill = fit(
        filling,
        attention_us,
        {"prefill_chunk": (chunk, 8), "kv_prefill": (cached, 11)},
        "pure prefill (prefill_chunk > 0, n_decode 0)",
    )
    prefill_us = prefill.at(chunk, cached)
    mixed = fit(
        both,
        attention_us - _base(tables.attention, attention_us, filling, prefill_us),
        {"prefill_chunk": (chunk, 6), "n_decode": (decodes, 12), "kv_decode": (context, 7)},
        "a mixed batch (prefill_chunk > 0, n_decode > 0)",
    )
    regimes = {
        "dense": _regime(dense.at(tables.tokens), dense_us),
        "head": _regime(head.at(tables.sequences), head_us),
        "decode": _regime(decode.at(decodes, context)[alone], attention_us[alone]),
        "prefill": _regime(prefill_us[filling], attention_us[filling]),
        "mixed": _regime((prefill_us + mixed.at(chunk, decodes, context))[both], attention_us[both]),
    }
    fields: dict[str, Any] = {"source": source}
    fields |= _figures(dense, "dense", ["tokens"])
    fields |= _figures(head, "head", ["sequences"])
    fields |= _figures(decode, "decode", ["sequences", "kv_tokens"])
    fields |= _figures(prefill, "prefill", ["chunk_tokens", "kv_tokens"])
    fields |= _figures(mixed, "mixed", ["chunk_tokens", "sequences", "kv_tokens"])
    fields["mixed_skew"] = skew
    fields["fit_error"] = {
        name: {
            "median_percent": round(regime.median_percent, 2),
            "p90_percent": round(regime.p90_percent, 2),
        }
        for name, regime in regimes.items()
    }
    return Calibration(Latency.model_validate(fields), regimes, (*notes, *skew_notes))


def _model_dense(tables: KernelTables, layers: int) -> tuple[Array, list[str]]:
    """[a] us of all token-wise layers of the model, and a note of uncommon ones."""
    total = np.zeros_like(tables.tokens)
    for name, times in tables.layers.items():
        total += times * (1 if name in ONCE else 2 * layers if name in TWICE else layers)
    if not total.all():
        raise InputError(
            "expected times > 0 at every token count",
            file=str(tables.folder / "dense.csv"),
            field="time_us",
        )
    unknown = sorted(set(tables.layers) - COMMON)
    missing = sorted(COMMON - set(tables.layers))
    notes = [f"layers of dense.csv counted once a decoder layer: {', '.join(unknown)}"] if unknown else []
    return total, notes + ([f"layers that dense.csv lacks: {', '.join(missing)}"] if missing else [])


def _curve(x: Array, y: Array, limit: int) -> _Fit:
    knots = curve_knots(x, y, limit, median=0.005, worst=0.05)
    return _Fit([knots], rising(fit_table(x[:, None], y, 1 / y, [knots]), (0,)))


def _base(attention: Array, attention_us: Array, filling: NDArray[np.bool_], prefill_us: Array) -> Array:
    """[m] time of each batch's prefill alone: as measured, where it was, or as fitted."""
    chunk, cached = attention[:, 0], attention[:, 1]
    measured = dict(
        zip(zip(chunk[filling], cached[filling], strict=True), attention_us[filling], strict=True)
    )
    return np.array(
        [measured.get((c, kv), fitted) for c, kv, fitted in zip(chunk, cached, prefill_us, strict=True)]
    )


def _mixed_skew(tables: KernelTables) -> tuple[float, list[str]]:
    """Least-squares k in: time - time at the mean = k / n * (time at the longest - time at the mean)."""
    skew = tables.skew
    rows = None if skew is None else _skew_rows(skew)
    if skew is None or rows is None or not rows.any():
        return ASSUMED_SKEW, [f"no usable skew.csv: mixed_skew = {ASSUMED_SKEW} is an assumption"]
    x = ((skew.longest_us - skew.mean_us) / skew.sequences)[rows]
    y = (skew.time_us - skew.mean_us)[rows]
    return max(0.0, float(f"{x @ y / (x @ x):.4g}")), []


def _skew_rows(skew: Skew) -> NDArray[np.bool_]:
    """Batches whose prefill is large enough to set the kernel's schedule, with contexts that are common."""
    common = (skew.shortest >= 256) & (skew.shortest <= 2048)
    rows: NDArray[np.bool_] = (skew.prefill_tokens >= 256) & (skew.sequences >= 4) & common
    return rows & (skew.longest_us > skew.mean_us)


def _regime(fitted: Array, measured: Array) -> Regime:
    error = 100 * np.abs(fitted / np.maximum(measured, 1e-9) - 1)
    order = np.argsort(error)
    weight = np.cumsum(measured[order]) / measured.sum()
    median, p90 = (float(error[order][np.searchsorted(weight, share)]) for share in (0.5, 0.9))
    bias = 100 * float(fitted.sum() / measured.sum() - 1)
    return Regime(len(error), median, p90, float(error.max()), bias)


def _figures(fit: _Fit, prefix: str, axes: list[str]) -> dict[str, Any]:
    """The profile's fields of a fit; times have five significant digits."""
    rounded = np.vectorize(lambda value: float(f"{value:.5g}"), otypes=[float])(fit.table)
    fields: dict[str, Any] = {
        f"{prefix}_{axis}": [round(float(knot)) for knot in knots]
        for axis, knots in zip(axes, fit.knots, strict=True)
    }
    return {**fields, f"{prefix}_us": rounded.tolist()}
