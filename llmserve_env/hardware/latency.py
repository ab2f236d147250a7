"""How long an iteration of the engine takes.

    time = dense(T) + head(S) + attention

T counts the tokens of the iteration (prefill chunks and one for each decoding sequence), S the sequences that
emit a token. Attention is D(n, mean context) for n decoding sequences alone; P(chunk, kv) for prefill chunks,
whose floor, the cost of launching the kernel, is paid once; and for a mixed batch the prefill part plus
M(prefill tokens, n, effective context). `docs/hardware.md` tells how the terms are measured and fitted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmserve_env.hardware.profile import TIERS, Latency, Profile, Tier
from llmserve_env.schema import bounds

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_TOKENS = 16384
"""Tokens of one iteration, at most."""

MAX_DECODES: int = bounds("batch_cap")["le"]
"""Decoding sequences of one iteration, at most."""

MAX_SAMPLED: int = MAX_DECODES * (1 + bounds("speculation_depth")["le"])
"""Tokens that one iteration emits, at most: for each sequence one and its drafts."""

_MAX_CONTEXT = 131072

_BF16_BYTES = 2

Array = NDArray[np.float64]


class LatencyArrays(NamedTuple):
    """A profile as the simulator reads it: C-contiguous float64, times in seconds, contexts in tokens.

    The first axis of the times is the precision tier in the order of `profile.TIERS`; a tier that the profile
    lacks repeats FP16 (`Profile.tier_names` tells which it has). Between knots values are linear; beyond the
    last one they go on along the last segment.

    Attributes:
        dense_s: [tiers, 16385], by tokens; with all-reduce and host overhead; 0 for no tokens.
        head_s: [tiers, 4609], by sequences that emit a token; 0 for none.
        decode_kv: [K], knots of mean context.
        decode_s: [tiers, 513, K], by decoding sequences; row 0 is zero.
        prefill_chunk: [C], knots of tokens in a chunk.
        prefill_kv: [J], knots of tokens in the cache before it.
        prefill_s: [tiers, C, J].
        mixed_chunk: [Cm], knots of prefill tokens in the iteration.
        mixed_kv: [Km], knots of effective context.
        mixed_s: [tiers, Cm, 513, Km], by decoding sequences; row 0 is zero.
        mixed_skew: effective context = mean + min(1, mixed_skew / n) * (longest - mean).
        draft_layer_fraction: share of `dense_s` that one decoder layer, such as an EAGLE-3 draft, takes.
    """

    dense_s: Array
    head_s: Array
    decode_kv: Array
    decode_s: Array
    prefill_chunk: Array
    prefill_kv: Array
    prefill_s: Array
    mixed_chunk: Array
    mixed_kv: Array
    mixed_s: Array
    mixed_skew: float
    draft_layer_fraction: float


def iteration_time(  # noqa: PLR0917  (positional, as the kernel takes them)
    arrays: LatencyArrays,
    tier: int,
    chunks: Sequence[tuple[int, int]],
    decode_count: int,
    kv_sum: float,
    kv_max: float,
    sampled: int,
) -> float:
    """Seconds that one iteration takes, in plain Python: the rule that the simulator's kernel follows.

    Args:
        arrays: from `compile_latency`.
        tier: index into `profile.TIERS`.
        chunks: (tokens, tokens already in the cache) of each prefill chunk.
        decode_count: decoding sequences, 0..MAX_DECODES.
        kv_sum: sum of their contexts (tokens).
        kv_max: the longest of them (tokens).
        sampled: sequences that emit a token.
    """
    prefill_tokens = sum(tokens for tokens, _ in chunks)
    time = arrays.dense_s[tier, prefill_tokens + decode_count] + arrays.head_s[tier, sampled]
    if chunks:
        floor = arrays.prefill_s[tier, 0, 0]
        attention = floor
        for tokens, kv in chunks:
            attention += max(0.0, _prefill(arrays, tier, tokens, kv) - floor)
        if decode_count:
            mean = kv_sum / decode_count
            context = mean + min(1.0, arrays.mixed_skew / decode_count) * (kv_max - mean)
            attention += _mixed(arrays, tier, prefill_tokens, decode_count, context)
        time += attention
    elif decode_count:
        j, v = _segment(arrays.decode_kv, kv_sum / decode_count)
        time += max(0.0, _between(arrays.decode_s[tier, decode_count], j, v))
    return float(time)


def _prefill(arrays: LatencyArrays, tier: int, tokens: int, kv: float) -> float:
    i, u = _segment(arrays.prefill_chunk, max(float(tokens), arrays.prefill_chunk[0]))
    j, v = _segment(arrays.prefill_kv, kv)
    table = arrays.prefill_s[tier]
    low, high = _between(table[i], j, v), _between(table[i + 1], j, v)
    return max(0.0, low + u * (high - low))


def _mixed(arrays: LatencyArrays, tier: int, tokens: int, decodes: int, context: float) -> float:
    knots = arrays.mixed_chunk
    i, u = _segment(knots, min(max(float(tokens), knots[0]), knots[-1]))
    j, v = _segment(arrays.mixed_kv, context)
    table = arrays.mixed_s[tier]
    low, high = _between(table[i, decodes], j, v), _between(table[i + 1, decodes], j, v)
    return max(0.0, low + u * (high - low))


def _segment(knots: Array, x: float) -> tuple[int, float]:
    """Segment that holds x, or the first or last one, and x's place in it (0 at its start, 1 at its end)."""
    i = 0
    while i < len(knots) - 2 and x >= knots[i + 1]:
        i += 1
    return i, (x - knots[i]) / (knots[i + 1] - knots[i])


def _between(values: Array, i: int, u: float) -> float:
    return float(values[i] + u * (values[i + 1] - values[i]))


@lru_cache(maxsize=32)
def compile_latency(profile: Profile) -> LatencyArrays:
    """Turn a profile's knots into the arrays that the simulator indexes. Cached; leave them unchanged."""
    latency = profile.latency
    tiers = [profile.tier(name) or profile.tiers.FP16 for name in TIERS]
    decode = _by_sequences(latency.decode_sequences, np.array(latency.decode_us))
    mixed = [_by_sequences(latency.mixed_sequences, np.array(rows)) for rows in latency.mixed_us]
    prefill_chunk, prefill_kv, prefill = _prefill_table(latency)
    return LatencyArrays(
        dense_s=_seconds([_dense(profile, tier) for tier in tiers]),
        head_s=_seconds([_head(latency) * tier.head_factor for tier in tiers]),
        decode_kv=np.array(latency.decode_kv_tokens, float),
        decode_s=_seconds([decode] * len(TIERS)),
        prefill_chunk=prefill_chunk,
        prefill_kv=prefill_kv,
        prefill_s=_seconds([prefill] * len(TIERS)),
        mixed_chunk=np.array(latency.mixed_chunk_tokens, float),
        mixed_kv=np.array(latency.mixed_kv_tokens, float),
        mixed_s=_seconds([mixed] * len(TIERS)),
        mixed_skew=latency.mixed_skew,
        draft_layer_fraction=1 / profile.model.layers,
    )


def host_overhead_us() -> float:
    """What the host adds to every iteration (us), on any hardware."""
    path = Path(__file__).parent / "data" / "constants.toml"
    return float(tomllib.loads(path.read_text(encoding="utf-8"))["host"]["overhead_us"])


def _seconds(us: object) -> Array:
    return np.ascontiguousarray(np.asarray(us, float) * 1e-6)


def _dense(profile: Profile, tier: Tier) -> Array:
    """[16385] us by tokens, with what the GPUs exchange and what the host adds."""
    latency, tokens = profile.latency, np.arange(MAX_TOKENS + 1.0)
    knots = np.array(latency.dense_tokens, float)
    time = _extended(tokens, knots, np.array(latency.dense_us))
    time *= np.interp(tokens, tier.dense_tokens, tier.dense_factor)
    time += _all_reduce_us(profile, tokens) + host_overhead_us()
    time[0] = 0.0
    return time


def _all_reduce_us(profile: Profile, tokens: Array) -> Array:
    """Two ring all-reduces a layer, each latency + bytes / bandwidth (us)."""
    if profile.link is None or profile.gpu.count == 1:
        return np.zeros_like(tokens)
    count, model, link = profile.gpu.count, profile.model, profile.link
    moved = 2 * (count - 1) / count * tokens * model.hidden_size * _BF16_BYTES
    return 2 * model.layers * (link.latency_us + moved / (link.bandwidth_gb_per_s * 1e3))


def _head(latency: Latency) -> Array:
    time = _extended(
        np.arange(MAX_SAMPLED + 1.0), np.array(latency.head_sequences, float), np.array(latency.head_us)
    )
    time[0] = 0.0
    return time


def _extended(x: Array, knots: Array, values: Array) -> Array:
    """Linear between knots, the first value before them; beyond them along the slope of their upper half.

    One segment's slope would do were it not for the steps of GEMM tiles, which a longer stretch averages.
    """
    half = np.interp(knots[-1] / 2, knots, values)
    slope = max(0.0, (values[-1] - half) / (knots[-1] / 2))
    extended: Array = np.interp(x, knots, values) + slope * np.maximum(0.0, x - knots[-1])
    return extended


def _by_sequences(knots: Sequence[int], rows: Array) -> Array:
    """[513, K] from rows at some counts: linear, the last segment goes on, row 0 is 0, none is negative."""
    counts, x = np.arange(MAX_DECODES + 1), np.array(knots, float)
    i = np.clip(np.searchsorted(x, counts, side="right") - 1, 0, len(x) - 2)
    u = np.maximum(0.0, (counts - x[i]) / (x[i + 1] - x[i]))[:, None]
    table: Array = np.maximum(0.0, rows[i] + u * (rows[i + 1] - rows[i]))
    table[0] = 0.0
    return table


def _prefill_table(latency: Latency) -> tuple[Array, Array, Array]:
    """Chunk knots, context knots and [C, J] us, carried on to 16384 tokens and 131072 tokens of context.

    A chunk longer than measured is a measured one and then the rest, with the first part in the cache.
    """
    chunks, kvs = np.array(latency.prefill_chunk_tokens, float), np.array(latency.prefill_kv_tokens, float)
    measured = np.array(latency.prefill_us)
    longest, floor = chunks[-1], measured[0, 0]

    def time(tokens: float, kv: float) -> float:
        if tokens > longest:
            return float(time(longest, kv) + max(0.0, time(tokens - longest, kv + longest) - floor))
        i, u = _segment(chunks, max(tokens, chunks[0]))
        j, v = _segment(kvs, kv)
        low, high = _between(measured[i], j, v), _between(measured[i + 1], j, v)
        return float(low + u * (high - low))

    further = [longest * scale for scale in (1.5, 2, 3, 4, 6, 8, 12, 16)]
    all_chunks = [*chunks, *(tokens for tokens in further if tokens < MAX_TOKENS)]
    if longest < MAX_TOKENS:
        all_chunks.append(MAX_TOKENS)
    all_kvs = [*kvs, *([_MAX_CONTEXT] if kvs[-1] < _MAX_CONTEXT else [])]
    table = np.array([[time(tokens, kv) for kv in all_kvs] for tokens in all_chunks])
    return np.array(all_chunks, float), np.array(all_kvs, float), table
