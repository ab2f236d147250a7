"""What a batch takes: the latency tables, and the contexts that they are asked for."""

from __future__ import annotations

import numpy as np

from llmserve_env.compiled import hot, part
from llmserve_env.sim.state import NEVER_PS


@part
def segment(knots, x):
    """Index of the segment of `knots` that holds x; the first or last one outside."""
    k = 0
    while k < len(knots) - 2 and x >= knots[k + 1]:
        k += 1
    return k


@hot
def prefill_attention(s, tier, chunk, kv):
    """Attention of one prefill chunk over `kv` cached tokens (ps, all layers)."""
    i = segment(s.cost.prefill_chunk, chunk)
    j = segment(s.cost.prefill_kv, kv)
    u = (chunk - s.cost.prefill_chunk[i]) / (s.cost.prefill_chunk[i + 1] - s.cost.prefill_chunk[i])
    v = (kv - s.cost.prefill_kv[j]) / (s.cost.prefill_kv[j + 1] - s.cost.prefill_kv[j])
    u = max(u, 0.0)
    table = s.cost.prefill_ps
    low = table[tier, i, j] + u * (table[tier, i + 1, j] - table[tier, i, j])
    high = table[tier, i, j + 1] + u * (table[tier, i + 1, j + 1] - table[tier, i, j + 1])
    return max(low + v * (high - low), 0.0)


@part
def mixed_attention(s, tier, chunk, count, kv):
    """Attention that `count` decodes at context `kv` add beside a prefill of `chunk` tokens (ps)."""
    i = segment(s.cost.mixed_chunk, chunk)
    j = segment(s.cost.mixed_kv, kv)
    u = (chunk - s.cost.mixed_chunk[i]) / (s.cost.mixed_chunk[i + 1] - s.cost.mixed_chunk[i])
    v = (kv - s.cost.mixed_kv[j]) / (s.cost.mixed_kv[j + 1] - s.cost.mixed_kv[j])
    u = min(max(u, 0.0), 1.0)
    table = s.cost.mixed_ps
    low = table[tier, i, count, j] + u * (table[tier, i + 1, count, j] - table[tier, i, count, j])
    high = table[tier, i, count, j + 1] + u * (
        table[tier, i + 1, count, j + 1] - table[tier, i, count, j + 1]
    )
    return max(low + v * (high - low), 0.0)


@hot
def decode_attention(s, e):
    """Attention of a batch of decodes alone, its growth per batch (ps), and batches to the next knot."""
    n = e.active
    knots = s.cost.decode_kv
    kv = e.kv_sum + n
    k = 0
    while k < len(knots) - 2 and kv >= knots[k + 1] * n:
        k += 1
    slope = s.cost.decode_slope[e.tier, n, k]
    attention = s.cost.decode_ps[e.tier, n, k] + (slope * (kv - knots[k] * n)) // n
    until_knot = (knots[k + 1] * n - kv + n - 1) // n if k < len(knots) - 2 else NEVER_PS
    return attention, slope, until_knot


@part
def longest_context(e, q, classes):
    """Longest context of the decoding sequences (tokens)."""
    longest = np.int64(0)
    for c in range(classes):
        if e.class_active[c] == 0:
            continue
        if e.longest_known[c] == 0:
            offset = -NEVER_PS
            for i in range(e.heap_size[c]):
                slot = q.heap_slot[c, i]
                offset = max(offset, q.slot_base[slot] - q.slot_start[slot])
            e.longest[c] = offset
            e.longest_known[c] = 1
        longest = max(longest, e.longest[c] + e.clock[c])
    return longest


@hot
def batch_ps(s, e, prefill_tokens, prefill_ps, ending, depth):
    """Duration of one batch: decodes of the active sequences beside `prefill_tokens` of prefill (ps)."""
    n = e.active
    tier = e.tier
    verified = n * (1 + depth)
    duration = s.cost.dense_ps[tier, verified + prefill_tokens] + s.cost.head_ps[tier, verified + ending]
    if prefill_tokens > 0:
        attention = s.cost.prefill_ps[tier, 0, 0] + prefill_ps
        if n > 0:
            mean = (e.kv_sum + n) / n
            spread = longest_context(e, s.slots[e.row], s.cell.classes) + 1 - mean
            kv = mean + min(1.0, s.cost.mixed_skew / n) * spread
            attention += mixed_attention(s, tier, float(prefill_tokens), n, kv)
        duration += np.int64(np.rint(attention))
    else:
        duration += decode_attention(s, e)[0]
    if depth > 0 and n > 0:
        draft = s.cell.draft_layers * s.cost.dense_ps[tier, n] + s.cell.draft_head * s.cost.head_ps[tier, n]
        duration += np.int64(np.rint(depth * draft))
    return duration
