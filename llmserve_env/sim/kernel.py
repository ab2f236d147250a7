"""All jitted code: one engine's scheduler in closed form, the cell around it, the batch of episodes.

The scheduler is vLLM V1's. With asynchronous scheduling batch k+1 is decided while batch k runs, as soon as
batch k-1 has ended; without it, when batch k has ended. A batch takes the running sequences first (one token
each, or 1 + depth under speculation), then the one unfinished prefill, then waiting requests, under one token
budget. In a batch all decoding sequences of a speculation class advance alike, so an engine keeps totals, not
a loop over its batch:

* a class's token clock says how many tokens each of its sequences has gained; a sequence finishes when the
  clock reaches a key that was known when its prefill ended (a heap per class);
* the contexts' sum grows by the batch size each iteration; with integer time the durations of a stretch of
  iterations without an event are an arithmetic progression, summed exactly;
* a sequence needs a block each time its class clock passes one residue modulo the block size, so the blocks
  that an iteration takes are a count per residue.

tests/alignment holds the same scheduler written plainly, and the two must agree request by request.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from llmserve_env.hardware.constants import MAX_DEPTH
from llmserve_env.sim.state import (
    ACCEPT_ONE,
    BLOCK_TOKENS,
    CANCELLED,
    COLOCATED,
    COMPLETED,
    DECODE,
    DRAINING,
    FAILED,
    GAPS,
    HISTOGRAM_BINS,
    MAX_DOUBLINGS,
    MAX_RUNNING,
    MAX_TOKEN_PS,
    NEVER_PS,
    PREFILL,
    PS_PER_S,
    RELOADING,
    RETRYING,
    RUNNING,
    TRANSFER,
    UP,
    WAITING,
    Prefixes,
    Timers,
)

# The arrays belong to the caller for the length of a call, so their references need no counting; with it a
# decision costs ten times as much. Nothing is divided by zero; error_model "numpy" leaves out the checks.
_compiled = njit(cache=True, error_model="numpy", _nrt=False)
_inlined = njit(cache=True, error_model="numpy", _nrt=False, forceinline=True)

_SPLITMIX = np.uint64(0x9E3779B97F4A7C15)


# ------------------------------------------------------------------------------------------------ small parts


@_inlined
def _bin(duration_ps):
    """Histogram bin of a duration (state.histogram_edges_s): its exponent and three bits of its mantissa."""
    index = (np.float64(duration_ps * 1e-12).view(np.int64) >> 49) - 8 * (1023 - 14)
    return min(max(index, 0), HISTOGRAM_BINS - 1)


@_inlined
def _segment(knots, x):
    """Index of the segment of `knots` that holds x; the first or last one outside."""
    k = 0
    while k < len(knots) - 2 and x >= knots[k + 1]:
        k += 1
    return k


@_inlined
def _prefill_ps(cost, tier, chunk, kv):
    """Attention of one prefill chunk over `kv` cached tokens (ps, all layers)."""
    i = _segment(cost.prefill_chunk, chunk)
    j = _segment(cost.prefill_kv, kv)
    u = (chunk - cost.prefill_chunk[i]) / (cost.prefill_chunk[i + 1] - cost.prefill_chunk[i])
    v = (kv - cost.prefill_kv[j]) / (cost.prefill_kv[j + 1] - cost.prefill_kv[j])
    u = max(u, 0.0)
    table = cost.prefill_ps
    low = table[tier, i, j] + u * (table[tier, i + 1, j] - table[tier, i, j])
    high = table[tier, i, j + 1] + u * (table[tier, i + 1, j + 1] - table[tier, i, j + 1])
    return max(low + v * (high - low), 0.0)


@_inlined
def _mixed_ps(cost, tier, chunk, count, kv):
    """Attention that `count` decodes at context `kv` add beside a prefill of `chunk` tokens (ps)."""
    i = _segment(cost.mixed_chunk, chunk)
    j = _segment(cost.mixed_kv, kv)
    u = (chunk - cost.mixed_chunk[i]) / (cost.mixed_chunk[i + 1] - cost.mixed_chunk[i])
    v = (kv - cost.mixed_kv[j]) / (cost.mixed_kv[j + 1] - cost.mixed_kv[j])
    u = min(max(u, 0.0), 1.0)
    table = cost.mixed_ps
    low = table[tier, i, count, j] + u * (table[tier, i + 1, count, j] - table[tier, i, count, j])
    high = table[tier, i, count, j + 1] + u * (
        table[tier, i + 1, count, j + 1] - table[tier, i, count, j + 1]
    )
    return max(low + v * (high - low), 0.0)


@_inlined
def _blocks(tokens):
    return (tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS


# ------------------------------------------------------------------------------------ heap of finishing times


@_inlined
def _heap_place(e, c, position, key, slot):
    e.heap_key[c, position] = key
    e.heap_slot[c, position] = slot
    e.slot_heap[slot] = position


@_inlined
def _heap_up(e, c, position, key, slot):
    while position > 0:
        parent = (position - 1) >> 1
        if e.heap_key[c, parent] <= key:
            break
        _heap_place(e, c, position, e.heap_key[c, parent], e.heap_slot[c, parent])
        position = parent
    _heap_place(e, c, position, key, slot)


@_inlined
def _heap_remove(e, c, position):
    size = e.heap_size[c] - 1
    e.heap_size[c] = size
    if position == size:
        return
    key = e.heap_key[c, size]
    slot = e.heap_slot[c, size]
    child = 2 * position + 1
    start = position
    while child < size:
        if child + 1 < size and e.heap_key[c, child + 1] < e.heap_key[c, child]:
            child += 1
        if e.heap_key[c, child] >= key:
            break
        _heap_place(e, c, position, e.heap_key[c, child], e.heap_slot[c, child])
        position = child
        child = 2 * position + 1
    if position == start:
        _heap_up(e, c, position, key, slot)
    else:
        _heap_place(e, c, position, key, slot)


# ------------------------------------------------------------------------------- free queue and prefix cache


@_compiled
def _table_find(pool, g, key):
    """Position of a key in the hash table, or of the empty place where it belongs."""
    mask = pool.table_key.shape[1] - 1
    position = np.int64((np.uint64(key) * _SPLITMIX) >> np.uint64(20)) & mask
    while pool.table_key[g, position] != -1 and pool.table_key[g, position] != key:
        position = (position + 1) & mask
    return position


@_compiled
def _table_delete(pool, g, key):
    mask = pool.table_key.shape[1] - 1
    hole = _table_find(pool, g, key)
    probe = (hole + 1) & mask
    while pool.table_key[g, probe] != -1:
        home = np.int64((np.uint64(pool.table_key[g, probe]) * _SPLITMIX) >> np.uint64(20)) & mask
        if ((probe - home) & mask) >= ((probe - hole) & mask):
            pool.table_key[g, hole] = pool.table_key[g, probe]
            pool.table_node[g, hole] = pool.table_node[g, probe]
            hole = probe
        probe = (probe + 1) & mask
    pool.table_key[g, hole] = -1


@_compiled
def _queue_compact(e, g, out, pool):
    """Close the gaps that touched segments left in the ring; neighbours without an owner become one."""
    mask = pool.queue_owner.shape[1] - 1
    write = e.queue_head
    last_free = False
    for read in range(e.queue_head, e.queue_tail):
        length = pool.queue_length[g, read & mask]
        if length == 0:
            continue
        owner = pool.queue_owner[g, read & mask]
        if owner == -1 and last_free:
            pool.queue_length[g, (write - 1) & mask] += length
            continue
        pool.queue_owner[g, write & mask] = owner
        pool.queue_length[g, write & mask] = length
        if owner >= 0:
            out[owner].segment = write & mask
        elif owner <= -2:
            pool.node_segment[g, -2 - owner] = write & mask
        last_free = owner == -1
        write += 1
    e.queue_tail = write


@_inlined
def _queue_push(e, g, out, pool, owner, length):
    """Blocks become free; they are the last that an allocation will take."""
    mask = pool.queue_owner.shape[1] - 1
    if owner == -1 and e.queue_tail > e.queue_head:
        last = (e.queue_tail - 1) & mask
        if pool.queue_owner[g, last] == -1:
            pool.queue_length[g, last] += length
            return
    if e.queue_tail - e.queue_head > mask:
        _queue_compact(e, g, out, pool)
        if e.queue_tail - e.queue_head > mask:  # thousands of preempted requests: the newest loses its cache
            last = (e.queue_tail - 1) & mask
            if pool.queue_owner[g, last] >= 0:
                out[pool.queue_owner[g, last]].segment = -1
            pool.queue_owner[g, last] = -1
            pool.queue_length[g, last] += length
            return
    position = e.queue_tail & mask
    pool.queue_owner[g, position] = owner
    pool.queue_length[g, position] = length
    if owner >= 0:
        out[owner].segment = position
    elif owner <= -2:
        pool.node_segment[g, -2 - owner] = position
    e.queue_tail += 1


@_inlined
def _queue_take(e, counters, g, out, pool, blocks):
    """Allocate blocks, least recently used first; what they cached is gone."""
    mask = pool.queue_owner.shape[1] - 1
    e.held += blocks
    while blocks > 0:
        position = e.queue_head & mask
        length = pool.queue_length[g, position]
        taken = min(length, blocks)
        owner = pool.queue_owner[g, position]
        if owner != -1:
            counters.evictions += taken
            if owner <= -2 and taken > 0:
                node = -2 - owner
                _table_delete(pool, g, pool.node_key[g, node])
                pool.node_free[g, e.nodes_free] = node
                e.nodes_free += 1
            elif owner >= 0 and taken == length:
                out[owner].segment = -1
        pool.queue_length[g, position] = length - taken
        blocks -= taken
        if taken == length:
            e.queue_head += 1


@_inlined
def _prefix_blocks(req, pre, request):
    """Full KV blocks of a prompt that have a hash."""
    hashed = (pre.offsets[request + 1] - pre.offsets[request]) * pre.per_id
    return min(hashed, np.int64(req[request].prompt_tokens // BLOCK_TOKENS))


@_compiled
def _share_blocks(e, g, req, out, pool, pre, slot, request, full_blocks):
    """Enter the prompt's blocks up to `full_blocks` into the prefix cache as they are computed."""
    shared = e.slot_shared[slot]
    first = pre.offsets[request]
    limit = min(full_blocks, _prefix_blocks(req, pre, request))
    while shared < limit:
        key = pre.ids[first + shared // pre.per_id] * pre.per_id + shared % pre.per_id
        position = _table_find(pool, g, key)
        if pool.table_key[g, position] == key:
            # computed twice at once: keep the first copy, give the second back
            node = pool.table_node[g, position]
            if pool.node_references[g, node] == 0:
                pool.queue_length[g, pool.node_segment[g, node]] = 0
                e.held += 1
            pool.node_references[g, node] += 1
            e.held -= 1
            _queue_push(e, g, out, pool, -1, 1)
        else:
            e.nodes_free -= 1
            node = pool.node_free[g, e.nodes_free]
            pool.table_key[g, position] = key
            pool.table_node[g, position] = node
            pool.node_key[g, node] = key
            pool.node_references[g, node] = 1
        shared += 1
    e.slot_shared[slot] = shared


@_inlined
def _free_blocks(e, g, out, pool, pre, slot, request, tokens, owner):
    """Give back what a sequence with `tokens` tokens in the cache holds, its last block first."""
    shared = e.slot_shared[slot]
    private = _blocks(tokens) - shared
    if private > 0:
        e.held -= private
        _queue_push(e, g, out, pool, owner, private)
    first = pre.offsets[request] if shared > 0 else 0
    for block in range(shared - 1, -1, -1):
        key = pre.ids[first + block // pre.per_id] * pre.per_id + block % pre.per_id
        node = pool.table_node[g, _table_find(pool, g, key)]
        pool.node_references[g, node] -= 1
        if pool.node_references[g, node] == 0:
            e.held -= 1
            _queue_push(e, g, out, pool, -2 - node, 1)


# ------------------------------------------------------------------------------------------ running sequences


@_inlined
def _unlink(e, slot):
    before = e.slot_prev[slot]
    after = e.slot_next[slot]
    if before >= 0:
        e.slot_next[before] = after
    else:
        e.run_head = after
    if after >= 0:
        e.slot_prev[after] = before
    else:
        e.run_tail = before


@_inlined
def _note_gap(e, batches, last_ps):
    """Remember a stretch of batches, the last of them the longest, for `_worst_gap`.

    A ring of batches whose durations fall: each is the longest since the one before it.
    """
    e.batches += batches
    tail = e.gaps_tail
    while tail > e.gaps_head and e.gap_ps[(tail - 1) & (GAPS - 1)] <= last_ps:
        tail -= 1
    e.gap_batch[tail & (GAPS - 1)] = e.batches
    e.gap_ps[tail & (GAPS - 1)] = last_ps
    e.gaps_tail = tail + 1
    if e.gaps_tail - e.gaps_head > GAPS:
        e.gaps_head += 1


@_inlined
def _worst_gap(e, begin):
    """Longest batch after batch number `begin`, 0 without one."""
    low = e.gaps_head
    high = e.gaps_tail
    while low < high:
        middle = (low + high) >> 1
        if e.gap_batch[middle & (GAPS - 1)] > begin:
            high = middle
        else:
            low = middle + 1
    if low == e.gaps_tail:
        return np.int64(0)
    return e.gap_ps[low & (GAPS - 1)]


@_inlined
def _deactivate(e, slot):
    """Take a decoding sequence out of the totals; returns its context."""
    c = e.slot_class[slot]
    offset = e.slot_base[slot] - e.slot_start[slot]
    context = offset + e.clock[c]
    _heap_remove(e, c, e.slot_heap[slot])
    e.active -= 1
    e.class_active[c] -= 1
    e.kv_sum -= context
    e.crossing[c, (-offset) & (BLOCK_TOKENS - 1)] -= 1
    if offset == e.longest[c]:
        e.longest_known[c] = 0
    return context


@_inlined
def _activate(e, slot, context, remaining):
    """A sequence decodes from the next batch on; it finishes after `remaining` more tokens."""
    c = e.slot_class[slot]
    clock = e.clock[c]
    offset = context - clock
    e.slot_base[slot] = context
    e.slot_start[slot] = clock
    e.slot_begin[slot] = e.batches
    e.active += 1
    e.class_active[c] += 1
    e.kv_sum += context
    e.crossing[c, (-offset) & (BLOCK_TOKENS - 1)] += 1
    if e.class_active[c] == 1:
        e.longest[c] = offset
        e.longest_known[c] = 1
    elif offset > e.longest[c]:
        e.longest[c] = offset
    position = e.heap_size[c]
    e.heap_size[c] = position + 1
    _heap_up(e, c, position, clock + remaining, slot)


@_inlined
def _longest_context(e, classes):
    longest = np.int64(0)
    for c in range(classes):
        if e.class_active[c] == 0:
            continue
        if e.longest_known[c] == 0:
            offset = -NEVER_PS
            for i in range(e.heap_size[c]):
                slot = e.heap_slot[c, i]
                offset = max(offset, e.slot_base[slot] - e.slot_start[slot])
            e.longest[c] = offset
            e.longest_known[c] = 1
        longest = max(longest, e.longest[c] + e.clock[c])
    return longest


@_inlined
def _release(e, g, out, pool, pre):
    """The batch that was in flight has ended: what finished in it frees its slots and blocks."""
    slot = e.limbo_head
    while slot >= 0:
        after = e.slot_next[slot]
        request = e.slot_request[slot]
        _free_blocks(e, g, out, pool, pre, slot, request, e.slot_base[slot], -1)
        e.free_slot[e.slots_free] = slot
        e.slots_free += 1
        slot = after
    e.running -= e.limbo_count
    e.unfinished -= e.limbo_count
    e.limbo_count = 0
    e.limbo_blocks = 0
    e.limbo_head = -1


@_compiled
def _preempt_newest(e, counters, g, cell, req, out, ten, pool, pre):
    """Throw the newest running sequence (under priority routing, of the worst rank) back to the queue."""
    victim = e.run_tail
    if e.priority:
        slot = e.run_tail
        while slot >= 0:
            worst = ten.rank[req[e.slot_request[victim]].tenant]
            if ten.rank[req[e.slot_request[slot]].tenant] > worst:
                victim = slot
            slot = e.slot_prev[slot]
    request = e.slot_request[victim]
    generated = e.slot_generated[victim]
    if victim == e.partial:
        tokens = e.partial_done
        e.partial = -1
    else:
        tokens = _deactivate(e, victim)
        out[request].worst_gap_ps = max(out[request].worst_gap_ps, _worst_gap(e, e.slot_begin[victim]))
        generated += 1 + e.clock[e.slot_class[victim]] - e.slot_start[victim]
        out[request].finish_ps = e.busy_ps  # its last token so far
    _unlink(e, victim)
    owner = request if cell.prefix_cache else -1
    out[request].segment = -1
    _free_blocks(e, g, out, pool, pre, victim, request, tokens, owner)
    out[request].generated = generated
    out[request].preemptions += 1
    out[request].status = WAITING
    out[request].next = e.resumed_head
    e.resumed_head = request
    e.waiting += 1
    e.running -= 1
    e.free_slot[e.slots_free] = victim
    e.slots_free += 1
    counters.preemptions += 1


@_inlined
def _cancel(e, g, out, pool, pre, slot):
    """Take a running sequence out for good; what it held is free and its work is lost."""
    request = e.slot_request[slot]
    if slot == e.partial:
        tokens = e.partial_done
        e.partial = -1
    else:
        tokens = _deactivate(e, slot)
    _unlink(e, slot)
    _free_blocks(e, g, out, pool, pre, slot, request, tokens, -1)
    e.running -= 1
    e.unfinished -= 1
    e.free_slot[e.slots_free] = slot
    e.slots_free += 1


# --------------------------------------------------------------------------- timers, and clients that go away


@_compiled
def _timer_push(times, requests, size, time_ps, request):
    """Enter a request into a heap of `size` others by (time, request)."""
    position = size
    while position > 0:
        parent = (position - 1) >> 1
        if (times[parent], requests[parent]) <= (time_ps, request):
            break
        times[position] = times[parent]
        requests[position] = requests[parent]
        position = parent
    times[position] = time_ps
    requests[position] = request


@_compiled
def _timer_pop(times, requests, size):
    """Take the first request from a heap of `size`."""
    request = requests[0]
    size -= 1
    time_ps = times[size]
    last = requests[size]
    position = 0
    child = 1
    while child < size:
        right = child + 1
        if right < size and (times[right], requests[right]) < (times[child], requests[child]):
            child = right
        if (times[child], requests[child]) >= (time_ps, last):
            break
        times[position] = times[child]
        requests[position] = requests[child]
        position = child
        child = 2 * position + 1
    times[position] = time_ps
    requests[position] = last
    return request


@_compiled
def _end_try(counters, cell, req, out, ten, tr, request, now_ps):
    """A try has been refused or given up: its client sends the request again later, or it has failed."""
    tenant = req[request].tenant
    out[request].first_ps = 0
    out[request].worst_gap_ps = 0
    out[request].generated = 0
    out[request].finish_ps = 0
    tries = np.int64(out[request].retries)
    if tries < ten.retries[tenant]:
        again_ps = now_ps + (ten.retry_after_ps[tenant] << min(tries, MAX_DOUBLINGS))
        out[request].retries = tries + 1
        out[request].status = RETRYING
        out[request].sent_ps = again_ps
        _timer_push(tr.retry_ps, tr.retry_request, cell.retrying, again_ps, request)
        cell.retrying += 1
        return
    out[request].status = FAILED
    out[request].finish_ps = now_ps
    counters.failed += 1
    counters.tenant_failed[tenant] += 1
    cell.tenant_in_flight[tenant] -= 1


@_inlined
def _lets_in(cell, ten, tenant, priority, now_ps):
    """Take a token from the bucket in front of the queue, if there is one for this tenant.

    The bucket as a virtual clock, exact in integers: `full_ps` is when it will be full again, a token takes
    `token_ps` to come back. Under priority routing rank r of n may take what is above r / n of the bucket.
    """
    full_ps = max(cell.full_ps, now_ps) + cell.token_ps
    burst_ps = cell.burst_ps
    if priority:
        burst_ps = burst_ps * (ten.ranks - ten.rank[tenant]) // ten.ranks
    if full_ps - now_ps > max(burst_ps, cell.token_ps):
        return False
    cell.full_ps = full_ps
    return True


# ------------------------------------------------------------------------------------------- waiting requests


@_inlined
def _transfer_ps(cell, prompt_tokens):
    return cell.transfer_latency_ps + cell.transfer_ps_per_token * prompt_tokens


@_inlined
def _queued_ps(cell, req, out, request):
    """When a fresh request reached its engine's queue."""
    if out[request].status == TRANSFER:
        return out[request].finish_ps + _transfer_ps(cell, req[request].prompt_tokens)
    return out[request].sent_ps


@_inlined
def _count_arrival(e, now_ps):
    """A request has joined the engine's queue: wake it if it sleeps."""
    e.waiting += 1
    e.unfinished += 1
    if e.next_ps == NEVER_PS:
        e.next_ps = max(now_ps, e.busy_ps)


@_inlined
def _limit(e, out, ten, tenant, request):
    """Note when the client of a request that the engine has started on goes away."""
    e.leave_ps = min(e.leave_ps, out[request].sent_ps + ten.deadline_ps[tenant])


@_inlined
def _enqueue(e, req, out, ten, request, now_ps):
    tenant = req[request].tenant
    out[request].next = -1
    if out[request].status != TRANSFER:
        out[request].status = WAITING
        e.soonest_ps = min(e.soonest_ps, out[request].sent_ps + ten.patience_ps[tenant])
    else:
        _limit(e, out, ten, tenant, request)
    if e.fresh_head[tenant] < 0:
        e.fresh_head[tenant] = request
    else:
        out[e.fresh_tail[tenant]].next = request
    e.fresh_tail[tenant] = request
    _count_arrival(e, now_ps)


@_inlined
def _expire(e, counters, cell, req, out, ten, tr, now_ps):
    """End the tries whose client has given up waiting by now; returns a time before which no other will."""
    if now_ps < e.soonest_ps:
        return e.soonest_ps
    soonest = NEVER_PS
    for tenant in range(cell.tenants):
        patience = ten.patience_ps[tenant]
        if patience >= NEVER_PS:
            continue
        before = np.int64(-1)
        request = np.int64(e.fresh_head[tenant])
        while request >= 0:
            after = np.int64(out[request].next)
            if out[request].status == TRANSFER:  # it has its first token
                before = request
                request = after
                continue
            deadline = out[request].sent_ps + patience
            if deadline > now_ps:
                soonest = min(soonest, deadline)
                break
            counters.timeouts += 1
            _end_try(counters, cell, req, out, ten, tr, request, deadline)
            e.waiting -= 1
            e.unfinished -= 1
            if before >= 0:
                out[before].next = after
            else:
                e.fresh_head[tenant] = after
            if after < 0:
                e.fresh_tail[tenant] = before
            request = after
    e.soonest_ps = soonest
    return soonest


@_compiled
def _leave_queues(e, counters, g, cell, req, out, ten, pool, tr, now_ps):
    """End the tries past their deadline that wait after they were started on; returns when the next is."""
    soonest = NEVER_PS
    before = np.int64(-1)
    request = np.int64(e.resumed_head)
    while request >= 0:  # preempted ones
        after = np.int64(out[request].next)
        leave_ps = out[request].sent_ps + ten.deadline_ps[req[request].tenant]
        if leave_ps > now_ps:
            soonest = min(soonest, leave_ps)
            before = request
        else:
            if out[request].segment >= 0:
                pool.queue_owner[g, out[request].segment] = -1
                out[request].segment = -1
            if before >= 0:
                out[before].next = after
            else:
                e.resumed_head = after
            e.waiting -= 1
            e.unfinished -= 1
            counters.timeouts += 1
            _end_try(counters, cell, req, out, ten, tr, request, leave_ps)
        request = after
    if not cell.can_split:
        return soonest
    for tenant in range(cell.tenants):
        before = np.int64(-1)
        request = np.int64(e.fresh_head[tenant])
        while request >= 0:  # those that came from a prefill pool
            after = np.int64(out[request].next)
            leave_ps = max(
                _queued_ps(cell, req, out, request), out[request].sent_ps + ten.deadline_ps[tenant]
            )
            if out[request].status != TRANSFER or leave_ps > now_ps:
                if out[request].status == TRANSFER:
                    soonest = min(soonest, leave_ps)
                before = request
            else:
                if before >= 0:
                    out[before].next = after
                else:
                    e.fresh_head[tenant] = after
                if after < 0:
                    e.fresh_tail[tenant] = before
                e.waiting -= 1
                e.unfinished -= 1
                counters.timeouts += 1
                _end_try(counters, cell, req, out, ten, tr, request, leave_ps)
            request = after
    return soonest


@_compiled
def _leave(e, counters, g, cell, req, out, ten, pool, pre, tr, now_ps):
    """End the tries past their deadline that the engine has started on, in the order of their deadlines.

    One whose last token is scheduled is not cancelled any more.
    """
    soonest = _leave_queues(e, counters, g, cell, req, out, ten, pool, tr, now_ps)
    while True:
        first = np.int64(-1)
        first_ps = NEVER_PS
        slot = np.int64(e.run_head)
        while slot >= 0:
            request = e.slot_request[slot]
            leave_ps = out[request].sent_ps + ten.deadline_ps[req[request].tenant]
            c = e.slot_class[slot]
            over = slot != e.partial and e.heap_key[c, e.slot_heap[slot]] <= e.clock[c]
            if not over and (
                leave_ps < first_ps or (leave_ps == first_ps and request < e.slot_request[first])
            ):
                first = slot
                first_ps = leave_ps
            slot = np.int64(e.slot_next[slot])
        if first < 0 or first_ps > now_ps:
            break
        if e.limbo_count > 0 and e.limbo_ps <= first_ps:
            _release(e, g, out, pool, pre)
        request = np.int64(e.slot_request[first])
        _cancel(e, g, out, pool, pre, first)
        counters.timeouts += 1
        _end_try(counters, cell, req, out, ten, tr, request, first_ps)
    e.leave_ps = min(soonest, first_ps)


@_inlined
def _pick_fresh(e, cell, req, out):
    """The fresh request that has waited longest, -1 for none; and -2, its place."""
    best = np.int64(-1)
    best_ps = NEVER_PS
    for tenant in range(cell.tenants):
        request = np.int64(e.fresh_head[tenant])
        if request >= 0:
            queued = _queued_ps(cell, req, out, request)
            if queued < best_ps or (queued == best_ps and request < best):
                best = request
                best_ps = queued
    return best, np.int64(-2)


@_inlined
def _pick(e, cell, req, out, ten, resumed_only):
    """The waiting request that vLLM would look at next, -1 for none, and where it stands.

    That is the one before it in the stack of preempted requests, -1 for its top, -2 for a fresh request.

    Preempted requests stand before fresh ones, the last preempted first. Under priority routing a lower rank
    goes first, and a preempted one goes first within a rank.
    """
    if not e.priority:
        if e.resumed_head >= 0:
            return e.resumed_head, np.int64(-1)
        if resumed_only:
            return np.int64(-1), np.int64(-2)
        return _pick_fresh(e, cell, req, out)
    best = np.int64(-1)
    best_before = np.int64(-2)
    best_rank = NEVER_PS
    before = np.int64(-1)
    request = e.resumed_head
    while request >= 0:
        rank = ten.rank[req[request].tenant]
        if rank < best_rank:
            best = request
            best_before = before
            best_rank = rank
        before = request
        request = np.int64(out[request].next)
    if resumed_only:
        return best, best_before
    best_ps = np.int64(-1)
    for tenant in range(cell.tenants):
        request = np.int64(e.fresh_head[tenant])
        if request < 0:
            continue
        rank = ten.rank[tenant]
        queued = _queued_ps(cell, req, out, request)
        if rank < best_rank or (rank == best_rank and best_ps >= 0 and (queued, request) < (best_ps, best)):
            best = request
            best_before = np.int64(-2)
            best_rank = rank
            best_ps = queued
    return best, best_before


@_inlined
def _dequeue(e, req, out, request, before):
    if before >= 0:
        out[before].next = out[request].next
    elif before == -1:
        e.resumed_head = out[request].next
    else:
        e.fresh_head[req[request].tenant] = out[request].next
    e.waiting -= 1


@_inlined
def _cached_blocks(g, cell, req, out, pool, pre, request, total):
    """Blocks of a waiting request that are still cached: (shared, of those unreferenced, private)."""
    shared = np.int64(0)
    idle = np.int64(0)
    private = np.int64(0)
    if not cell.prefix_cache:
        return shared, idle, private
    limit = (total - 1) // BLOCK_TOKENS
    count = np.int64(0)
    if pre.per_id > 0:
        first = pre.offsets[request]
        count = _prefix_blocks(req, pre, request)
        stop = min(limit, count)
        while shared < stop:
            key = pre.ids[first + shared // pre.per_id] * pre.per_id + shared % pre.per_id
            position = _table_find(pool, g, key)
            if pool.table_key[g, position] != key:
                break
            if pool.node_references[g, pool.table_node[g, position]] == 0:
                idle += 1
            shared += 1
    segment = out[request].segment
    if segment >= 0 and shared == min(count, limit):
        private = min(pool.queue_length[g, segment], limit - shared)
    return shared, idle, private


@_inlined
def _admit(e, counters, g, req, out, ten, pool, pre, request, before, chunk, hits):
    """Give a waiting request a slot, its cached blocks and those of its first chunk; returns the slot."""
    shared, idle, private = hits
    _dequeue(e, req, out, request, before)
    e.slots_free -= 1
    slot = e.free_slot[e.slots_free]
    e.slot_request[slot] = request
    e.slot_order[slot] = e.admitted
    e.admitted += 1
    e.slot_generated[slot] = out[request].generated
    e.slot_class[slot] = ten.speculation_class[req[request].tenant]
    e.slot_shared[slot] = shared
    e.slot_prev[slot] = e.run_tail
    e.slot_next[slot] = -1
    if e.run_tail >= 0:
        e.slot_next[e.run_tail] = slot
    else:
        e.run_head = slot
    e.run_tail = slot
    e.running += 1
    out[request].status = RUNNING
    _limit(e, out, ten, req[request].tenant, request)
    first = pre.offsets[request] if shared > 0 else 0
    for block in range(shared):
        key = pre.ids[first + block // pre.per_id] * pre.per_id + block % pre.per_id
        node = pool.table_node[g, _table_find(pool, g, key)]
        if pool.node_references[g, node] == 0:
            pool.queue_length[g, pool.node_segment[g, node]] = 0
        pool.node_references[g, node] += 1
    e.held += idle
    segment = out[request].segment
    if segment >= 0:
        pool.queue_length[g, segment] -= private
        pool.queue_owner[g, segment] = -1
        out[request].segment = -1
        e.held += private
    cached = (shared + private) * BLOCK_TOKENS
    counters.cached_tokens += cached
    _queue_take(e, counters, g, out, pool, _blocks(cached + chunk) - shared - private)
    return slot


# --------------------------------------------------------------------------------------------- one decision


@_inlined
def _finish(e, counters, cell, req, out, ten, tr, slot):
    """The last token of a sequence (or, in a prefill pool, its first) is in the batch that is in flight."""
    request = e.slot_request[slot]
    c = e.slot_class[slot]
    generated = e.slot_generated[slot] + 1 + e.clock[c] - e.slot_start[slot]
    context = _deactivate(e, slot)
    e.slot_base[slot] = context
    e.limbo_blocks += _blocks(context) - e.slot_shared[slot]
    out[request].worst_gap_ps = max(out[request].worst_gap_ps, _worst_gap(e, e.slot_begin[slot]))
    _unlink(e, slot)
    before = np.int64(-1)
    after = e.limbo_head
    while after >= 0 and e.slot_order[after] < e.slot_order[slot]:
        before = np.int64(after)
        after = np.int64(e.slot_next[after])
    e.slot_next[slot] = after
    if before >= 0:
        e.slot_next[before] = slot
    else:
        e.limbo_head = slot
    e.limbo_count += 1
    e.limbo_ps = e.busy_ps
    if generated < req[request].output_tokens:  # only a prefill pool stops here
        out[request].generated = generated
        out[request].status = TRANSFER
        out[request].finish_ps = e.busy_ps  # its last token so far
        counters.transfers += 1
        ready_ps = e.busy_ps + _transfer_ps(cell, req[request].prompt_tokens)
        _timer_push(tr.ready_ps, tr.request, cell.transfers, ready_ps, request)
        cell.transfers += 1
        return
    tenant = req[request].tenant
    counters.output_tokens -= generated - req[request].output_tokens  # speculation ran past the end
    out[request].generated = req[request].output_tokens
    out[request].status = COMPLETED
    out[request].finish_ps = e.busy_ps
    counters.completed += 1
    counters.tenant_completed[tenant] += 1
    counters.tenant_output_tokens[tenant] += req[request].output_tokens
    cell.tenant_in_flight[tenant] -= 1
    first = out[request].first_ps
    gaps = max(req[request].output_tokens - 1, 1)
    ttft = first - req[request].arrival_ps
    tpot = (e.busy_ps - first + gaps - 1) // gaps
    if ttft <= ten.ttft_slo_ps[tenant] and tpot <= ten.tpot_slo_ps[tenant]:
        counters.tier_in_slo[e.tier, tenant] += 1
        used = max(ttft / ten.ttft_slo_ps[tenant], tpot / ten.tpot_slo_ps[tenant])
        counters.tenant_headroom[tenant] += 1.0 - used


@_inlined
def _decode_attention(e, cost):
    """Attention of a batch of decodes alone, its growth per batch (ps), and batches to the next knot."""
    n = e.active
    knots = cost.decode_kv
    kv = e.kv_sum + n
    k = 0
    while k < len(knots) - 2 and kv >= knots[k + 1] * n:
        k += 1
    slope = cost.decode_slope[e.tier, n, k]
    attention = cost.decode_ps[e.tier, n, k] + (slope * (kv - knots[k] * n)) // n
    until_knot = (knots[k + 1] * n - kv + n - 1) // n if k < len(knots) - 2 else NEVER_PS
    return attention, slope, until_knot


@_inlined
def _room(e, others):
    """Blocks that sequences may still take beside `others` of them: a lone one may use the whole cache."""
    return (e.blocks if e.running - e.limbo_count <= others else e.block_cap) - e.held


@_inlined
def _decode_stretch(e, cost, cell, limit_ps):
    """How many further decode batches share the composition of the next one, and what they take.

    Returns (batches, first duration, growth of the duration per batch), in ps. No batch of the stretch may be
    decided at or after `limit_ps`, run past a finish, cross a knot of the latency table, or lack blocks.
    """
    n = e.active
    tier = e.tier
    most = NEVER_PS
    for c in range(cell.classes):
        if e.heap_size[c] > 0:
            most = min(most, e.heap_key[c, 0] - e.clock[c])
    attention, slope, until_knot = _decode_attention(e, cost)
    first = cost.dense_ps[tier, n] + cost.head_ps[tier, n] + attention
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
    room = _room(e, 1)
    if room < n * ((most >> 4) + 1):
        cycles = room // n
        batches = min(cycles * BLOCK_TOKENS, most)
        room -= cycles * n
        while batches < most:
            for c in range(cell.classes):
                room -= e.crossing[c, (e.clock[c] + batches) & (BLOCK_TOKENS - 1)]
            if room < 0:
                break
            batches += 1
        most = max(batches, 1)
    return most, first, slope


@_inlined
def _count_batch_time(e, counters, duration, taken):
    """Integrate what runs in batches: not what ended before them, and half of the blocks that they take."""
    counters.busy_ps += float(duration)
    counters.sequence_ps += float(e.running - e.limbo_count) * float(duration)
    counters.block_ps += (e.held - e.limbo_blocks - 0.5 * taken) / e.blocks * float(duration)


@_inlined
def _run_stretch(e, counters, g, cell, out, pool, batches, first, slope):
    """Advance all decoding sequences by `batches` tokens."""
    n = e.active
    need = (batches >> 4) * n
    rest = batches & (BLOCK_TOKENS - 1)
    for c in range(cell.classes):
        if e.class_active[c] > 0:
            for i in range(rest):
                need += e.crossing[c, (e.clock[c] + i) & (BLOCK_TOKENS - 1)]
        e.clock[c] += batches
    if need > 0:
        _queue_take(e, counters, g, out, pool, need)
    e.kv_sum += n * batches
    duration = batches * first + slope * (batches * (batches - 1) // 2)
    start = max(e.next_ps, e.busy_ps)
    last = first + slope * (batches - 1)
    _note_gap(e, batches, last)
    e.busy_ps = start + duration
    e.next_ps = start if batches == 1 else e.busy_ps - last
    if e.synchronous:
        e.next_ps = e.busy_ps
    low = _bin(first)
    high = _bin(last)
    if low == high:
        counters.gap_histogram[low] += n * batches
    else:
        for i in range(batches):
            counters.gap_histogram[_bin(first + slope * i)] += n
    counters.iterations += batches
    counters.output_tokens += n * batches
    _count_batch_time(e, counters, duration, need)


@_inlined
def _step_tokens(e, ten, c, depth):
    """Tokens that each sequence of a class gains in the next batch."""
    if depth == 0:
        return np.int64(1)
    return (e.accept[c] + ten.accept[c, depth]) >> 20


@_inlined
def _decode_need(e, cell, ten, depth):
    """Blocks that the decodes of the next batch take."""
    need = np.int64(0)
    for c in range(cell.classes):
        if e.class_active[c] > 0:
            for i in range(_step_tokens(e, ten, c, depth)):
                need += e.crossing[c, (e.clock[c] + i) & (BLOCK_TOKENS - 1)]
    return need


@_inlined
def _batch_ps(e, cell, cost, prefill_tokens, prefill_ps, ending, depth):
    """Duration of one batch: decodes of the active sequences beside `prefill_tokens` of prefill (ps)."""
    n = e.active
    tier = e.tier
    verified = n * (1 + depth)
    duration = cost.dense_ps[tier, verified + prefill_tokens] + cost.head_ps[tier, verified + ending]
    if prefill_tokens > 0:
        attention = cost.prefill_ps[tier, 0, 0] + prefill_ps
        if n > 0:
            mean = (e.kv_sum + n) / n
            spread = _longest_context(e, cell.classes) + 1 - mean
            kv = mean + min(1.0, cost.mixed_skew / n) * spread
            attention += _mixed_ps(cost, tier, float(prefill_tokens), n, kv)
        duration += np.int64(np.rint(attention))
    else:
        duration += _decode_attention(e, cost)[0]
    if depth > 0 and n > 0:
        draft = cell.draft_layers * cost.dense_ps[tier, n] + cell.draft_head * cost.head_ps[tier, n]
        duration += np.int64(np.rint(depth * draft))
    return duration


@_inlined
def _long_gap(e, counters, out, request):
    """A sequence that was preempted or transferred gets a token at the end of the batch just scheduled."""
    gap = e.busy_ps - out[request].finish_ps
    out[request].finish_ps = 0
    out[request].worst_gap_ps = max(out[request].worst_gap_ps, gap)
    counters.gap_histogram[_bin(gap)] += 1


@_inlined
def _end_prefill(e, counters, req, out, slot):
    """The batch that was just scheduled ends this prefill and yields a token."""
    request = e.slot_request[slot]
    generated = e.slot_generated[slot]
    if out[request].first_ps == 0:
        out[request].first_ps = e.busy_ps
        ttft = e.busy_ps - req[request].arrival_ps
        tenant = req[request].tenant
        counters.first_tokens += 1
        counters.ttft_ps += float(ttft)
        counters.tenant_first_tokens[tenant] += 1
        counters.tenant_ttft_ps[tenant] += float(ttft)
        counters.ttft_histogram[_bin(ttft)] += 1
    else:
        _long_gap(e, counters, out, request)
    remaining = req[request].output_tokens - 1 - generated
    if e.role == PREFILL:
        remaining = 0
    _activate(e, slot, req[request].prompt_tokens + generated, remaining)


@_inlined
def _rest(e, limit_ps):
    """Nothing can be scheduled: wait for the batch in flight, a restart, or an event."""
    if e.busy_ps > e.next_ps:
        e.next_ps = e.busy_ps
    elif e.condition == DRAINING and e.running == 0:
        e.condition = RELOADING
        e.next_ps = e.next_ps + e.reload_ps
    elif e.waiting > 0 and limit_ps < NEVER_PS:
        e.next_ps = max(limit_ps, e.next_ps + 1)
    else:
        e.next_ps = NEVER_PS


@_inlined
def _decide(e, counters, g, cell, req, out, ten, pool, pre, cost, tr, limit_ps):
    """Start the next batch, or the next stretch of like batches; rest when there is nothing to do."""
    if e.condition == RELOADING:
        _restart(e, g, out, cost, pool)
    if e.leave_ps <= e.next_ps:
        _leave(e, counters, g, cell, req, out, ten, pool, pre, tr, e.next_ps)
    limit_ps = min(limit_ps, e.leave_ps)
    if e.limbo_count > 0 and e.next_ps >= e.limbo_ps:
        _release(e, g, out, pool, pre)
    for c in range(cell.classes):
        while e.heap_size[c] > 0 and e.heap_key[c, 0] <= e.clock[c]:
            _finish(e, counters, cell, req, out, ten, tr, e.heap_slot[c, 0])
    if e.synchronous and e.limbo_count > 0:
        _release(e, g, out, pool, pre)
    if e.waiting > 0:
        limit_ps = min(limit_ps, _expire(e, counters, cell, req, out, ten, tr, e.next_ps))

    # running sequences first: one token each, 1 + depth under speculation
    depth = e.depth
    if depth > 0:
        depth = min(depth, e.token_budget // max(e.active, 1) - 1)
    preempted = False
    need = np.int64(0)
    while e.active > 0 or e.partial >= 0:
        need = _decode_need(e, cell, ten, depth)
        if need <= _room(e, 1):
            break
        _preempt_newest(e, counters, g, cell, req, out, ten, pool, pre)
        need = 0
        preempted = True
    budget = e.token_budget - e.active * (1 + depth)
    prefill_tokens = np.int64(0)
    prefill_ps = 0.0
    floor_ps = cost.prefill_ps[e.tier, 0, 0]
    ending = 0

    # then the one unfinished prefill
    if e.partial >= 0 and budget > 0:
        slot = e.partial
        request = e.slot_request[slot]
        total = req[request].prompt_tokens + e.slot_generated[slot]
        chunk = min(total - e.partial_done, budget)
        blocks = _blocks(e.partial_done + chunk) - _blocks(e.partial_done)
        while e.partial >= 0 and blocks + need > _room(e, 1):
            _preempt_newest(e, counters, g, cell, req, out, ten, pool, pre)
            need = _decode_need(e, cell, ten, depth)
            preempted = True
        if e.partial >= 0:
            _queue_take(e, counters, g, out, pool, need + blocks)
            need = 0
            if pre.per_id > 0 and cell.prefix_cache:
                full = (e.partial_done + chunk) // BLOCK_TOKENS
                _share_blocks(e, g, req, out, pool, pre, slot, request, full)
            prefill_ps += max(_prefill_ps(cost, e.tier, float(chunk), float(e.partial_done)) - floor_ps, 0.0)
            prefill_tokens += chunk
            budget -= chunk
            e.partial_done += chunk
            if e.partial_done == total:
                e.batch_slot[ending] = slot
                ending += 1
                e.partial = -1

    # then waiting requests, unless memory is so short that something was preempted
    joined = 0
    while e.waiting > 0 and not preempted and budget > 0 and e.running < e.batch_cap and e.partial < 0:
        request, before = _pick(e, cell, req, out, ten, e.condition == DRAINING)
        if request < 0:
            break
        total = req[request].prompt_tokens + out[request].generated
        transferred = out[request].status == TRANSFER
        hits = (np.int64(0), np.int64(0), np.int64(0))
        if not transferred:
            hits = _cached_blocks(g, cell, req, out, pool, pre, request, total)
        elif budget < 1 + depth:
            break
        blocks = _blocks(total)
        if transferred:  # with those of its first step
            step = _step_tokens(e, ten, ten.speculation_class[req[request].tenant], depth)
            blocks = max(blocks, _blocks(total - 1 + step))
        if blocks - hits[0] + hits[1] > _room(e, 0) - need:
            break
        if need > 0:
            _queue_take(e, counters, g, out, pool, need)
            need = 0
            if not transferred:
                hits = _cached_blocks(g, cell, req, out, pool, pre, request, total)
        if transferred:  # its KV cache has come from the prefill pool: it decodes at once
            slot = _admit(e, counters, g, req, out, ten, pool, pre, request, before, total, hits)
            generated = out[request].generated
            e.slot_generated[slot] = generated - 1
            _activate(e, slot, total - 1, req[request].output_tokens - generated)
            _queue_take(e, counters, g, out, pool, blocks - _blocks(total))
            budget -= 1 + depth
            e.batch_slot[MAX_RUNNING - 1 - joined] = slot
            joined += 1
            continue
        cached = (hits[0] + hits[2]) * BLOCK_TOKENS
        chunk = min(total - cached, budget)
        slot = _admit(e, counters, g, req, out, ten, pool, pre, request, before, chunk, hits)
        if pre.per_id > 0 and cell.prefix_cache:
            _share_blocks(e, g, req, out, pool, pre, slot, request, (cached + chunk) // BLOCK_TOKENS)
        prefill_ps += max(_prefill_ps(cost, e.tier, float(chunk), float(cached)) - floor_ps, 0.0)
        prefill_tokens += chunk
        budget -= chunk
        if cached + chunk == total:
            e.batch_slot[ending] = slot
            ending += 1
        else:
            e.partial = slot
            e.partial_done = cached + chunk

    if e.active == 0 and prefill_tokens == 0:
        _rest(e, limit_ps)
        return
    if prefill_tokens == 0 and depth == 0 and joined == 0:
        batches, first, slope = _decode_stretch(e, cost, cell, limit_ps)
        if preempted or (e.waiting > 0 and e.limbo_count > 0):
            batches = np.int64(1)
        _run_stretch(e, counters, g, cell, out, pool, batches, first, slope)
        return

    if need > 0:
        _queue_take(e, counters, g, out, pool, need)
    duration = _batch_ps(e, cell, cost, prefill_tokens, prefill_ps, ending, depth)
    n = e.active
    gained = np.int64(0)
    for c in range(cell.classes):
        tokens = _step_tokens(e, ten, c, depth)
        if depth > 0:
            e.accept[c] = (e.accept[c] + ten.accept[c, depth]) & (ACCEPT_ONE - 1)
        e.clock[c] += tokens
        gained += e.class_active[c] * tokens
    e.kv_sum += gained
    start = max(e.next_ps, e.busy_ps)
    e.busy_ps = start + duration
    e.next_ps = e.busy_ps if e.synchronous else start
    _note_gap(e, 1, duration)
    if n > joined:
        counters.gap_histogram[_bin(duration)] += n - joined
    for i in range(joined):
        request = e.slot_request[e.batch_slot[MAX_RUNNING - 1 - i]]
        _long_gap(e, counters, out, request)
    for i in range(ending):
        _end_prefill(e, counters, req, out, e.batch_slot[i])
    counters.iterations += 1
    counters.prefill_tokens += prefill_tokens
    counters.output_tokens += gained + ending
    counters.drafted_tokens += n * depth
    counters.accepted_tokens += gained - n
    _count_batch_time(e, counters, duration, 0)


@_inlined
def _feeds(e):
    """Whether an engine prefills for others from its next decision on."""
    return (e.next_role if e.condition == RELOADING else e.role) == PREFILL


@_compiled
def _advance(e, counters, g, cell, req, out, ten, pool, pre, cost, tr, until_ps, feeding):
    """Take every decision of an engine before `until_ps`; with `feeding` only while it feeds others."""
    while e.next_ps < until_ps and (not feeding or _feeds(e)):
        _decide(e, counters, g, cell, req, out, ten, pool, pre, cost, tr, until_ps)


# --------------------------------------------------------------------------------------------------- the cell


@_compiled
def _restart(e, g, out, cost, pool):
    """A drained engine is up again with its new role and precision, its cache empty."""
    e.condition = UP
    e.role = e.next_role
    e.tier = e.next_tier
    _reset_blocks(e, g, cost, pool)
    request = e.resumed_head
    while request >= 0:
        out[request].segment = -1
        request = out[request].next


@_compiled
def _reset_blocks(e, g, cost, pool):
    e.blocks = cost.blocks[e.tier]
    e.block_cap = np.int64(e.kv_fraction * e.blocks)
    e.held = 0
    e.queue_head = 0
    e.queue_tail = 1
    pool.queue_owner[g, 0] = -1
    pool.queue_length[g, 0] = e.blocks
    nodes = pool.node_key.shape[1]
    e.nodes_free = nodes
    for i in range(nodes):
        pool.node_free[g, i] = nodes - 1 - i
        pool.node_references[g, i] = 0
    for i in range(pool.table_key.shape[1]):
        pool.table_key[g, i] = -1


@_compiled
def _route(engines, counters, cell, req, out, ten, tr, now_ps, transferred):
    """Least-loaded engine that takes this kind of request; one that is up before one that is not."""
    for i in range(len(engines)):
        if engines[i].waiting > 0:
            _expire(engines[i], counters, cell, req, out, ten, tr, now_ps)
    other = DECODE if not transferred else PREFILL
    best = -1
    best_load = NEVER_PS
    for i in range(len(engines)):
        e = engines[i]
        load = e.unfinished
        if e.limbo_count > 0 and e.limbo_ps <= now_ps:
            load -= e.limbo_count
        role = e.role if e.condition == UP else e.next_role
        if role == other:
            load += 1 << 50
        if e.condition != UP:
            load += 1 << 40
        if load < best_load:
            best = i
            best_load = load
    return best


@_compiled
def _enqueue_in_turn(e, cell, req, out, ten, request, now_ps):
    """Queue a request that waited elsewhere before: it stands where its waiting time puts it.

    Requests come in order of waiting, so the search goes on from where the last one was put.
    """
    tenant = req[request].tenant
    queued = _queued_ps(cell, req, out, request)
    if out[request].status != TRANSFER:
        e.soonest_ps = min(e.soonest_ps, out[request].sent_ps + ten.patience_ps[tenant])
    else:
        _limit(e, out, ten, tenant, request)
    before = np.int64(e.merged[tenant])
    if before >= 0 and out[before].status != WAITING and out[before].status != TRANSFER:  # given up since
        before = np.int64(-1)
    after = np.int64(out[before].next) if before >= 0 else np.int64(e.fresh_head[tenant])
    while after >= 0 and (_queued_ps(cell, req, out, after), after) < (queued, np.int64(request)):
        before = after
        after = np.int64(out[after].next)
    out[request].next = after
    if before >= 0:
        out[before].next = request
    else:
        e.fresh_head[tenant] = request
    if after < 0:
        e.fresh_tail[tenant] = request
    e.merged[tenant] = request
    _count_arrival(e, now_ps)


@_compiled
def _reroute(engines, i, counters, cell, req, out, ten, tr, now_ps):
    """Send the fresh requests that wait at a draining engine where they would go now."""
    e = engines[i]
    chain = np.int64(-1)
    last = np.int64(-1)
    while True:
        request, before = _pick_fresh(e, cell, req, out)
        if request < 0:
            break
        _dequeue(e, req, out, request, before)
        e.unfinished -= 1
        if last >= 0:
            out[last].next = request
        else:
            chain = request
        out[request].next = -1
        last = request
    for j in range(len(engines)):
        for tenant in range(cell.tenants):
            engines[j].merged[tenant] = -1
    while chain >= 0:
        after = np.int64(out[chain].next)
        target = _route(engines, counters, cell, req, out, ten, tr, now_ps, out[chain].status == TRANSFER)
        _enqueue_in_turn(engines[target], cell, req, out, ten, chain, now_ps)
        chain = after


@_compiled
def _begin_switch(engines, counters, cell, req, out, ten, tr, now_ps):
    """Start to drain the next engine whose role or precision is not the wanted one, one engine at a time."""
    for i in range(len(engines)):
        if engines[i].condition != UP:
            return
    for i in range(len(engines)):
        e = engines[i]
        role = COLOCATED
        if cell.split:
            role = PREFILL if i < cell.prefill_engines else DECODE
        if e.role == role and e.tier == cell.tier:
            continue
        e.condition = DRAINING
        e.next_role = role
        e.next_tier = cell.tier
        e.reload_ps = cell.restart_ps + (cell.load_ps[cell.tier] if e.tier != cell.tier else 0)
        if e.next_ps == NEVER_PS:
            e.next_ps = max(now_ps, e.busy_ps)
        if len(engines) > 1:
            _reroute(engines, i, counters, cell, req, out, ten, tr, now_ps)
        return


@_inlined
def _leave_all(engines, counters, first_g, cell, req, out, ten, pool, pre, tr, now_ps):
    """End the tries past their deadline at every engine."""
    for i in range(len(engines)):
        if engines[i].leave_ps <= now_ps:
            _leave(engines[i], counters, first_g + i, cell, req, out, ten, pool, pre, tr, now_ps)


@_compiled
def _advance_pool(engines, counters, first_g, cell, req, out, ten, pool, pre, cost, tr, until_ps):
    """Advance every engine to `until_ps`; hand over the transfers that arrive before it, in their order."""
    while True:
        for i in range(len(engines)):
            e = engines[i]
            _advance(e, counters, first_g + i, cell, req, out, ten, pool, pre, cost, tr, until_ps, True)
        due = cell.transfers > 0 and tr.ready_ps[0] < until_ps
        stop_ps = tr.ready_ps[0] if due else until_ps
        for i in range(len(engines)):
            e = engines[i]
            if not _feeds(e):
                _advance(e, counters, first_g + i, cell, req, out, ten, pool, pre, cost, tr, stop_ps, False)
        if due:
            ready_ps = tr.ready_ps[0]
            request = _timer_pop(tr.ready_ps, tr.request, cell.transfers)
            cell.transfers -= 1
            _leave_all(engines, counters, first_g, cell, req, out, ten, pool, pre, tr, ready_ps)
            target = _route(engines, counters, cell, req, out, ten, tr, ready_ps, True)
            _enqueue(engines[target], req, out, ten, request, ready_ps)
        elif cell.transfers == 0 or tr.ready_ps[0] >= until_ps:
            return


@_inlined
def _next_try(cell, req, tr):
    """The request that is sent next, -1 for none, and when: one that arrives, or one that is sent again.

    One that is sent again arrived earlier, so at equal times the lower request goes first.
    """
    request = np.int64(-1)
    sent_ps = NEVER_PS
    if cell.next_request < len(req):
        request = cell.next_request
        sent_ps = req[request].arrival_ps
    if cell.retrying > 0 and tr.retry_ps[0] <= sent_ps:
        request = np.int64(tr.retry_request[0])
        sent_ps = tr.retry_ps[0]
    return request, sent_ps


@_inlined
def _quiet_ps(engines, cell, tr):
    """No try that ends from now on is followed by another before this time."""
    soonest = tr.ready_ps[0] if cell.transfers > 0 else NEVER_PS
    for i in range(len(engines)):
        e = engines[i]
        soonest = min(soonest, e.next_ps)
        soonest = min(soonest, e.leave_ps)
        if e.waiting > 0:
            soonest = min(soonest, e.soonest_ps)
    return min(soonest + cell.shortest_wait_ps, NEVER_PS)


@_compiled
def _serve_window(engines, counters, first_g, cell, req, out, ten, pool, pre, cost, tr, start_ps, until_ps):
    """Serve one cell from `start_ps` to `until_ps`: switch, route tries, take all earlier decisions."""
    _leave_all(engines, counters, first_g, cell, req, out, ten, pool, pre, tr, start_ps)
    _begin_switch(engines, counters, cell, req, out, ten, tr, start_ps)
    for i in range(len(engines)):
        if engines[i].next_ps == NEVER_PS and engines[i].waiting > 0:
            engines[i].next_ps = max(start_ps, engines[i].busy_ps)
    while True:
        request, now_ps = _next_try(cell, req, tr)
        if cell.shortest_wait_ps < NEVER_PS:
            quiet_ps = _quiet_ps(engines, cell, tr)
            if quiet_ps <= now_ps and quiet_ps < until_ps:
                _advance_pool(engines, counters, first_g, cell, req, out, ten, pool, pre, cost, tr, quiet_ps)
                _leave_all(engines, counters, first_g, cell, req, out, ten, pool, pre, tr, quiet_ps)
                for i in range(len(engines)):
                    if engines[i].waiting > 0:
                        _expire(engines[i], counters, cell, req, out, ten, tr, quiet_ps)
                continue
        if request < 0 or now_ps >= until_ps:
            break
        tenant = req[request].tenant
        if out[request].status == RETRYING:
            _timer_pop(tr.retry_ps, tr.retry_request, cell.retrying)
            cell.retrying -= 1
            counters.retries += 1
        else:
            cell.next_request = request + 1
            counters.arrived += 1
            counters.arrived_prompt_tokens += req[request].prompt_tokens
            counters.tenant_arrived[tenant] += 1
            tokens = req[request].prompt_tokens + req[request].output_tokens + MAX_DEPTH
            if _blocks(tokens) > cell.most_blocks:
                out[request].status = CANCELLED
                out[request].finish_ps = now_ps
                counters.cancelled += 1
                counters.tenant_failed[tenant] += 1
                continue
            cell.tenant_in_flight[tenant] += 1
        if cell.token_ps > 0 and not _lets_in(cell, ten, tenant, engines[0].priority, now_ps):
            counters.refused += 1
            _end_try(counters, cell, req, out, ten, tr, request, now_ps)
            continue
        if len(engines) == 1:
            if engines[0].next_ps < now_ps:
                _advance(
                    engines[0], counters, first_g, cell, req, out, ten, pool, pre, cost, tr, now_ps, False
                )
            _enqueue(engines[0], req, out, ten, request, now_ps)
        else:
            _advance_pool(engines, counters, first_g, cell, req, out, ten, pool, pre, cost, tr, now_ps)
            _leave_all(engines, counters, first_g, cell, req, out, ten, pool, pre, tr, now_ps)
            target = _route(engines, counters, cell, req, out, ten, tr, now_ps, False)
            _enqueue(engines[target], req, out, ten, request, now_ps)
    _advance_pool(engines, counters, first_g, cell, req, out, ten, pool, pre, cost, tr, until_ps)
    end_ps = min(until_ps - 1, NEVER_PS - 1)
    _leave_all(engines, counters, first_g, cell, req, out, ten, pool, pre, tr, end_ps)
    for i in range(len(engines)):
        if engines[i].waiting > 0:
            _expire(engines[i], counters, cell, req, out, ten, tr, end_ps)


# ------------------------------------------------------------------------------------ actions and the record


@_compiled
def _apply(engines, cell, action):
    """Set what the next window runs under; what this cell cannot do stays as it is."""
    cap = min(action.batch_cap, engines[0].token_budget)
    for i in range(len(engines)):
        e = engines[i]
        e.batch_cap = cap
        e.kv_fraction = action.kv_budget_fraction
        e.block_cap = np.int64(action.kv_budget_fraction * e.blocks)
        e.depth = action.speculation_depth
        e.priority = action.priority_routing
    if cell.has_tier[action.quantization_tier]:
        cell.tier = action.quantization_tier
    if cell.can_split or action.prefill_decode_split == 0:
        cell.split = action.prefill_decode_split
    cell.token_ps = 0  # everybody is let in
    if action.admission_rate < np.inf:
        cell.token_ps = np.int64(np.rint(min(PS_PER_S / action.admission_rate, float(MAX_TOKEN_PS))))


@_compiled
def _clear(counters, tenants):
    counters.arrived = 0
    counters.arrived_prompt_tokens = 0
    counters.completed = 0
    counters.failed = 0
    counters.cancelled = 0
    counters.preemptions = 0
    counters.iterations = 0
    counters.prefill_tokens = 0
    counters.cached_tokens = 0
    counters.output_tokens = 0
    counters.drafted_tokens = 0
    counters.accepted_tokens = 0
    counters.evictions = 0
    counters.transfers = 0
    counters.first_tokens = 0
    counters.refused = 0
    counters.retries = 0
    counters.timeouts = 0
    counters.busy_ps = 0.0
    counters.sequence_ps = 0.0
    counters.block_ps = 0.0
    counters.ttft_ps = 0.0
    for i in range(HISTOGRAM_BINS):
        counters.ttft_histogram[i] = 0
        counters.gap_histogram[i] = 0
    for tenant in range(tenants):
        counters.tenant_arrived[tenant] = 0
        counters.tenant_completed[tenant] = 0
        counters.tenant_failed[tenant] = 0
        counters.tenant_output_tokens[tenant] = 0
        counters.tenant_first_tokens[tenant] = 0
        counters.tenant_headroom[tenant] = 0.0
        counters.tenant_ttft_ps[tenant] = 0.0
        for tier in range(3):
            counters.tier_in_slo[tier, tenant] = 0


@_inlined
def _quantile_s(histogram, total, q):
    """Quantile of a histogram of durations, linear within a bin (s); nan if it is empty."""
    if total == 0:
        return np.nan
    wanted = q * total
    below = 0
    for i in range(HISTOGRAM_BINS):
        count = histogram[i]
        if count > 0 and below + count >= wanted:
            width = math.ldexp(0.125, (i >> 3) - 14)
            low = math.ldexp(1.0 + (i & 7) / 8.0, (i >> 3) - 14)
            return low + width * (wanted - below) / count
        below += count
    return np.nan


@_compiled
def _record(engines, counters, cell, req, out, start_ps, until_ps, window):
    """Fill the WINDOW record of what was served from `start_ps` to `until_ps`."""
    window.start_s = start_ps / PS_PER_S
    window.end_s = until_ps / PS_PER_S if until_ps < NEVER_PS else np.inf
    waiting = np.int64(cell.transfers)
    running = np.int64(0)
    limbo = np.int64(0)
    held = np.int64(0)
    blocks = np.int64(0)
    oldest_ps = until_ps
    memory = 0.0
    up = np.int64(0)
    split = np.int64(0)
    for tier in range(3):
        window.engines_tier[tier] = 0
    for i in range(len(engines)):
        e = engines[i]
        waiting += e.waiting
        running += e.running
        # what has ended by the window's end no longer runs, though the engine frees it at its next decision
        if e.limbo_ps <= until_ps:
            running -= e.limbo_count
        limbo += e.running - e.limbo_count
        held += e.held
        blocks += e.blocks
        loading = e.condition == RELOADING
        tier = e.next_tier if loading else e.tier
        memory += cell.weight_bytes[tier] + cell.block_bytes * e.held
        window.engines_tier[tier] += 1
        up += e.condition == UP
        split += (e.next_role if loading else e.role) != COLOCATED
        for tenant in range(cell.tenants):
            request = e.fresh_head[tenant]
            while request >= 0 and out[request].status != WAITING:  # in transfer
                request = out[request].next
            if request >= 0:
                oldest_ps = min(oldest_ps, out[request].sent_ps)
    window.in_flight = waiting + limbo + cell.retrying
    window.retrying = cell.retrying
    window.waiting = waiting
    window.running = running
    window.oldest_wait_s = (until_ps - oldest_ps) / PS_PER_S
    window.kv_occupancy = held / blocks
    window.gpu_memory_gb = memory / 1e9
    window.engines_up = up
    window.engines_split = split
    window.arrived = counters.arrived
    window.arrived_prompt_tokens = counters.arrived_prompt_tokens
    window.completed = counters.completed
    window.failed = counters.failed
    window.cancelled = counters.cancelled
    window.preemptions = counters.preemptions
    window.prefill_tokens = counters.prefill_tokens
    window.cached_tokens = counters.cached_tokens
    window.output_tokens = counters.output_tokens
    window.iterations = counters.iterations
    window.evictions = counters.evictions
    window.drafted_tokens = counters.drafted_tokens
    window.accepted_tokens = counters.accepted_tokens
    window.transfers = counters.transfers
    window.first_tokens = counters.first_tokens
    window.refused = counters.refused
    window.retries = counters.retries
    window.timeouts = counters.timeouts
    busy_ps = max(counters.busy_ps, 1.0)
    window.busy_s = counters.busy_ps / PS_PER_S
    window.mean_running = counters.sequence_ps / busy_ps
    window.mean_kv_occupancy = counters.block_ps / busy_ps
    first_tokens = counters.first_tokens
    window.mean_ttft_s = counters.ttft_ps / first_tokens / PS_PER_S if first_tokens > 0 else np.nan
    window.p50_ttft_s = _quantile_s(counters.ttft_histogram, first_tokens, 0.5)
    window.p99_ttft_s = _quantile_s(counters.ttft_histogram, first_tokens, 0.99)
    steps = np.int64(0)
    for i in range(HISTOGRAM_BINS):
        steps += counters.gap_histogram[i]
    window.p50_gap_s = _quantile_s(counters.gap_histogram, steps, 0.5)
    window.p99_gap_s = _quantile_s(counters.gap_histogram, steps, 0.99)
    for tenant in range(cell.tenants):
        window.tenant_arrived[tenant] = counters.tenant_arrived[tenant]
        window.tenant_completed[tenant] = counters.tenant_completed[tenant]
        window.tenant_failed[tenant] = counters.tenant_failed[tenant]
        window.tenant_in_flight[tenant] = cell.tenant_in_flight[tenant]
        window.tenant_output_tokens[tenant] = counters.tenant_output_tokens[tenant]
        window.tenant_first_tokens[tenant] = counters.tenant_first_tokens[tenant]
        window.tenant_headroom[tenant] = counters.tenant_headroom[tenant]
        window.tenant_ttft_s[tenant] = counters.tenant_ttft_ps[tenant] / PS_PER_S
        window.tenant_in_slo[tenant] = 0
        for tier in range(3):
            window.tier_in_slo[tier, tenant] = counters.tier_in_slo[tier, tenant]
            window.tenant_in_slo[tenant] += counters.tier_in_slo[tier, tenant]


# ----------------------------------------------------------------------------------------------- entry points


@_compiled
def _serve_episode(
    i,
    actions,
    windows,
    engines,
    counters,
    cells,
    first,
    req,
    out,
    ten,
    pool,
    pre,
    cost,
    tr,
    start_ps,
    until_ps,
):
    if until_ps[i] < 0:
        return
    low = first[i]
    high = low + cells[i].requests
    offsets = pre.offsets[low + i : high + i + 1] if pre.per_id > 0 else pre.offsets
    own = Prefixes(offsets, pre.ids, pre.per_id)
    timers = Timers(
        tr.ready_ps[low:high], tr.request[low:high], tr.retry_ps[low:high], tr.retry_request[low:high]
    )
    _apply(engines[i], cells[i], actions[i])
    _clear(counters[i], cells[i].tenants)
    _serve_window(
        engines[i],
        counters[i],
        i * engines.shape[1],
        cells[i],
        req[low:high],
        out[low:high],
        ten,
        pool,
        own,
        cost,
        timers,
        start_ps[i],
        until_ps[i],
    )
    _record(
        engines[i], counters[i], cells[i], req[low:high], out[low:high], start_ps[i], until_ps[i], windows[i]
    )


@_compiled
def serve(
    actions, windows, engines, counters, cells, first, req, out, ten, pool, pre, cost, tr, start_ps, until_ps
):
    """Apply an action to every episode, serve one window of each in turn, and record it.

    Args:
        actions: ACTION[episode].
        windows: WINDOW[episode], filled.
        engines: ENGINE[episode, engine], changed in place, as are `cells`, `out`, `pool`, `tr`.
        counters: COUNTERS[episode], of this window.
        cells: CELL[episode].
        first: int64[episode], the requests of episode i are the cells[i].requests from req[first[i]] on, and
            the same part of out and tr.
        req: REQUEST[n], in order of arrival within an episode.
        out: OUTCOME[n].
        ten: Tenants.
        pool: Pool, first axis episode * engines + engine.
        pre: Prefixes; offsets of episode i start at first[i] + i.
        cost: Cost.
        tr: Timers.
        start_ps: int64[episode], start of the window.
        until_ps: int64[episode], its end; every decision before it is taken. Negative: the episode
            is left alone.
    """
    for i in range(len(engines)):
        _serve_episode(
            i,
            actions,
            windows,
            engines,
            counters,
            cells,
            first,
            req,
            out,
            ten,
            pool,
            pre,
            cost,
            tr,
            start_ps,
            until_ps,
        )


@njit(cache=True, error_model="numpy", _nrt=False, parallel=True)
def serve_parallel(
    actions, windows, engines, counters, cells, first, req, out, ten, pool, pre, cost, tr, start_ps, until_ps
):
    """`serve` with the episodes spread over threads; the results are the same bit for bit."""
    for i in prange(len(engines)):
        _serve_episode(
            i,
            actions,
            windows,
            engines,
            counters,
            cells,
            first,
            req,
            out,
            ten,
            pool,
            pre,
            cost,
            tr,
            start_ps,
            until_ps,
        )


@_compiled
def reset_blocks(engines, first_g, pool, cost):
    """Empty the KV cache of every engine of an episode, ENGINE[engine]: all blocks free, nothing cached."""
    for j in range(len(engines)):
        _reset_blocks(engines[j], first_g + j, cost, pool)
