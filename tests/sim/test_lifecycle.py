"""The conditions of an engine change along one table."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from llmserve_env.sim.kernel import lifecycle
from llmserve_env.sim.state import COLOCATED, DECODE, DRAINING, PREFILL, RELOADING, UP

CONDITIONS = (UP, DRAINING, RELOADING)
ALLOWED = {(UP, DRAINING), (DRAINING, RELOADING), (RELOADING, UP)}


def engine(condition, **fields):
    changing = {"forbidden": 0, "role": DECODE, "tier": 0, "next_role": PREFILL, "next_tier": 2}
    return SimpleNamespace(condition=condition, **{**changing, **fields})


@pytest.mark.parametrize("start", CONDITIONS)
@pytest.mark.parametrize("end", CONDITIONS)
def test_a_condition_changes_only_where_the_table_allows_it(start, end):
    e = engine(start)
    lifecycle.move.py_func(e, end)
    assert (e.condition, e.forbidden) == ((end, 0) if (start, end) in ALLOWED else (start, 1))


def test_every_table_has_a_row_for_every_condition():
    count = len(CONDITIONS)
    assert lifecycle.TRANSITIONS.shape == (count, count)
    assert len(lifecycle.SETTLED) == len(lifecycle.LOADED) == count
    reached = np.linalg.matrix_power(lifecycle.TRANSITIONS.astype(int), count)
    assert np.diag(reached).all(), "an engine comes back to where it was"


@pytest.fixture
def plain(monkeypatch):
    """The functions of the module as Python has them."""
    for name in ("move", "role", "tier"):
        monkeypatch.setattr(lifecycle, name, getattr(lifecycle, name).py_func)
    return lifecycle


@pytest.mark.parametrize(
    ("condition", "is_settled", "now", "ahead"),
    [
        (UP, True, (DECODE, 0), DECODE),
        (DRAINING, False, (DECODE, 0), PREFILL),
        (RELOADING, False, (PREFILL, 2), PREFILL),
    ],
)
def test_what_an_engine_is_and_will_be(plain, condition, is_settled, now, ahead):
    e = engine(condition)
    assert bool(plain.settled.py_func(e)) == is_settled
    assert (plain.role(e), plain.tier(e)) == now
    assert plain.role_ahead.py_func(e) == ahead
    assert plain.feeds.py_func(e) == (now[0] == PREFILL)


def test_an_engine_is_drained_once_nothing_runs_in_it(plain):
    assert plain.drained.py_func(engine(DRAINING, running=0))
    assert not plain.drained.py_func(engine(DRAINING, running=1))
    assert not plain.drained.py_func(engine(UP, running=0))
    e = engine(DRAINING, running=0, next_ps=5, reload_ps=7)
    plain.reload.py_func(e)
    assert (e.condition, e.next_ps) == (RELOADING, 12)


def test_the_wanted_roles_are_those_of_the_pools():
    def roles(split):
        cell = SimpleNamespace(split=split, prefill_engines=1)
        return [lifecycle.wanted_role.py_func(SimpleNamespace(cell=cell), i) for i in range(3)]

    assert roles(0) == [COLOCATED] * 3
    assert roles(1) == [PREFILL, DECODE, DECODE]
