"""What comes when in a cell: requests that arrive, are sent again, or are on their way between engines.

Requests of the workload arrive in the order of their times; what is added while the cell serves (attempts
that will be sent again, KV transfers) waits in a heap of timers of its own, by time and then by request. An
engine's next decision and the next deadline of its clients are in its record.
"""

from __future__ import annotations

import numpy as np

from llmserve_env.compiled import part
from llmserve_env.sim.state import NEVER_PS, TRANSFER

ARRIVAL, RETRY, LOOK, END = range(4)


@part
def push_timer(timers, size, time_ps, request):
    """Enter a request into a heap of `size` timers."""
    position = size
    while position > 0:
        parent = (position - 1) >> 1
        if (timers[parent].time_ps, timers[parent].request) <= (time_ps, request):
            break
        timers[position].time_ps = timers[parent].time_ps
        timers[position].request = timers[parent].request
        position = parent
    timers[position].time_ps = time_ps
    timers[position].request = request


@part
def pop_timer(timers, size):
    """Take the first request from a heap of `size` timers."""
    request = np.int64(timers[0].request)
    size -= 1
    time_ps = timers[size].time_ps
    last = timers[size].request
    position = 0
    child = 1
    while child < size:
        right = child + 1
        if right < size and (timers[right].time_ps, timers[right].request) < (
            timers[child].time_ps,
            timers[child].request,
        ):
            child = right
        if (timers[child].time_ps, timers[child].request) >= (time_ps, last):
            break
        timers[position].time_ps = timers[child].time_ps
        timers[position].request = timers[child].request
        position = child
        child = 2 * position + 1
    timers[position].time_ps = time_ps
    timers[position].request = last
    return request


@part
def transfer_ps(s, prompt_tokens):
    """What the KV cache of a prompt takes from a prefill to a decode engine (ps)."""
    return s.cell.transfer_latency_ps + s.cell.transfer_ps_per_token * prompt_tokens


@part
def queued_ps(s, request):
    """When a fresh request reached its engine's queue."""
    if s.outcomes[request].status == TRANSFER:
        return s.outcomes[request].finish_ps + transfer_ps(s, s.requests[request].prompt_tokens)
    return s.outcomes[request].sent_ps


@part
def next_transfer_ps(s):
    """When the next KV transfer arrives, NEVER_PS without any."""
    return s.transfers[0].time_ps if s.cell.transfers > 0 else NEVER_PS


@part
def quiet_until(s):
    """No attempt that ends from now on is followed by another before this time."""
    soonest = next_transfer_ps(s)
    for i in range(len(s.engines)):
        e = s.engines[i]
        soonest = min(soonest, e.next_ps, e.leave_ps)
        if e.waiting > 0:
            soonest = min(soonest, e.soonest_ps)
    return min(soonest + s.cell.shortest_wait_ps, NEVER_PS)


@part
def next_event(s, until_ps):
    """What happens next before `until_ps`: its kind, its time and its request.

    ARRIVAL and RETRY are of a request; one that is sent again arrived earlier, so at equal times it goes
    first. LOOK is the time up to which the engines must be looked at first, as what ends there may be sent
    again before the next arrival. END: nothing before `until_ps`.
    """
    kind = END
    now_ps = until_ps
    request = np.int64(-1)
    if s.cell.next_request < len(s.requests) and s.requests[s.cell.next_request].arrival_ps < now_ps:
        kind = ARRIVAL
        request = s.cell.next_request
        now_ps = s.requests[request].arrival_ps
    if s.cell.retrying > 0 and s.retries[0].time_ps < until_ps and s.retries[0].time_ps <= now_ps:
        kind = RETRY
        request = np.int64(s.retries[0].request)
        now_ps = s.retries[0].time_ps
    if s.cell.shortest_wait_ps < NEVER_PS:
        look_ps = quiet_until(s)
        if look_ps < until_ps and look_ps <= now_ps:
            return LOOK, look_ps, np.int64(-1)
    return kind, now_ps, request
