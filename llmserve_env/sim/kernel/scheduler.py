"""The scheduler of an engine: one decision is the next batch, or the next stretch of batches that are alike.

It is vLLM V1's. With asynchronous scheduling batch k+1 is decided while batch k runs, as soon as batch k-1
has ended; without it, when batch k has ended. A batch takes the running sequences first (one token each, or
1 + depth under speculation), then the one unfinished prefill, then waiting requests, under one token
budget.
"""

from __future__ import annotations

import numpy as np

from llmserve_env.compiled import hot, part
from llmserve_env.sim.kernel.batches import (
    count_batch_time,
    decode_need,
    decode_stretch,
    end_prefill,
    finish,
    histogram_bin,
    long_gap,
    run_stretch,
    step_tokens,
)
from llmserve_env.sim.kernel.blocks import blocks_for, cached_blocks, free_room, queue_take, share_blocks
from llmserve_env.sim.kernel.clients import expire, leave
from llmserve_env.sim.kernel.lifecycle import come_up, drained, feeds, reload, settled
from llmserve_env.sim.kernel.queue import admit, pick
from llmserve_env.sim.kernel.sequences import activate, note_gap, preempt_newest, release
from llmserve_env.sim.kernel.timing import batch_ps, prefill_attention
from llmserve_env.sim.state import ACCEPT_ONE, BLOCK_TOKENS, MAX_RUNNING, NEVER_PS, TRANSFER


@part
def rest(e, limit_ps):
    """Nothing can be scheduled: wait for the batch in flight, a restart, or an event."""
    if e.busy_ps > e.next_ps:
        e.next_ps = e.busy_ps
    elif drained(e):
        reload(e)
    elif e.waiting > 0 and limit_ps < NEVER_PS:
        e.next_ps = max(limit_ps, e.next_ps + 1)
    else:
        e.next_ps = NEVER_PS


@hot
def settle(s, e, limit_ps):
    """Do what is due before a decision; returns the time before which nothing else will be.

    An engine that has reloaded comes up, clients who gave up leave, sequences that have ended free what
    they held.
    """
    q = s.slots[e.row]
    come_up(s, e)
    if e.leave_ps <= e.next_ps:
        leave(s, e, e.next_ps)
    limit_ps = min(limit_ps, e.leave_ps)
    if e.limbo_count > 0 and e.next_ps >= e.limbo_ps:
        release(s, e)
    for c in range(s.cell.classes):
        while e.heap_size[c] > 0 and q.heap_key[c, 0] <= e.clock[c]:
            finish(s, e, np.int64(q.heap_slot[c, 0]))
    if e.synchronous and e.limbo_count > 0:
        release(s, e)
    if e.waiting > 0:
        limit_ps = min(limit_ps, expire(s, e, e.next_ps))
    return limit_ps


@hot
def schedule_running(s, e, depth):
    """Make room for all decoding sequences: the blocks that they take, and whether one had to go."""
    preempted = False
    need = np.int64(0)
    while e.active > 0 or e.partial >= 0:
        need = decode_need(s, e, depth)
        if need <= free_room(e, np.int64(1)):
            break
        preempt_newest(s, e)
        need = np.int64(0)
        preempted = True
    return need, preempted


@part
def chunk_ps(s, e, chunk, cached):
    """Attention of a chunk of prefill, without what every batch with one pays (ps)."""
    floor_ps = s.cost.prefill_ps[e.tier, 0, 0]
    return max(prefill_attention(s, e.tier, float(chunk), float(cached)) - floor_ps, 0.0)


@hot
def schedule_partial(s, e, depth, need, preempted, budget):
    """Go on with the unfinished prefill.

    Returns the blocks that decodes still take, whether a sequence had to go, the tokens and the attention
    of the chunk (ps), and how many prefills end in the batch.
    """
    q = s.slots[e.row]
    slot = e.partial
    request = np.int64(q.slot_request[slot])
    total = s.requests[request].prompt_tokens + q.slot_generated[slot]
    chunk = min(total - e.partial_done, budget)
    blocks = blocks_for(e.partial_done + chunk) - blocks_for(e.partial_done)
    while e.partial >= 0 and blocks + need > free_room(e, np.int64(1)):
        preempt_newest(s, e)
        need = decode_need(s, e, depth)
        preempted = True
    if e.partial < 0:
        return need, preempted, np.int64(0), 0.0, np.int64(0)
    queue_take(s, e, need + blocks)
    if s.cell.blocks_per_id > 0 and s.cell.prefix_cache:
        share_blocks(s, e, slot, request, (e.partial_done + chunk) // BLOCK_TOKENS)
    attention_ps = chunk_ps(s, e, chunk, e.partial_done)
    ending = np.int64(0)
    e.partial_done += chunk
    if e.partial_done == total:
        q.batch_slot[0] = slot
        ending = np.int64(1)
        e.partial = -1
    return np.int64(0), preempted, chunk, attention_ps, ending


@hot
def schedule_waiting(s, e, depth, need, budget, prefill_tokens, attention_ps, ending):
    """Admit waiting requests while budget, slots and blocks last.

    Returns the blocks that decodes still take, the tokens and the attention of all prefill (ps), how many
    prefills end in the batch, and how many sequences came from a prefill pool.
    """
    q = s.slots[e.row]
    joined = np.int64(0)
    while e.waiting > 0 and budget > 0 and e.running < e.batch_cap and e.partial < 0:
        request, before = pick(s, e, not settled(e))
        if request < 0:
            break
        total = np.int64(s.requests[request].prompt_tokens + s.outcomes[request].generated)
        transferred = s.outcomes[request].status == TRANSFER
        hits = (np.int64(0), np.int64(0), np.int64(0))
        if not transferred:
            hits = cached_blocks(s, e, request, total)
        elif budget < 1 + depth:
            break
        blocks = blocks_for(total)
        if transferred:  # with those of its first step
            step = step_tokens(s, e, s.tenants[s.requests[request].tenant].speculation_class, depth)
            blocks = max(blocks, blocks_for(total - 1 + step))
        if blocks - hits[0] + hits[1] > free_room(e, np.int64(0)) - need:
            break
        if need > 0:
            queue_take(s, e, need)
            need = np.int64(0)
            if not transferred:
                hits = cached_blocks(s, e, request, total)
        if transferred:  # its KV cache has come from the prefill pool: it decodes at once
            slot = admit(s, e, request, before, total, hits)
            generated = s.outcomes[request].generated
            q.slot_generated[slot] = generated - 1
            activate(e, q, slot, total - 1, np.int64(s.requests[request].output_tokens - generated))
            queue_take(s, e, blocks - blocks_for(total))
            budget -= 1 + depth
            q.batch_slot[MAX_RUNNING - 1 - joined] = slot
            joined += 1
            continue
        cached = (hits[0] + hits[2]) * BLOCK_TOKENS
        chunk = min(total - cached, budget)
        slot = admit(s, e, request, before, chunk, hits)
        if s.cell.blocks_per_id > 0 and s.cell.prefix_cache:
            share_blocks(s, e, slot, request, (cached + chunk) // BLOCK_TOKENS)
        attention_ps += chunk_ps(s, e, chunk, cached)
        prefill_tokens += chunk
        budget -= chunk
        if cached + chunk == total:
            q.batch_slot[ending] = slot
            ending += 1
        else:
            e.partial = slot
            e.partial_done = cached + chunk
    return need, prefill_tokens, attention_ps, ending, joined


@hot
def commit(s, e, depth, prefill_tokens, attention_ps, ending, joined):
    """Run one batch: every decoding sequence gains its tokens, `ending` prefills end."""
    q = s.slots[e.row]
    duration = batch_ps(s, e, prefill_tokens, attention_ps, ending, depth)
    n = e.active
    gained = np.int64(0)
    for c in range(s.cell.classes):
        tokens = step_tokens(s, e, c, depth)
        if depth > 0:
            e.accept[c] = (e.accept[c] + s.accept[c, depth]) & (ACCEPT_ONE - 1)
        e.clock[c] += tokens
        gained += e.class_active[c] * tokens
    e.kv_sum += gained
    start = max(e.next_ps, e.busy_ps)
    e.busy_ps = start + duration
    e.next_ps = e.busy_ps if e.synchronous else start
    note_gap(e, q, np.int64(1), duration)
    if n > joined:
        s.sums.gap_histogram[histogram_bin(duration)] += n - joined
    for i in range(joined):
        long_gap(s, e, np.int64(q.slot_request[q.batch_slot[MAX_RUNNING - 1 - i]]))
    for i in range(ending):
        end_prefill(s, e, np.int64(q.batch_slot[i]))
    s.window.iterations += 1
    s.window.prefill_tokens += prefill_tokens
    s.window.output_tokens += gained + ending
    s.window.drafted_tokens += n * depth
    s.window.accepted_tokens += gained - n
    count_batch_time(s, e, duration, np.int64(0))


@hot
def decide(s, e, limit_ps):
    """Start the next batch, or the next stretch of like batches; rest when there is nothing to do."""
    limit_ps = settle(s, e, limit_ps)
    depth = e.depth
    if depth > 0:
        depth = min(depth, e.token_budget // max(e.active, 1) - 1)
    need, preempted = schedule_running(s, e, depth)
    budget = e.token_budget - e.active * (1 + depth)
    prefill_tokens = np.int64(0)
    attention_ps = 0.0
    ending = np.int64(0)
    joined = np.int64(0)
    if e.partial >= 0 and budget > 0:
        need, preempted, prefill_tokens, attention_ps, ending = schedule_partial(
            s, e, depth, need, preempted, budget
        )
        budget -= prefill_tokens
    if e.waiting > 0 and not preempted:  # a preemption says that memory is short
        need, prefill_tokens, attention_ps, ending, joined = schedule_waiting(
            s, e, depth, need, budget, prefill_tokens, attention_ps, ending
        )
    if e.active == 0 and prefill_tokens == 0:
        rest(e, limit_ps)
    elif prefill_tokens == 0 and depth == 0 and joined == 0:
        batches, first, slope = decode_stretch(s, e, limit_ps)
        if preempted or (e.waiting > 0 and e.limbo_count > 0):
            batches = np.int64(1)
        run_stretch(s, e, batches, first, slope)
    else:
        if need > 0:
            queue_take(s, e, need)
        commit(s, e, depth, prefill_tokens, attention_ps, ending, joined)


@hot
def advance(s, e, until_ps, feeding):
    """Take every decision of an engine before `until_ps`; with `feeding` only while it feeds others."""
    while e.next_ps < until_ps and (not feeding or feeds(e)):
        decide(s, e, until_ps)
