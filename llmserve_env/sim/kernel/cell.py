"""A cell: its events in their order, and the engines that serve between them."""

from __future__ import annotations

import numpy as np

from llmserve_env.compiled import part
from llmserve_env.hardware.constants import MAX_DEPTH
from llmserve_env.sim.kernel.blocks import blocks_for
from llmserve_env.sim.kernel.calendar import (
    ARRIVAL,
    END,
    RETRY,
    next_event,
    next_transfer_ps,
    pop_timer,
)
from llmserve_env.sim.kernel.clients import end_attempt, expire, leave, lets_in
from llmserve_env.sim.kernel.lifecycle import drain, feeds, settled, wanted_role
from llmserve_env.sim.kernel.queue import dequeue, enqueue, enqueue_in_turn, pick_fresh
from llmserve_env.sim.kernel.routing import route
from llmserve_env.sim.kernel.scheduler import advance
from llmserve_env.sim.state import CANCELLED, DECODE, NEVER_PS, PREFILL, TRANSFER


@part
def leave_all(s, now_ps):
    """End the attempts past their deadline at every engine."""
    for i in range(len(s.engines)):
        if s.engines[i].leave_ps <= now_ps:
            leave(s, s.engines[i], now_ps)


@part
def expire_all(s, now_ps):
    """End the attempts that no engine has started on and whose client has given up."""
    for i in range(len(s.engines)):
        if s.engines[i].waiting > 0:
            expire(s, s.engines[i], now_ps)


@part
def end_waits(s, now_ps):
    """End the attempts whose client has gone away by now, started on or not, at every engine."""
    for i in range(len(s.engines)):
        e = s.engines[i]
        if e.leave_ps <= now_ps:
            leave(s, e, now_ps)
        if e.waiting > 0:
            expire(s, e, now_ps)


@part
def hand_over(s, request, now_ps, avoided):
    """Give a request to the engine that the route names, once those who do not wait any more are gone."""
    end_waits(s, now_ps)
    enqueue(s, s.engines[route(s, now_ps, avoided)], request, now_ps)


@part
def reroute(s, i, now_ps):
    """Send the fresh requests that wait at a draining engine where they would go now."""
    e = s.engines[i]
    chain = np.int64(-1)
    last = np.int64(-1)
    while True:
        request, before = pick_fresh(s, e)
        if request < 0:
            break
        dequeue(s, e, request, before)
        e.unfinished -= 1
        if last >= 0:
            s.outcomes[last].next = request
        else:
            chain = request
        s.outcomes[request].next = -1
        last = request
    for j in range(len(s.engines)):
        for tenant in range(s.cell.tenants):
            s.engines[j].merged[tenant] = -1
    while chain >= 0:
        after = np.int64(s.outcomes[chain].next)
        expire_all(s, now_ps)
        avoided = np.int64(PREFILL if s.outcomes[chain].status == TRANSFER else DECODE)
        target = route(s, now_ps, avoided)
        enqueue_in_turn(s, s.engines[target], chain, now_ps)
        chain = after


@part
def begin_switch(s, now_ps):
    """Start to drain the next engine whose role or precision is not the wanted one, one engine at a time."""
    for i in range(len(s.engines)):
        if not settled(s.engines[i]):
            return
    for i in range(len(s.engines)):
        e = s.engines[i]
        role = wanted_role(s, i)
        if e.role != role or e.tier != s.cell.tier:
            drain(s, e, role, now_ps)
            if len(s.engines) > 1:
                reroute(s, i, now_ps)
            return


@part
def advance_all(s, until_ps):
    """Take all decisions before `until_ps`; hand over the transfers that arrive before it, in their order.

    Prefill engines run ahead, as what they send is an event for the others. The engines follow each other
    by their
    number: sums of a window are of floats, and their order is part of the result.
    """
    while True:
        stop_ps = until_ps
        for turn in range(0 if s.cell.feeding else 1, 2):
            feeding = turn == 0
            if not feeding:
                stop_ps = min(next_transfer_ps(s), until_ps)
            for i in range(len(s.engines)):
                e = s.engines[i]
                if e.next_ps < stop_ps and feeds(e) == feeding:
                    advance(s, e, stop_ps, feeding)
        if stop_ps < until_ps:
            ready_ps = next_transfer_ps(s)
            request = pop_timer(s.transfers, s.cell.transfers)
            s.cell.transfers -= 1
            hand_over(s, request, ready_ps, np.int64(PREFILL))
        elif next_transfer_ps(s) >= until_ps:
            return


@part
def arrive(s, request, now_ps):
    """A client sends a request for the first time; whether it can be served at all."""
    tenant = s.requests[request].tenant
    s.cell.next_request = request + 1
    s.window.arrived += 1
    s.window.arrived_prompt_tokens += s.requests[request].prompt_tokens
    s.window.tenant_arrived[tenant] += 1
    tokens = s.requests[request].prompt_tokens + s.requests[request].output_tokens + MAX_DEPTH
    if s.requests[request].prompt_tokens >= s.cell.longest or blocks_for(tokens) > s.cell.most_blocks:
        s.outcomes[request].status = CANCELLED
        s.outcomes[request].finish_ps = now_ps
        s.window.cancelled += 1
        s.window.tenant_failed[tenant] += 1
        return False
    s.cell.tenant_in_flight[tenant] += 1
    return True


@part
def let_in(s, request, now_ps):
    """Whether an attempt gets past the bucket in front of the queue; one that does not ends here."""
    if s.cell.token_ps == 0 or lets_in(s, s.requests[request].tenant, s.engines[0].priority, now_ps):
        return True
    s.window.refused += 1
    end_attempt(s, request, now_ps)
    return False


@part
def serve_window(s, start_ps, until_ps):
    """Serve one cell from `start_ps` to `until_ps`: switch, then all events in their order."""
    leave_all(s, start_ps)
    begin_switch(s, start_ps)
    s.cell.feeding = 0
    for i in range(len(s.engines)):
        e = s.engines[i]
        if e.next_ps == NEVER_PS and e.waiting > 0:
            e.next_ps = max(start_ps, e.busy_ps)
        if e.role == PREFILL or e.next_role == PREFILL:
            s.cell.feeding = 1
    kind = ARRIVAL
    while kind != END:
        kind, now_ps, request = next_event(s, until_ps)
        if kind == ARRIVAL and not arrive(s, request, now_ps):
            continue
        if kind == RETRY:
            pop_timer(s.retries, s.cell.retrying)
            s.cell.retrying -= 1
            s.window.retries += 1
        if request >= 0 and not let_in(s, request, now_ps):
            continue
        advance_all(s, now_ps)
        if kind == END:
            now_ps = min(until_ps - 1, NEVER_PS - 1)
        if request < 0:
            end_waits(s, now_ps)
        elif len(s.engines) == 1:
            enqueue(s, s.engines[0], request, now_ps)
        else:
            hand_over(s, request, now_ps, np.int64(DECODE))
