"""Running sequences: class clocks, the heap of what ends when, and the batches between tokens."""

from __future__ import annotations

import numpy as np

from llmserve_env.compiled import hot, part
from llmserve_env.sim.kernel.blocks import free_blocks
from llmserve_env.sim.state import BLOCK_TOKENS, GAPS, WAITING


@hot
def heap_place(e, q, c, position, key, slot):
    """Put a sequence that ends at class clock `key` at a place of the heap."""
    q.heap_key[c, position] = key
    q.heap_slot[c, position] = slot
    q.slot_heap[slot] = position


@part
def heap_up(e, q, c, position, key, slot):
    """Put a sequence where it belongs, at a place of the heap or above."""
    while position > 0:
        parent = (position - 1) >> 1
        if q.heap_key[c, parent] <= key:
            break
        heap_place(e, q, c, position, q.heap_key[c, parent], np.int64(q.heap_slot[c, parent]))
        position = parent
    heap_place(e, q, c, position, key, slot)


@part
def heap_remove(e, q, c, position):
    """Take the sequence at a place out of the heap."""
    size = e.heap_size[c] - 1
    e.heap_size[c] = size
    if position == size:
        return
    key = q.heap_key[c, size]
    slot = np.int64(q.heap_slot[c, size])
    child = 2 * position + 1
    start = position
    while child < size:
        if child + 1 < size and q.heap_key[c, child + 1] < q.heap_key[c, child]:
            child += 1
        if q.heap_key[c, child] >= key:
            break
        heap_place(e, q, c, position, q.heap_key[c, child], np.int64(q.heap_slot[c, child]))
        position = child
        child = 2 * position + 1
    if position == start:
        heap_up(e, q, c, position, key, slot)
    else:
        heap_place(e, q, c, position, key, slot)


@part
def unlink(e, q, slot):
    """Take a sequence out of the list of running ones."""
    before = q.slot_prev[slot]
    after = q.slot_next[slot]
    if before >= 0:
        q.slot_next[before] = after
    else:
        e.run_head = after
    if after >= 0:
        q.slot_prev[after] = before
    else:
        e.run_tail = before


@hot
def note_gap(e, q, batches, last_ps):
    """Remember a stretch of batches, the last of them the longest, for `worst_gap`.

    A ring of batches whose durations fall: each is the longest since the one before it.
    """
    e.batches += batches
    tail = e.gaps_tail
    while tail > e.gaps_head and q.gap_ps[(tail - 1) & (GAPS - 1)] <= last_ps:
        tail -= 1
    q.gap_batch[tail & (GAPS - 1)] = e.batches
    q.gap_ps[tail & (GAPS - 1)] = last_ps
    e.gaps_tail = tail + 1
    if e.gaps_tail - e.gaps_head > GAPS:
        e.gaps_head += 1


@part
def worst_gap(e, q, begin):
    """Longest batch after batch number `begin`, 0 without one."""
    low = e.gaps_head
    high = e.gaps_tail
    while low < high:
        middle = (low + high) >> 1
        if q.gap_batch[middle & (GAPS - 1)] > begin:
            high = middle
        else:
            low = middle + 1
    if low == e.gaps_tail:
        return np.int64(0)
    return q.gap_ps[low & (GAPS - 1)]


@part
def widen_gap(s, request, gap_ps):
    """A request had to wait so long between two of its tokens."""
    s.outcomes[request].worst_gap_ps = max(s.outcomes[request].worst_gap_ps, gap_ps)


@part
def deactivate(e, q, slot):
    """Take a decoding sequence out of the totals; returns its context."""
    c = np.int64(q.slot_class[slot])
    offset = q.slot_base[slot] - q.slot_start[slot]
    context = offset + e.clock[c]
    heap_remove(e, q, c, np.int64(q.slot_heap[slot]))
    e.active -= 1
    e.class_active[c] -= 1
    e.kv_sum -= context
    q.crossing[c, (-offset) & (BLOCK_TOKENS - 1)] -= 1
    if offset == e.longest[c]:
        e.longest_known[c] = 0
    return context


@part
def activate(e, q, slot, context, remaining):
    """A sequence decodes from the next batch on; it finishes after `remaining` more tokens."""
    c = np.int64(q.slot_class[slot])
    clock = e.clock[c]
    offset = context - clock
    q.slot_base[slot] = context
    q.slot_start[slot] = clock
    q.slot_begin[slot] = e.batches
    e.active += 1
    e.class_active[c] += 1
    e.kv_sum += context
    q.crossing[c, (-offset) & (BLOCK_TOKENS - 1)] += 1
    if e.class_active[c] == 1:
        e.longest[c] = offset
        e.longest_known[c] = 1
    elif offset > e.longest[c]:
        e.longest[c] = offset
    position = e.heap_size[c]
    e.heap_size[c] = position + 1
    heap_up(e, q, c, position, clock + remaining, slot)


@part
def release(s, e):
    """The batch that was in flight has ended: what finished in it frees its slots and blocks."""
    q = s.slots[e.row]
    slot = e.limbo_head
    while slot >= 0:
        after = np.int64(q.slot_next[slot])
        request = np.int64(q.slot_request[slot])
        free_blocks(s, e, slot, request, q.slot_base[slot], np.int64(-1))
        q.free_slot[e.slots_free] = slot
        e.slots_free += 1
        slot = after
    e.running -= e.limbo_count
    e.unfinished -= e.limbo_count
    e.limbo_count = 0
    e.limbo_blocks = 0
    e.limbo_head = -1


@part
def preempt_newest(s, e):
    """Throw the newest running sequence (under priority routing, of the worst rank) back to the queue."""
    q = s.slots[e.row]
    victim = e.run_tail
    if e.priority:
        slot = e.run_tail
        while slot >= 0:
            worst = s.tenants[s.requests[q.slot_request[victim]].tenant].rank
            if s.tenants[s.requests[q.slot_request[slot]].tenant].rank > worst:
                victim = slot
            slot = q.slot_prev[slot]
    request = np.int64(q.slot_request[victim])
    generated = q.slot_generated[victim]
    if victim == e.partial:
        tokens = e.partial_done
        e.partial = -1
    else:
        tokens = deactivate(e, q, victim)
        widen_gap(s, request, worst_gap(e, q, q.slot_begin[victim]))
        generated += 1 + e.clock[q.slot_class[victim]] - q.slot_start[victim]
        s.outcomes[request].finish_ps = e.busy_ps  # its last token so far
    unlink(e, q, victim)
    owner = request if s.cell.prefix_cache else np.int64(-1)
    s.outcomes[request].segment = -1
    free_blocks(s, e, victim, request, tokens, owner)
    s.outcomes[request].generated = generated
    s.outcomes[request].preemptions += 1
    s.outcomes[request].status = WAITING
    s.outcomes[request].next = e.resumed_head
    e.resumed_head = request
    e.waiting += 1
    e.running -= 1
    q.free_slot[e.slots_free] = victim
    e.slots_free += 1
    s.window.preemptions += 1


@part
def cancel(s, e, slot):
    """Take a running sequence out for good; what it held is free and its work is lost."""
    q = s.slots[e.row]
    request = np.int64(q.slot_request[slot])
    if slot == e.partial:
        tokens = e.partial_done
        e.partial = -1
    else:
        tokens = deactivate(e, q, slot)
    unlink(e, q, slot)
    free_blocks(s, e, slot, request, tokens, np.int64(-1))
    e.running -= 1
    e.unfinished -= 1
    q.free_slot[e.slots_free] = slot
    e.slots_free += 1
