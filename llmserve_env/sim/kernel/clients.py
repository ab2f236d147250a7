"""Clients: whom the bucket lets in, who gives up waiting, who comes back."""

from __future__ import annotations

import numpy as np

from llmserve_env.compiled import part
from llmserve_env.sim.kernel.blocks import disown
from llmserve_env.sim.kernel.calendar import push_timer, queued_ps
from llmserve_env.sim.kernel.sequences import cancel, release
from llmserve_env.sim.state import FAILED, MAX_DOUBLINGS, NEVER_PS, RETRYING, TRANSFER


@part
def lets_in(s, tenant, priority, now_ps):
    """Take a token from the bucket in front of the queue, if there is one for this tenant.

    The bucket as a virtual clock, exact in integers: `full_ps` is when it will be full again, a token takes
    `token_ps` to come back. Under priority routing rank r of n may take what is above r / n of the bucket.
    """
    full_ps = max(s.cell.full_ps, now_ps) + s.cell.token_ps
    burst_ps = s.cell.burst_ps
    if priority:
        burst_ps = burst_ps * (s.cell.ranks - s.tenants[tenant].rank) // s.cell.ranks
    if full_ps - now_ps > max(burst_ps, s.cell.token_ps):
        return False
    s.cell.full_ps = full_ps
    return True


@part
def end_attempt(s, request, now_ps):
    """An attempt has been refused or given up: its client sends the request again later, or it has failed."""
    tenant = s.requests[request].tenant
    s.outcomes[request].first_ps = 0
    s.outcomes[request].worst_gap_ps = 0
    s.outcomes[request].generated = 0
    s.outcomes[request].finish_ps = 0
    tries = np.int64(s.outcomes[request].retries)
    if tries < s.tenants[tenant].retries:
        again_ps = now_ps + (s.tenants[tenant].retry_after_ps << min(tries, MAX_DOUBLINGS))
        s.outcomes[request].retries = tries + 1
        s.outcomes[request].status = RETRYING
        s.outcomes[request].sent_ps = again_ps
        push_timer(s.retries, s.cell.retrying, again_ps, request)
        s.cell.retrying += 1
        return
    s.outcomes[request].status = FAILED
    s.outcomes[request].finish_ps = now_ps
    s.window.failed += 1
    s.window.tenant_failed[tenant] += 1
    s.cell.tenant_in_flight[tenant] -= 1


@part
def expire(s, e, now_ps):
    """End the attempts whose client has given up by now; returns a time before which no other will."""
    if now_ps < e.soonest_ps:
        return e.soonest_ps
    soonest = NEVER_PS
    for tenant in range(s.cell.tenants):
        patience = s.tenants[tenant].patience_ps
        if patience >= NEVER_PS:
            continue
        before = np.int64(-1)
        request = np.int64(e.fresh_head[tenant])
        while request >= 0:
            after = np.int64(s.outcomes[request].next)
            if s.outcomes[request].status == TRANSFER:  # it has its first token
                before = request
                request = after
                continue
            deadline = s.outcomes[request].sent_ps + patience
            if deadline > now_ps:
                soonest = min(soonest, deadline)
                break
            s.window.timeouts += 1
            end_attempt(s, request, deadline)
            e.waiting -= 1
            e.unfinished -= 1
            if before >= 0:
                s.outcomes[before].next = after
            else:
                e.fresh_head[tenant] = after
            if after < 0:
                e.fresh_tail[tenant] = before
            request = after
    e.soonest_ps = soonest
    return soonest


@part
def leave_queues(s, e, now_ps):
    """End the attempts past their deadline that wait after they were started on; returns when the next is."""
    soonest = NEVER_PS
    before = np.int64(-1)
    request = np.int64(e.resumed_head)
    while request >= 0:  # preempted ones
        after = np.int64(s.outcomes[request].next)
        leave_ps = s.outcomes[request].sent_ps + s.tenants[s.requests[request].tenant].deadline_ps
        if leave_ps > now_ps:
            soonest = min(soonest, leave_ps)
            before = request
        else:
            disown(s, e, request)
            if before >= 0:
                s.outcomes[before].next = after
            else:
                e.resumed_head = after
            e.waiting -= 1
            e.unfinished -= 1
            s.window.timeouts += 1
            end_attempt(s, request, leave_ps)
        request = after
    if not s.cell.can_split:
        return soonest
    for tenant in range(s.cell.tenants):
        before = np.int64(-1)
        request = np.int64(e.fresh_head[tenant])
        while request >= 0:  # those that came from a prefill pool
            after = np.int64(s.outcomes[request].next)
            leave_ps = max(queued_ps(s, request), s.outcomes[request].sent_ps + s.tenants[tenant].deadline_ps)
            if s.outcomes[request].status != TRANSFER or leave_ps > now_ps:
                if s.outcomes[request].status == TRANSFER:
                    soonest = min(soonest, leave_ps)
                before = request
            else:
                if before >= 0:
                    s.outcomes[before].next = after
                else:
                    e.fresh_head[tenant] = after
                if after < 0:
                    e.fresh_tail[tenant] = before
                e.waiting -= 1
                e.unfinished -= 1
                s.window.timeouts += 1
                end_attempt(s, request, leave_ps)
            request = after
    return soonest


@part
def leave(s, e, now_ps):
    """End the attempts past their deadline that the engine has started on, in the order of their deadlines.

    One whose last token is scheduled is not cancelled any more.
    """
    q = s.slots[e.row]
    soonest = leave_queues(s, e, now_ps)
    while True:
        first = np.int64(-1)
        first_ps = NEVER_PS
        slot = np.int64(e.run_head)
        while slot >= 0:
            request = np.int64(q.slot_request[slot])
            leave_ps = s.outcomes[request].sent_ps + s.tenants[s.requests[request].tenant].deadline_ps
            c = q.slot_class[slot]
            over = slot != e.partial and q.heap_key[c, q.slot_heap[slot]] <= e.clock[c]
            if not over and (
                leave_ps < first_ps or (leave_ps == first_ps and request < q.slot_request[first])
            ):
                first = slot
                first_ps = leave_ps
            slot = np.int64(q.slot_next[slot])
        if first < 0 or first_ps > now_ps:
            break
        if e.limbo_count > 0 and e.limbo_ps <= first_ps:
            release(s, e)
        request = np.int64(q.slot_request[first])
        cancel(s, e, first)
        s.window.timeouts += 1
        end_attempt(s, request, first_ps)
    e.leave_ps = min(soonest, first_ps)
