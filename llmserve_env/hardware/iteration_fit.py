"""Fit a profile's latency model to the iterations of a running engine.

Least squares of relative errors, robust against outliers, of a sum of terms of which none is negative:

* dense time by tokens, linear between knots;
* time for each sequence that emits a token;
* time for each token in the KV cache of decoding sequences, alone and beside a prefill;
* of a prefill a constant, a constant for each chunk, and attention that grows with the chunk's square.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from llmserve_env.errors import InputError
from llmserve_env.hardware.calibrate import Regime
from llmserve_env.hardware.latency import compile_latency, host_overhead_us, iteration_time
from llmserve_env.hardware.profile import FitError, Latency, Profile, RegimeError

Array = NDArray[np.float64]

FEWEST = 100
"""Iterations that a fit needs."""

_KNOTS = tuple(2**power for power in range(15))
_SEQUENCES = (1, 512)
_CONTEXTS = (0, 131072)
_CHUNKS = (1, 2, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)
_ROUNDS = 8
_OUTLIER = 5.0  # median absolute errors beyond which an iteration counts less
_RIDGE = 0.003  # of the bends of dense time, beside an iteration's relative error


@dataclass(frozen=True)
class Iterations:
    """Iterations of one engine in order.

    Attributes:
        prefills: float64[n], prefill chunks.
        prefill_tokens: float64[n], their tokens.
        decodes: float64[n], decoding sequences.
        decode_kv: float64[n], tokens in the KV cache of those, all together.
        elapsed_s: float64[n].
    """

    prefills: Array
    prefill_tokens: Array
    decodes: Array
    decode_kv: Array
    elapsed_s: Array

    def __len__(self) -> int:
        return len(self.elapsed_s)

    def take(self, which: NDArray[np.bool_]) -> Iterations:
        """Those for which `which` holds."""
        return Iterations(*(getattr(self, each.name)[which] for each in fields(self)))

    @staticmethod
    def joined(parts: Iterable[Iterations]) -> Iterations:
        """One after the other."""
        several = list(parts)
        return Iterations(
            *(np.concatenate([getattr(part, each.name) for part in several]) for each in fields(Iterations))
        )


def fit_iterations(iterations: Iterations, step_us: float, sequence_us: float, source: str) -> Latency:
    """Fit the latency model.

    Args:
        iterations: iterations of many compositions, without outliers such as the first ones of a server.
        step_us: what passes between two iterations beside them: becomes part of the dense time (us).
        sequence_us: what each sequence adds to that (us).
        source: where the iterations come from.

    Raises:
        InputError: too few iterations, or none with a prefill or none without.
    """
    with_prefill = iterations.prefill_tokens > 0
    if min(len(iterations), 20 * with_prefill.sum(), 20 * (~with_prefill).sum()) < FEWEST:
        raise InputError(
            f"{len(iterations)} iterations, {with_prefill.sum()} of them with a prefill, are too few: "
            f"expected {FEWEST} or more, and {FEWEST // 20} of each kind"
        )
    tokens = iterations.decodes + iterations.prefill_tokens
    knots = [knot for knot in _KNOTS if knot < tokens.max()]
    knots = [*knots, 2 * knots[-1]] if knots else [1, 2]
    terms = _terms(iterations, np.array(knots, float))
    us = _solve(terms, 1e6 * iterations.elapsed_s, np.array(knots, float))
    dense = np.cumsum(us[: len(knots)])
    head, alone, beside, floor, chunk, square = us[len(knots) :]
    chunks = np.array(_CHUNKS, float)
    prefill = np.where(chunks > 1, chunk, 0.0)[:, None] + square * chunks[:, None] * (
        np.array(_CONTEXTS, float) + chunks[:, None] / 2
    )
    prefill += floor - prefill[0, 0]
    sequences, contexts = np.array(_SEQUENCES, float), np.array(_CONTEXTS, float)
    head_sequence = head + sequence_us
    products = sequences[:, None] * contexts
    # A tiny server's host is part of what was measured; the simulator adds its own to every iteration.
    dense_us = np.maximum(0.0, dense + step_us - host_overhead_us())
    return Latency(
        source=source,
        dense_tokens=tuple(knots),
        dense_us=_rounded(dense_us),
        head_sequences=_SEQUENCES,
        head_us=_rounded(head_sequence * sequences),
        decode_sequences=_SEQUENCES,
        decode_kv_tokens=_CONTEXTS,
        decode_us=tuple(_rounded(row) for row in alone * products),
        prefill_chunk_tokens=_CHUNKS,
        prefill_kv_tokens=_CONTEXTS,
        prefill_us=tuple(_rounded(row) for row in np.maximum(0.0, prefill)),
        mixed_chunk_tokens=(1, 2),
        mixed_sequences=_SEQUENCES,
        mixed_kv_tokens=_CONTEXTS,
        mixed_us=(tuple(_rounded(row) for row in beside * products),) * 2,
        mixed_skew=0.0,
    )


def predicted_s(profile: Profile, iterations: Iterations) -> Array:
    """Time that a profile gives iterations (s), without what passes between them; chunks taken as equal."""
    arrays, server = compile_latency(profile), profile.server
    step_s, sequence_s = (0.0, 0.0) if server is None else (1e-6 * server.step_us, 1e-6 * server.sequence_us)
    found = np.zeros(len(iterations))
    columns = (getattr(iterations, each.name).tolist() for each in fields(iterations))
    for index, (prefills, tokens, decodes, kv, _) in enumerate(zip(*columns, strict=True)):
        count, several = int(decodes), max(int(prefills), 1)
        part, rest = divmod(int(tokens), several)
        chunks = [(part + (each < rest), 0) for each in range(several) if part + (each < rest)]
        sampled = count + len(chunks)
        time_s = iteration_time(arrays, 0, chunks, count, kv, kv / max(count, 1), sampled)
        found[index] = time_s - step_s - sequence_s * sampled
    return found


def regimes(iterations: Iterations, predicted: Array) -> dict[str, Regime]:
    """Errors of a prediction by kind of batch: "decode", "prefill", "mixed", and "all"."""
    prefill, decode = iterations.prefill_tokens > 0, iterations.decodes > 0
    kinds = {"decode": decode & ~prefill, "prefill": prefill & ~decode, "mixed": prefill & decode}
    return {
        name: _regime(iterations.elapsed_s[which], predicted[which])
        for name, which in {**kinds, "all": prefill | decode}.items()
        if which.any()
    }


def fit_error(found: dict[str, Regime]) -> FitError:
    """As a profile keeps it."""
    kept = {
        name: RegimeError(
            median_percent=round(each.median_percent, 2), p90_percent=round(each.p90_percent, 2)
        )
        for name, each in found.items()
        if name != "all"
    }
    return FitError(**kept)


def _regime(measured: Array, predicted: Array) -> Regime:
    percent = 100 * np.abs(predicted / measured - 1)
    median, p90 = np.percentile(percent, (50, 90))
    return Regime(
        points=len(measured),
        median_percent=float(median),
        p90_percent=float(p90),
        max_percent=float(percent.max()),
        bias_percent=float(100 * (predicted.sum() / measured.sum() - 1)),
    )


def _terms(iterations: Iterations, knots: Array) -> Array:
    tokens = iterations.decodes + iterations.prefill_tokens
    prefill = iterations.prefill_tokens > 0
    mean_chunk = iterations.prefill_tokens / np.maximum(iterations.prefills, 1)
    rises = [
        np.clip((tokens - low) / (high - low), 0, 1 if high < knots[-1] else np.inf)
        for low, high in pairwise(knots.tolist())
    ]
    columns = [
        np.ones(len(iterations)),
        *rises,
        iterations.decodes + iterations.prefills,
        iterations.decode_kv * ~prefill,
        iterations.decode_kv * prefill,
        prefill,
        iterations.prefills,
        iterations.prefill_tokens * mean_chunk / 2,
    ]
    return np.array(columns, float).T


def _solve(terms: Array, us: Array, knots: Array) -> Array:
    """Coefficients >= 0 that make relative errors small, by iteratively reweighted least squares."""
    scale = np.abs(terms / us[:, None]).max(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    bends = np.zeros((len(knots) - 2, terms.shape[1]))
    for row, (low, middle, high) in enumerate(zip(knots[:-2], knots[1:-1], knots[2:], strict=True)):
        # Of time per token: what no iteration tells goes on as before.
        bends[row, row + 1 : row + 3] = np.array([1 / (middle - low), -1 / (high - middle)]) * (middle - low)
    bends *= _RIDGE * np.sqrt(len(us)) / np.median(us)
    found = np.zeros(terms.shape[1])
    expected, weight = us, np.ones(len(us))
    for _ in range(_ROUNDS):
        # Relative to what is expected: relative to what was measured, of like iterations the long ones would
        # count for less than the short ones, and the sum of all come out too small.
        per_us = (weight / expected)[:, None]
        rows = np.vstack([terms * per_us, bends]) / scale
        found = nnls(rows, np.concatenate([us * per_us[:, 0], np.zeros(len(bends))]))[0] / scale
        expected = np.maximum(terms @ found, 1e-3 * us)
        error = np.abs(us / expected - 1)
        limit = _OUTLIER * max(float(np.median(error)), 1e-6)
        weight = np.sqrt(np.minimum(1.0, limit / np.maximum(error, 1e-12)))
    return found


def _rounded(values: Array) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in values.tolist())
