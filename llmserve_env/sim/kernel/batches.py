"""Batches: how many alike follow each other, what they take, and which sequences end in them."""

from __future__ import annotations

import math

import numpy as np

from llmserve_env.compiled import hot, part
from llmserve_env.sim.kernel.blocks import blocks_for, free_room, queue_take
from llmserve_env.sim.kernel.calendar import push_timer, transfer_ps
from llmserve_env.sim.kernel.sequences import activate, deactivate, note_gap, unlink, widen_gap, worst_gap
from llmserve_env.sim.kernel.timing import decode_attention
from llmserve_env.sim.state import BLOCK_TOKENS, COMPLETED, HISTOGRAM_BINS, NEVER_PS, PREFILL, TRANSFER


@hot
def histogram_bin(duration_ps):
    """Histogram bin of a duration (state.histogram_edges_s): its exponent and three bits of its mantissa."""
    index = (np.float64(duration_ps * 1e-12).view(np.int64) >> 49) - 8 * (1023 - 14)
    return min(max(index, 0), HISTOGRAM_BINS - 1)


@hot
def step_tokens(s, e, c, depth):
    """Tokens that each sequence of a class gains in the next batch."""
    if depth == 0:
        return np.int64(1)
    return (e.accept[c] + s.accept[c, depth]) >> 20


@part
def decode_need(s, e, depth):
    """Blocks that the decodes of the next batch take."""
    q = s.slots[e.row]
    need = np.int64(0)
    for c in range(s.cell.classes):
        if e.class_active[c] > 0:
            for i in range(step_tokens(s, e, c, depth)):
                need += q.crossing[c, (e.clock[c] + i) & (BLOCK_TOKENS - 1)]
    return need


@hot
def decode_stretch(s, e, limit_ps):
    """How many further decode batches share the composition of the next one, and what they take.

    Returns (batches, first duration, growth of the duration per batch), in ps. No batch of the stretch may be
    decided at or after `limit_ps`, run past a finish, cross a knot of the latency table, or lack blocks.
    """
    q = s.slots[e.row]
    n = e.active
    tier = e.tier
    most = NEVER_PS
    for c in range(s.cell.classes):
        if e.heap_size[c] > 0:
            most = min(most, q.heap_key[c, 0] - e.clock[c])
    attention, slope, until_knot = decode_attention(s, e)
    first = s.cost.dense_ps[tier, n] + s.cost.head_ps[tier, n] + attention
    most = min(most, until_knot)
    # batch m is decided at the end of batch m - 2, the second at the end of the batch in flight; without
    # asynchronous scheduling at the end of batch m - 1
    start = max(e.next_ps, e.busy_ps)
    if start >= limit_ps:
        return np.int64(1), first, slope
    ahead = 2 - e.synchronous
    if most > ahead:
        room = limit_ps - start
        half = 0.5 * slope
        b = first - half
        m = np.int64(2.0 * room / (b + math.sqrt(b * b + 4.0 * half * room)))
        m = max(min(m, most), 0)
        while m > 0 and m * first + slope * (m * (m - 1) // 2) >= room:
            m -= 1
        while m < most and (m + 1) * first + slope * ((m + 1) * m // 2) < room:
            m += 1
        most = min(most, m + ahead)
    room = free_room(e, np.int64(1))
    if room < n * ((most >> 4) + 1):
        cycles = room // n
        batches = min(cycles * BLOCK_TOKENS, most)
        room -= cycles * n
        while batches < most:
            for c in range(s.cell.classes):
                room -= q.crossing[c, (e.clock[c] + batches) & (BLOCK_TOKENS - 1)]
            if room < 0:
                break
            batches += 1
        most = max(batches, 1)
    return most, first, slope


@hot
def run_stretch(s, e, batches, first, slope):
    """Advance all decoding sequences by `batches` tokens."""
    q = s.slots[e.row]
    n = e.active
    need = (batches >> 4) * n
    rest = batches & (BLOCK_TOKENS - 1)
    for c in range(s.cell.classes):
        if e.class_active[c] > 0:
            for i in range(rest):
                need += q.crossing[c, (e.clock[c] + i) & (BLOCK_TOKENS - 1)]
        e.clock[c] += batches
    if need > 0:
        queue_take(s, e, need)
    e.kv_sum += n * batches
    duration = batches * first + slope * (batches * (batches - 1) // 2)
    start = max(e.next_ps, e.busy_ps)
    last = first + slope * (batches - 1)
    note_gap(e, q, batches, last)
    e.busy_ps = start + duration
    e.next_ps = start if batches == 1 else e.busy_ps - last
    if e.synchronous:
        e.next_ps = e.busy_ps
    low = histogram_bin(first)
    high = histogram_bin(last)
    if low == high:
        s.sums.gap_histogram[low] += n * batches
    else:
        for i in range(batches):
            s.sums.gap_histogram[histogram_bin(first + slope * i)] += n
    s.window.iterations += batches
    s.window.output_tokens += n * batches
    count_batch_time(s, e, duration, need)


@hot
def count_batch_time(s, e, duration, taken):
    """Integrate what runs in batches: not what ended before them, and half of the blocks that they take."""
    s.sums.busy_ps += float(duration)
    s.sums.sequence_ps += float(e.running - e.limbo_count) * float(duration)
    s.sums.block_ps += (e.held - e.limbo_blocks - 0.5 * taken) / e.blocks * float(duration)


@hot
def finish(s, e, slot):
    """The last token of a sequence (or, in a prefill pool, its first) is in the batch that is in flight."""
    q = s.slots[e.row]
    request = np.int64(q.slot_request[slot])
    c = q.slot_class[slot]
    generated = q.slot_generated[slot] + 1 + e.clock[c] - q.slot_start[slot]
    context = deactivate(e, q, slot)
    q.slot_base[slot] = context
    e.limbo_blocks += blocks_for(context) - q.slot_shared[slot]
    widen_gap(s, request, worst_gap(e, q, q.slot_begin[slot]))
    unlink(e, q, slot)
    before = np.int64(-1)
    after = e.limbo_head
    while after >= 0 and q.slot_order[after] < q.slot_order[slot]:
        before = np.int64(after)
        after = np.int64(q.slot_next[after])
    q.slot_next[slot] = after
    if before >= 0:
        q.slot_next[before] = slot
    else:
        e.limbo_head = slot
    e.limbo_count += 1
    e.limbo_ps = e.busy_ps
    if generated < s.requests[request].output_tokens:  # only a prefill pool stops here
        s.outcomes[request].generated = generated
        s.outcomes[request].status = TRANSFER
        s.outcomes[request].finish_ps = e.busy_ps  # its last token so far
        s.window.transfers += 1
        ready_ps = e.busy_ps + transfer_ps(s, s.requests[request].prompt_tokens)
        push_timer(s.transfers, s.cell.transfers, ready_ps, request)
        s.cell.transfers += 1
        return
    tenant = s.requests[request].tenant
    s.window.output_tokens -= generated - s.requests[request].output_tokens  # speculation ran past the end
    s.outcomes[request].generated = s.requests[request].output_tokens
    s.outcomes[request].status = COMPLETED
    s.outcomes[request].finish_ps = e.busy_ps
    s.window.completed += 1
    s.window.tenant_completed[tenant] += 1
    s.window.tenant_output_tokens[tenant] += s.requests[request].output_tokens
    s.cell.tenant_in_flight[tenant] -= 1
    first = s.outcomes[request].first_ps
    gaps = max(s.requests[request].output_tokens - 1, 1)
    ttft = first - s.requests[request].arrival_ps
    tpot = (e.busy_ps - first + gaps - 1) // gaps
    if ttft <= s.tenants[tenant].ttft_slo_ps and tpot <= s.tenants[tenant].tpot_slo_ps:
        s.window.tier_in_slo[e.tier, tenant] += 1
        used = max(ttft / s.tenants[tenant].ttft_slo_ps, tpot / s.tenants[tenant].tpot_slo_ps)
        s.window.tenant_headroom[tenant] += 1.0 - used


@part
def long_gap(s, e, request):
    """A sequence that was preempted or transferred gets a token at the end of the batch just scheduled."""
    gap = e.busy_ps - s.outcomes[request].finish_ps
    s.outcomes[request].finish_ps = 0
    widen_gap(s, request, gap)
    s.sums.gap_histogram[histogram_bin(gap)] += 1


@hot
def end_prefill(s, e, slot):
    """The batch that was just scheduled ends this prefill and yields a token."""
    q = s.slots[e.row]
    request = np.int64(q.slot_request[slot])
    generated = q.slot_generated[slot]
    if s.outcomes[request].first_ps == 0:
        s.outcomes[request].first_ps = e.busy_ps
        ttft = e.busy_ps - s.requests[request].arrival_ps
        tenant = s.requests[request].tenant
        s.window.first_tokens += 1
        s.sums.ttft_ps += float(ttft)
        s.window.tenant_first_tokens[tenant] += 1
        s.sums.tenant_ttft_ps[tenant] += float(ttft)
        s.sums.ttft_histogram[histogram_bin(ttft)] += 1
    else:
        long_gap(s, e, request)
    remaining = s.requests[request].output_tokens - 1 - generated
    if e.role == PREFILL:
        remaining = 0
    activate(e, q, slot, s.requests[request].prompt_tokens + generated, remaining)
