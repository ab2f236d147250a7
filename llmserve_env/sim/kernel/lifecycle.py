"""The conditions of an engine, and what it is and will be in each.

A condition changes only in `move`, along TRANSITIONS. An engine's `forbidden` counts the attempts at any
other change, of which there must be none:

    UP ──drain──▶ DRAINING ──its last sequence has ended──▶ RELOADING ──weights and role are there──▶ UP
"""

from __future__ import annotations

import numpy as np

from llmserve_env.compiled import part
from llmserve_env.sim.kernel.blocks import reset_blocks
from llmserve_env.sim.state import COLOCATED, DECODE, DRAINING, NEVER_PS, PREFILL, RELOADING, UP

TRANSITIONS = np.array([[False, True, False], [False, False, True], [True, False, False]])
"""Whether an engine may go from one condition (first index) to another."""
SETTLED = np.array([True, False, False])
"""Whether an engine of a condition stays what it is: its role and precision are not about to change."""
LOADED = np.array([True, True, False])
"""Whether an engine of a condition has its weights, and so its role and precision, in the GPU."""


@part
def move(e, condition):
    """Change an engine's condition, where the table allows it, and count what it does not."""
    if TRANSITIONS[e.condition, condition]:
        e.condition = condition
    else:
        e.forbidden += 1


@part
def settled(e):
    """Whether the engine takes new requests as what it is."""
    return SETTLED[e.condition]


@part
def role(e):
    """Role that the engine has, or loads for."""
    return e.role if LOADED[e.condition] else e.next_role


@part
def tier(e):
    """Precision that the engine has, or loads."""
    return e.tier if LOADED[e.condition] else e.next_tier


@part
def role_ahead(e):
    """Role in which the engine will serve a request that it is given now."""
    return e.role if SETTLED[e.condition] else e.next_role


@part
def feeds(e):
    """Whether an engine prefills for others from its next decision on."""
    return role(e) == PREFILL


@part
def wanted_role(s, i):
    """Role that engine i of a cell is to have."""
    if not s.cell.split:
        return np.int64(COLOCATED)
    return np.int64(PREFILL) if i < s.cell.prefill_engines else np.int64(DECODE)


@part
def drain(s, e, role, now_ps):
    """Begin to change an engine's role or precision: it ends what runs and takes nothing new."""
    move(e, np.int64(DRAINING))
    e.next_role = role
    e.next_tier = s.cell.tier
    e.reload_ps = s.cell.restart_ps + (s.cell.load_ps[s.cell.tier] if e.tier != s.cell.tier else 0)
    if e.next_ps == NEVER_PS:
        e.next_ps = max(now_ps, e.busy_ps)


@part
def drained(e):
    """Whether nothing runs any more in an engine that drains."""
    return e.condition == DRAINING and e.running == 0


@part
def reload(e):
    """Take a drained engine's process down and load what it will be."""
    move(e, np.int64(RELOADING))
    e.next_ps = e.next_ps + e.reload_ps


@part
def come_up(s, e):
    """An engine that has reloaded is up with its new role and precision, its cache empty."""
    if e.condition != RELOADING:
        return
    move(e, np.int64(UP))
    e.role = e.next_role
    e.tier = e.next_tier
    reset_blocks(s, e)
    request = np.int64(e.resumed_head)
    while request >= 0:
        s.outcomes[request].segment = -1
        request = np.int64(s.outcomes[request].next)
