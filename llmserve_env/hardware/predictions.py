"""Profiles of GPUs for which a predictor's figures are at hand and measured kernel times are not.

The predictor (aiconfigurator) gives whole iterations: decodes at batch and context, prefills at length.
`fit` takes them apart by stated physics, so that the timing model can put other iterations together:

- Decode: what is left at no context is token-wise layers and LM head; the rest is attention.
- LM head: its share of the weights, whose bytes and FLOPs both follow.
- Prefill: attention costs FLOPs at one rate, fitted to the curvature in length; the rest is token-wise.
- A prefill chunk reads the cache before it at the rate at which decodes do, where that takes longer.
- Decodes beside a prefill chunk add what they cost alone (an assumption: the predictor has no mixed batches).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmserve_env.errors import InputError
from llmserve_env.hardware.latency import MAX_DECODES
from llmserve_env.hardware.profile import FitError, Latency, Model, RegimeError
from llmserve_env.hardware.tiers import linear_parameters

Array = NDArray[np.float64]

_LONGEST_DECODE = MAX_DECODES
"""Decodes in a batch, at most: attention is carried on to there in proportion."""

_CURVED_FROM = 2048
"""Prefill length from which attention can be told from the rest by curvature (tokens)."""

_POINT_CONTEXT = 1024

_CHUNKS = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
_CACHED = (0, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_CONTEXTS = (8192, 32768, 131072)
_MIXED_CHUNKS = (16, 8192)
"""Two will do: decodes cost the same beside any chunk."""


class Decode(NamedTuple):
    """A predicted iteration of decodes alone: their number, each one's context (tokens), milliseconds."""

    batch: int
    context: int
    ms: float


class Prefill(NamedTuple):
    """A predicted iteration that prefills one prompt: its length (tokens), milliseconds."""

    length: int
    ms: float


class Predictions(NamedTuple):
    """What the predictor says of a GPU.

    Attributes:
        decodes: sorted by batch and context.
        prefills: sorted by length.
    """

    decodes: tuple[Decode, ...]
    prefills: tuple[Prefill, ...]


class Fit(NamedTuple):
    """Predictions taken apart.

    Attributes:
        latency: the timing model's knots.
        attention_tflop_per_s: rate of prefill attention (TFLOP/s).
        kv_gb_per_s: rate at which decodes read the cache (GB/s).
    """

    latency: Latency
    attention_tflop_per_s: float
    kv_gb_per_s: float


def read_grid(path: Path | str, system: str) -> Predictions:
    """Read a grid: columns sys, k ("d" decode, "p" prefill), B, ctx, ms.

    Args:
        path: the CSV file.
        system: which GPU's rows, such as "h100_sxm".

    Raises:
        InputError: the file cannot be read, or has no decodes or no prefills of that system.
    """
    decodes, prefills = [], []
    for line, row in _rows(path, ("sys", "k", "B", "ctx", "ms")):
        if row["sys"] == system:
            batch, context = (_number(path, line, row, field) for field in ("B", "ctx"))
            ms = _number(path, line, row, "ms")
            if row["k"] == "d":
                decodes.append(Decode(int(batch), int(context), ms))
            else:
                prefills.append(Prefill(int(context), ms))
    if not decodes or not prefills:
        raise InputError(f"has no decodes and prefills of '{system}'", file=str(path), field="sys")
    return Predictions(tuple(sorted(decodes)), tuple(sorted(prefills)))


def read_points(path: Path | str, system: str, backend: str, precision: str) -> dict[str, dict[int, float]]:
    """Read single points: columns sys, be, q, kind ("decode" at batch n, "prefill" at length n), n, ms.

    Args:
        path: the CSV file.
        system: which GPU's rows, such as "h200_sxm".
        backend: which engine's, such as "vllm".
        precision: which weights', such as "bfloat16".

    Returns:
        Milliseconds by n, by kind.

    Raises:
        InputError: the file cannot be read or has no such rows.
    """
    points: dict[str, dict[int, float]] = {"decode": {}, "prefill": {}}
    for line, row in _rows(path, ("sys", "be", "q", "kind", "n", "ms")):
        if (row["sys"], row["be"], row["q"]) == (system, backend, precision):
            points[row["kind"]][int(_number(path, line, row, "n"))] = _number(path, line, row, "ms")
    if not points["decode"] or not points["prefill"]:
        wanted = f"{system}, {backend}, {precision}"
        raise InputError(f"has no decodes and prefills of {wanted}", file=str(path), field="sys, be, q")
    return points


def from_points(points: dict[str, dict[int, float]]) -> Predictions:
    """Single points as predictions: their decodes have 1024 tokens of context."""
    return Predictions(
        tuple(Decode(batch, _POINT_CONTEXT, ms) for batch, ms in sorted(points["decode"].items())),
        tuple(Prefill(length, ms) for length, ms in sorted(points["prefill"].items())),
    )


def scaled(
    grid: Predictions, base: dict[str, dict[int, float]], other: dict[str, dict[int, float]]
) -> Predictions:
    """The grid of a GPU that has single points only: another GPU's grid times the ratio of their points.

    Decodes and prefills have their own ratios, linear in the logarithm of batch or length.
    """

    def ratio(kind: str, n: int) -> float:
        common = sorted(base[kind].keys() & other[kind].keys())
        ratios = [other[kind][point] / base[kind][point] for point in common]
        return float(np.interp(np.log(n), np.log(common), ratios))

    return Predictions(
        tuple(point._replace(ms=point.ms * ratio("decode", point.batch)) for point in grid.decodes),
        tuple(point._replace(ms=point.ms * ratio("prefill", point.length)) for point in grid.prefills),
    )


def fit(
    predictions: Predictions, model: Model, source: str, attention_tflop_per_s: float | None = None
) -> Fit:
    """Take predictions apart into the timing model's knots.

    Args:
        predictions: predictions of the model on one GPU, bf16.
        model: the model that they are of.
        source: what `Latency.source` shall say.
        attention_tflop_per_s: rate of prefill attention, where it is known better than from curvature.
    """
    batches = sorted({point.batch for point in predictions.decodes})
    contexts = sorted({point.context for point in predictions.decodes})
    table = _decode_table(predictions.decodes, batches, contexts)
    first = np.array(contexts[:2], float)
    idle = _rising(table[:, 0] - (table[:, 1] - table[:, 0]) / (first[1] - first[0]) * first[0], table[:, 0])
    attention = np.maximum.accumulate(np.maximum(0.0, table - idle[:, None]), axis=1)
    attention = np.maximum.accumulate(attention, axis=0)
    kv_rate = _kv_rate(attention, batches, contexts, model)

    head_share = _head_parameters(model) / (_head_parameters(model) + linear_parameters(model))
    if attention_tflop_per_s is None:
        flop_rate = _attention_flop_rate(predictions.prefills, model)
    else:
        flop_rate = attention_tflop_per_s * 1e6
    long = [point for point in predictions.prefills if point.length > batches[-1]]
    dense = [
        1e3 * point.ms - _prefill_us(point.length, 0, flop_rate, kv_rate, model) - head_share * idle[0]
        for point in long
    ]
    dense_tokens = [*batches, *(point.length for point in long)]
    dense_us = np.maximum.accumulate([*((1 - head_share) * idle), *dense])
    at_most = float(np.interp(_LONGEST_DECODE, dense_tokens, dense_us))
    head_us = [*(head_share * idle), max(head_share * idle[-1], head_share / (1 - head_share) * at_most)]

    decode = _carried_on(attention, batches, contexts)
    sequences = (*batches, _LONGEST_DECODE)
    decode_kv = (0, *contexts, *(context for context in _CONTEXTS if context > contexts[-1]))
    latency = Latency(
        source=source,
        dense_tokens=tuple(dense_tokens),
        dense_us=_rounded(dense_us),
        head_sequences=sequences,
        head_us=_rounded(head_us),
        decode_sequences=sequences,
        decode_kv_tokens=decode_kv,
        decode_us=tuple(_rounded(row) for row in decode),
        prefill_chunk_tokens=_CHUNKS,
        prefill_kv_tokens=_CACHED,
        prefill_us=tuple(
            _rounded([_prefill_us(chunk, cached, flop_rate, kv_rate, model) for cached in _CACHED])
            for chunk in _CHUNKS
        ),
        mixed_chunk_tokens=_MIXED_CHUNKS,
        mixed_sequences=sequences,
        mixed_kv_tokens=decode_kv,
        mixed_us=tuple(tuple(_rounded(row) for row in decode) for _ in _MIXED_CHUNKS),
        mixed_skew=0.0,
    )
    error = fit_error(latency, predictions)
    return Fit(
        latency.model_copy(update={"fit_error": error}),
        attention_tflop_per_s=flop_rate * 1e-6,
        kv_gb_per_s=kv_rate * 1e-3,
    )


def tensor_parallel(fitted: Fit, base: Model, model: Model, count: int, source: str) -> Latency:
    """Another model on several GPUs of the same kind, from the fit of a model on one.

    Token-wise layers and LM head take the base's times in proportion to the parameters of one rank, decode
    attention in proportion to its cache, prefill attention by its FLOPs at the fitted rate. What the GPUs
    exchange is the profile's link, not part of the latency. Nothing of this is measured.

    Args:
        fitted: fit of the base model on one GPU.
        base: the model of the fit.
        model: the other model.
        count: GPUs that share it.
        source: what `Latency.source` shall say.
    """
    rank = model.model_copy(
        update={
            "attention_heads": model.attention_heads // count,
            "kv_heads": model.kv_heads // count,
            "kv_bytes_per_token": model.kv_bytes_per_token // count,
        }
    )
    latency = fitted.latency
    dense = linear_parameters(model) / count / linear_parameters(base)
    head = _head_parameters(model) / count / _head_parameters(base)
    cache = rank.kv_bytes_per_token / base.kv_bytes_per_token
    flop_rate, kv_rate = fitted.attention_tflop_per_s * 1e6, fitted.kv_gb_per_s * 1e3
    decode = tuple(_rounded(cache * np.array(row)) for row in latency.decode_us)
    return latency.model_copy(
        update={
            "source": source,
            "dense_us": _rounded(dense * np.array(latency.dense_us)),
            "head_us": _rounded(head * np.array(latency.head_us)),
            "decode_us": decode,
            "prefill_us": tuple(
                _rounded([_prefill_us(chunk, cached, flop_rate, kv_rate, rank) for cached in _CACHED])
                for chunk in _CHUNKS
            ),
            "mixed_us": (decode,) * len(_MIXED_CHUNKS),
            "fit_error": FitError(),
        }
    )


def fit_error(latency: Latency, predictions: Predictions) -> FitError:
    """How far iterations put together again are from the predicted ones, by regime."""
    decode = [
        iteration_ms(latency, point.batch, point.context) / point.ms - 1 for point in predictions.decodes
    ]
    prefill = [prefill_ms(latency, point.length) / point.ms - 1 for point in predictions.prefills]
    return FitError(decode=_regime(decode), prefill=_regime(prefill))


def iteration_ms(latency: Latency, batch: int, context: float) -> float:
    """Milliseconds of `batch` decodes at a context, on the GPU alone: no host overhead, no all-reduce."""
    rows = [np.interp(context, latency.decode_kv_tokens, row) for row in latency.decode_us]
    attention = np.interp(batch, latency.decode_sequences, rows)
    return float(_token_wise_us(latency, batch, batch) + attention) * 1e-3


def prefill_ms(latency: Latency, length: int) -> float:
    """Milliseconds of one prefill of `length` tokens in one iteration, on the GPU alone."""
    attention = np.interp(length, latency.prefill_chunk_tokens, [row[0] for row in latency.prefill_us])
    return float(_token_wise_us(latency, length, 1) + attention) * 1e-3


def _head_parameters(model: Model) -> int:
    return model.hidden_size * model.vocab_size


def _token_wise_us(latency: Latency, tokens: int, sampled: int) -> float:
    dense = np.interp(tokens, latency.dense_tokens, latency.dense_us)
    return float(dense + np.interp(sampled, latency.head_sequences, latency.head_us))


def _decode_table(decodes: Sequence[Decode], batches: list[int], contexts: list[int]) -> Array:
    """[batches, contexts] us; what is missing at long contexts goes on along the batch's last segment."""
    times = {(point.batch, point.context): 1e3 * point.ms for point in decodes}
    table = np.empty((len(batches), len(contexts)))
    for i, batch in enumerate(batches):
        known = [context for context in contexts if (batch, context) in times]
        for j, context in enumerate(contexts):
            if (batch, context) in times:
                table[i, j] = times[batch, context]
            else:
                low, high = known[-2:]
                slope = (times[batch, high] - times[batch, low]) / (high - low)
                table[i, j] = times[batch, high] + slope * (context - high)
    return table


def _rising(values: Array, weights: Array) -> Array:
    """The closest values that do not fall: neighbours that do are averaged (isotonic regression)."""
    groups: list[list[float]] = []
    for value, weight in zip(values, weights, strict=True):
        groups.append([float(value), 1 / float(weight) ** 2, 1])
        while len(groups) > 1 and groups[-2][0] > groups[-1][0]:
            above = groups.pop()
            total = groups[-1][1] + above[1]
            mean = (groups[-1][0] * groups[-1][1] + above[0] * above[1]) / total
            groups[-1] = [mean, total, groups[-1][2] + above[2]]
    return np.concatenate([np.full(int(count), value) for value, _, count in groups])


def _kv_rate(attention: Array, batches: list[int], contexts: list[int], model: Model) -> float:
    """Bytes/us at which the larger half of the batches read the cache: median over their segments."""
    tokens = np.diff(contexts)[None, :] * np.array(batches, float)[:, None]
    rates = tokens * model.kv_bytes_per_token / np.maximum(np.diff(attention, axis=1), 1e-9)
    return float(np.median(rates[len(batches) // 2 :]))


def _attention_flop(chunk: float, cached: float, model: Model) -> float:
    """FLOPs of causal attention of a chunk: scores and values, two each."""
    return 4 * chunk * (cached + chunk / 2) * model.attention_heads * model.head_dim * model.layers


def _attention_flop_rate(prefills: Sequence[Prefill], model: Model) -> float:
    """FLOP/us of prefill attention: the least-squares curvature of time in length."""
    points = [point for point in prefills if point.length >= _CURVED_FROM]
    length = np.array([point.length for point in points], float)
    us = np.array([1e3 * point.ms for point in points])
    columns = np.stack([np.ones_like(length), length, length**2], axis=1) / us[:, None]
    curvature = np.linalg.lstsq(columns, np.ones_like(us), rcond=None)[0][2]
    return _attention_flop(1, 0, model) / float(curvature)


def _prefill_us(chunk: float, cached: float, flop_rate: float, kv_rate: float, model: Model) -> float:
    read = (cached + chunk) * model.kv_bytes_per_token / kv_rate
    return max(_attention_flop(chunk, cached, model) / flop_rate, read)


def _carried_on(attention: Array, batches: list[int], contexts: list[int]) -> Array:
    """Attention with a column for no context, columns for long ones and a row for 512 sequences."""
    slope = (attention[:, -1] - attention[:, -2]) / (contexts[-1] - contexts[-2])
    slope = np.maximum(slope, attention[:, -1] / contexts[-1] * 0.5)
    columns = [np.zeros(len(batches)), *attention.T]
    columns += [attention[:, -1] + slope * (c - contexts[-1]) for c in _CONTEXTS if c > contexts[-1]]
    table = np.maximum.accumulate(np.stack(columns, axis=1), axis=0)
    return np.concatenate([table, table[-1:] * (_LONGEST_DECODE / batches[-1])])


def _regime(errors: Sequence[float]) -> RegimeError:
    percent = 100 * np.abs(errors)
    return RegimeError(
        median_percent=round(float(np.median(percent)), 2),
        p90_percent=round(float(np.quantile(percent, 0.9)), 2),
    )


def _rounded(values: Sequence[float] | Array) -> tuple[float, ...]:
    return tuple(round(float(value), 1) for value in values)


def _rows(path: Path | str, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [column for column in columns if column not in (reader.fieldnames or ())]
            if missing:
                raise InputError(f"lacks the columns {', '.join(missing)}", file=str(path), line=1)
            return [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", file=str(path)) from error


def _number(path: Path | str, line: int, row: dict[str, str], field: str) -> float:
    try:
        value = float(row[field])
    except (TypeError, ValueError):
        value = -1.0
    if value <= 0:
        raise InputError(
            f"expected a positive number, found {row[field]!r}", file=str(path), line=line, field=field
        )
    return value
