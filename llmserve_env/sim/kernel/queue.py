"""Waiting requests of an engine: who is next, and what it takes to admit it."""

from __future__ import annotations

import numpy as np

from llmserve_env.compiled import hot, part
from llmserve_env.sim.kernel.blocks import blocks_for, hold_cached, queue_take
from llmserve_env.sim.kernel.calendar import queued_ps
from llmserve_env.sim.state import BLOCK_TOKENS, NEVER_PS, RUNNING, TRANSFER, WAITING


@part
def note_deadline(s, e, tenant, request):
    """Note when the client of a request that the engine has started on goes away."""
    e.leave_ps = min(e.leave_ps, s.outcomes[request].sent_ps + s.tenants[tenant].deadline_ps)


@part
def count_arrival(e, now_ps):
    """A request has joined the engine's queue: wake it if it sleeps."""
    e.waiting += 1
    e.unfinished += 1
    if e.next_ps == NEVER_PS:
        e.next_ps = max(now_ps, e.busy_ps)


@part
def enqueue(s, e, request, now_ps):
    """Queue a request that was sent, or came from a prefill pool, at `now_ps`."""
    tenant = s.requests[request].tenant
    s.outcomes[request].next = -1
    if s.outcomes[request].status != TRANSFER:
        s.outcomes[request].status = WAITING
        e.soonest_ps = min(e.soonest_ps, s.outcomes[request].sent_ps + s.tenants[tenant].patience_ps)
    else:
        note_deadline(s, e, tenant, request)
    if e.fresh_head[tenant] < 0:
        e.fresh_head[tenant] = request
    else:
        s.outcomes[e.fresh_tail[tenant]].next = request
    e.fresh_tail[tenant] = request
    count_arrival(e, now_ps)


@part
def enqueue_in_turn(s, e, request, now_ps):
    """Queue a request that waited elsewhere before: it stands where its waiting time puts it.

    Requests come in order of waiting, so the search goes on from where the last one was put.
    """
    tenant = s.requests[request].tenant
    queued = queued_ps(s, request)
    if s.outcomes[request].status != TRANSFER:
        e.soonest_ps = min(e.soonest_ps, s.outcomes[request].sent_ps + s.tenants[tenant].patience_ps)
    else:
        note_deadline(s, e, tenant, request)
    before = np.int64(e.merged[tenant])
    if before >= 0 and s.outcomes[before].status != WAITING and s.outcomes[before].status != TRANSFER:
        # given up since
        before = np.int64(-1)
    after = np.int64(s.outcomes[before].next) if before >= 0 else np.int64(e.fresh_head[tenant])
    while after >= 0 and (queued_ps(s, after), after) < (queued, np.int64(request)):
        before = after
        after = np.int64(s.outcomes[after].next)
    s.outcomes[request].next = after
    if before >= 0:
        s.outcomes[before].next = request
    else:
        e.fresh_head[tenant] = request
    if after < 0:
        e.fresh_tail[tenant] = request
    e.merged[tenant] = request
    count_arrival(e, now_ps)


@part
def pick_fresh(s, e):
    """The fresh request that has waited longest, -1 for none; and -2, its place."""
    best = np.int64(-1)
    best_ps = NEVER_PS
    for tenant in range(s.cell.tenants):
        request = np.int64(e.fresh_head[tenant])
        if request >= 0:
            queued = queued_ps(s, request)
            if queued < best_ps or (queued == best_ps and request < best):
                best = request
                best_ps = queued
    return best, np.int64(-2)


@hot
def pick(s, e, resumed_only):
    """The waiting request that vLLM would look at next, -1 for none, and where it stands.

    That is the one before it in the stack of preempted requests, -1 for its top, -2 for a fresh request.

    Preempted requests stand before fresh ones, the last preempted first. Under priority routing a lower rank
    goes first, and a preempted one goes first within a rank.
    """
    if not e.priority:
        if e.resumed_head >= 0:
            return np.int64(e.resumed_head), np.int64(-1)
        if resumed_only:
            return np.int64(-1), np.int64(-2)
        return pick_fresh(s, e)
    best = np.int64(-1)
    best_before = np.int64(-2)
    best_rank = NEVER_PS
    before = np.int64(-1)
    request = np.int64(e.resumed_head)
    while request >= 0:
        rank = s.tenants[s.requests[request].tenant].rank
        if rank < best_rank:
            best = request
            best_before = before
            best_rank = rank
        before = request
        request = np.int64(s.outcomes[request].next)
    if resumed_only:
        return best, best_before
    best_ps = np.int64(-1)
    for tenant in range(s.cell.tenants):
        request = np.int64(e.fresh_head[tenant])
        if request < 0:
            continue
        rank = s.tenants[tenant].rank
        queued = queued_ps(s, request)
        if rank < best_rank or (rank == best_rank and best_ps >= 0 and (queued, request) < (best_ps, best)):
            best = request
            best_before = np.int64(-2)
            best_rank = rank
            best_ps = queued
    return best, best_before


@part
def dequeue(s, e, request, before):
    """Take a waiting request out, from where `pick` found it."""
    if before >= 0:
        s.outcomes[before].next = s.outcomes[request].next
    elif before == -1:
        e.resumed_head = s.outcomes[request].next
    else:
        e.fresh_head[s.requests[request].tenant] = s.outcomes[request].next
    e.waiting -= 1


@part
def admit(s, e, request, before, chunk, hits):
    """Give a waiting request a slot, its cached blocks and those of its first chunk; returns the slot."""
    q = s.slots[e.row]
    shared, _, private = hits
    dequeue(s, e, request, before)
    e.slots_free -= 1
    slot = np.int64(q.free_slot[e.slots_free])
    q.slot_request[slot] = request
    q.slot_order[slot] = e.admitted
    e.admitted += 1
    q.slot_generated[slot] = s.outcomes[request].generated
    q.slot_class[slot] = s.tenants[s.requests[request].tenant].speculation_class
    q.slot_shared[slot] = shared
    q.slot_prev[slot] = e.run_tail
    q.slot_next[slot] = -1
    if e.run_tail >= 0:
        q.slot_next[e.run_tail] = slot
    else:
        e.run_head = slot
    e.run_tail = slot
    e.running += 1
    s.outcomes[request].status = RUNNING
    note_deadline(s, e, s.requests[request].tenant, request)
    hold_cached(s, e, request, hits)
    cached = (shared + private) * BLOCK_TOKENS
    s.window.cached_tokens += cached
    queue_take(s, e, blocks_for(cached + chunk) - shared - private)
    return slot
