"""Memory for bodies: who holds what, and who gives way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve_env.live.gateway.admission.held_bodies import HeldBodies, HeldBody
from llmserve_env.live.gateway.admission.passage import Refused

PRIORITIES = (0, 1, 1)
MOST = 30

EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("open"), st.integers(0, 2), st.just(0)),
        st.tuples(st.just("grow"), st.integers(0, 200), st.integers(0, 12)),
        st.tuples(st.just("release"), st.integers(0, 200), st.just(0)),
    ),
    max_size=80,
)


def grow(held, body, size):
    """Its refusal, if it is refused."""
    try:
        held.grow(body, size)
    except Refused as refused:
        return refused
    return None


@given(st.booleans(), EVENTS)
def test_what_is_held_never_exceeds_the_bound_and_shares_are_kept(by_priority, events):
    held, gone = HeldBodies(PRIORITIES, lambda: by_priority, MOST), []
    bodies: list[HeldBody] = []
    for event, first, size in events:
        if event == "open":
            body = HeldBody(first)
            body.give_way = lambda body=body: gone.append(body)
            bodies.append(body)
            continue
        if not bodies:
            continue
        body = bodies[first % len(bodies)]
        if event == "release":
            held.release(body)
            bodies.remove(body)
        else:
            of = [sum(each.size for each in bodies if each.tenant == tenant) for tenant in range(3)]
            gone.clear()
            refused = grow(held, body, size)
            if refused is not None:
                assert (refused.status, refused.reason) == (429, "memory")
                if by_priority:
                    urgent = sum(of[i] for i in range(3) if PRIORITIES[i] <= PRIORITIES[body.tenant])
                    assert urgent + size > MOST
                else:
                    assert of[body.tenant] + size > MOST / 3
                bodies.remove(body)
            for lost in gone:
                assert lost.lost
                assert lost is not body
                if by_priority:
                    assert PRIORITIES[lost.tenant] >= PRIORITIES[body.tenant]
                else:
                    assert of[lost.tenant] + size * (lost.tenant == body.tenant) > MOST / 3
                bodies.remove(lost)
        assert held.bytes == sum(each.size for each in bodies) <= MOST


def test_a_body_that_never_fits_takes_nobody_s_place():
    held = HeldBodies((0, 1), lambda: True, 10)
    less, urgent = HeldBody(1), HeldBody(0)
    held.grow(less, 8)
    with pytest.raises(Refused):
        held.grow(urgent, 11)
    assert (held.bytes, less.lost, urgent.size) == (8, False, 0)


def test_the_newest_gives_way_and_what_has_sent_nothing_cannot():
    held = HeldBodies((0, 1), lambda: True, 10)
    old, new, idle, urgent = HeldBody(1), HeldBody(1), HeldBody(1), HeldBody(0)
    held.grow(idle, 0)
    held.grow(old, 4)
    held.grow(new, 4)
    held.grow(urgent, 6)
    assert [each.lost for each in (old, new, idle, urgent)] == [False, True, False, False]
    held.release(new)  # by its own request, later
    assert held.bytes == 10
