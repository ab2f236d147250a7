"""Routing: which engine of a cell takes a request."""

from __future__ import annotations

from llmserve_env.compiled import part
from llmserve_env.sim.kernel.lifecycle import role_ahead, settled
from llmserve_env.sim.state import NEVER_PS

_AVOIDED = 1 << 50
_CHANGING = 1 << 40


@part
def route(s, now_ps, avoided):
    """Least-loaded engine, rather one of another role than `avoided`, and one that is not about to change."""
    best = -1
    best_load = NEVER_PS
    for i in range(len(s.engines)):
        e = s.engines[i]
        load = e.unfinished
        if e.limbo_count > 0 and e.limbo_ps <= now_ps:
            load -= e.limbo_count
        if role_ahead(e) == avoided:
            load += _AVOIDED
        if not settled(e):
            load += _CHANGING
        if load < best_load:
            best = i
            best_load = load
    return best
