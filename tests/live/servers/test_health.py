"""The health of an upstream: what ejects it, for how long, and what brings it back."""

from __future__ import annotations

import pytest

from llmserve_env.live.servers.choice import RetryBudget
from llmserve_env.live.servers.fault import FAULTS, Cause, Owner, fault_of
from llmserve_env.live.servers.health import (
    CONSECUTIVE,
    EJECTED_S,
    FORGIVEN_S,
    HELD_S,
    LONGEST_S,
    Health,
    State,
)


def broken(cause=Cause.SERVER_ERROR, now_s=0.0):
    health = Health()
    for _ in range(CONSECUTIVE):
        health.failed(cause, now_s)
    return health


def probe(health, now_s, well):
    """Send the one request that an ejected upstream gets; returns whether it got it."""
    if not health.takes(now_s):
        return False
    assert health.sent(now_s, idle=True)
    if well:
        health.succeeded(now_s, probe=True)
    else:
        health.failed(Cause.SERVER_ERROR, now_s, probe=True)
    return True


def test_failures_in_a_row_eject_and_an_answer_between_them_forgives():
    health = Health()
    for _ in range(2 * CONSECUTIVE):
        for _ in range(CONSECUTIVE - 1):
            health.failed(Cause.CUT, 0.0)
        assert health.state(0.0) is State.SUSPECT
        for _ in range(5):
            health.succeeded(0.0, probe=False)
        assert (health.state(0.0), health.cause) == (State.WELL, None)
    for _ in range(CONSECUTIVE):
        health.failed(Cause.CUT, 0.0)
    assert (health.state(0.0), health.cause) == (State.EJECTED, Cause.CUT)
    assert not health.takes(0.0)


def test_one_that_fails_every_other_request_is_ejected_too():
    health = Health()
    sent = 0
    while not health.out:
        sent += 1
        if sent % 2:
            health.failed(Cause.SERVER_ERROR, 0.0)
        else:
            health.succeeded(0.0, probe=False)
    assert sent == 9  # half of the last ten


@pytest.mark.parametrize("cause", [Cause.UNREACHABLE, Cause.KEY_REFUSED])
def test_what_leaves_no_doubt_ejects_at_once(cause):
    health = Health()
    health.failed(cause, 0.0)
    assert health.state(0.0) is State.EJECTED


def test_a_single_request_finds_out_and_each_ejection_is_longer_until_the_longest():
    health, now_s, lengths = broken(), 0.0, []
    for _ in range(6):
        begun_s = now_s
        while not probe(health, now_s, well=False):
            now_s += 0.25
        lengths.append(now_s - begun_s)
    assert lengths == [EJECTED_S, 2 * EJECTED_S, 4 * EJECTED_S, LONGEST_S, LONGEST_S, LONGEST_S]
    now_s += LONGEST_S
    assert health.state(now_s) is State.PROBING
    assert health.sent(now_s, idle=True)
    assert not health.takes(now_s)  # no second one meanwhile
    health.left(probe=True)  # its client went away: nothing is known
    assert probe(health, now_s, well=True)
    assert (health.state(now_s), health.cause) == (State.WELL, None)


def test_an_ejection_soon_after_the_last_goes_on_growing_and_a_late_one_begins_anew():
    for pause_s, length_s in ((FORGIVEN_S - 1, 2 * EJECTED_S), (FORGIVEN_S + 1, EJECTED_S)):
        health = broken()
        probe(health, EJECTED_S, well=True)
        again_s = EJECTED_S + pause_s
        for _ in range(CONSECUTIVE):
            health.failed(Cause.LOST, again_s)
        assert health.state(again_s + length_s - 0.01) is State.EJECTED
        assert health.state(again_s + length_s) is State.PROBING


def test_what_was_sent_before_an_ejection_neither_lengthens_nor_ends_it():
    health = broken()
    for _ in range(20):
        health.failed(Cause.SERVER_ERROR, 0.5)
    health.succeeded(0.5, probe=False)
    assert health.state(0.99) is State.EJECTED
    assert health.state(EJECTED_S) is State.PROBING


def test_retry_after_is_heeded_up_to_a_minute():
    for asked_s, heeded_s in ((7.0, 7.0), (0.1, EJECTED_S), (9000.0, 60.0)):
        health = Health()
        health.failed(Cause.BUSY, 0.0, retry_after_s=asked_s)
        assert health.state(heeded_s - 0.01) is State.EJECTED
        assert health.state(heeded_s) is State.PROBING


def test_silence_lasts_as_long_as_it_is_seen_and_ends_when_something_moves():
    health = Health()
    for now_s in range(100):
        health.silent(float(now_s))
        assert (health.state(now_s), health.cause) == (State.EJECTED, Cause.SILENT)
    assert health.ejections == {Cause.SILENT: 1}
    health.moved(99.5)  # as it does when all that it had was taken away: it may hang with the next, too
    assert health.state(99.5) is State.PROBING
    assert health.sent(99.6, idle=True)
    assert not health.takes(99.7)
    health.came(99.8)
    assert health.state(99.8) is State.WELL
    health.silent(100.0)
    assert health.state(100.0 + HELD_S) is State.PROBING  # nobody has seen it since
    broken_now = broken()
    broken_now.moved(0.5)  # that something moves says nothing of failures
    broken_now.came(0.5)
    assert broken_now.state(0.5) is State.EJECTED


def test_the_evidence_that_came_first_is_the_cause_for_as_long_as_any_is_seen():
    health = Health()
    for now_s in range(30):
        health.silent(now_s)
        health.answered(False, now_s)
    assert (health.cause, sum(health.ejections.values())) == (Cause.SILENT, 1)
    late = broken()
    late.failed(Cause.UNREACHABLE, 0.5, probe=False)
    assert (late.cause, late.state(EJECTED_S)) == (Cause.UNREACHABLE, State.EJECTED)


def test_a_failing_health_ejects_and_its_return_lets_a_request_find_out():
    health = Health()
    health.answered(False, 0.0)
    assert health.state(0.0) is State.WELL  # a single answer may be late
    for now_s in range(1, 30):
        health.answered(False, now_s)
        assert (health.state(now_s), health.cause) == (State.EJECTED, Cause.UNHEALTHY)
    health.answered(True, 30.0)
    assert health.state(30.0) is State.PROBING
    health = broken()
    health.answered(True, 0.1)  # it says that it is well, and fails requests all the same
    assert health.state(0.1) is State.EJECTED


def test_a_drained_one_takes_nothing_whatever_else_it_is():
    for health in (Health(), broken()):
        health.draining = True
        assert health.state(1e6) is State.DRAINING
        assert not health.takes(1e6)


@pytest.mark.parametrize(
    ("reason", "owner", "cause"),
    [
        ("http 400", Owner.CLIENT, None),
        ("http 404", Owner.CLIENT, None),
        ("refused with 422", Owner.CLIENT, None),
        ("http 408", Owner.UPSTREAM, Cause.STALLED),
        ("http 429", Owner.UPSTREAM, Cause.BUSY),
        ("refused with 503", Owner.UPSTREAM, Cause.SERVER_ERROR),
        ("http 500", Owner.UPSTREAM, Cause.SERVER_ERROR),
        ("http 302", Owner.UPSTREAM, Cause.NO_COMPLETION),
        ("key refused", Owner.GATEWAY, Cause.KEY_REFUSED),
        ("unexpected KeyError", Owner.GATEWAY, None),
        ("queue full", Owner.GATEWAY, None),
    ],
)
def test_every_outcome_has_an_owner(reason, owner, cause):
    assert fault_of(reason) == (owner, cause)


def test_what_clients_do_is_no_upstreams_failure():
    assert {fault.cause for fault in FAULTS.values() if fault.owner is Owner.CLIENT} == {None}


def test_retries_are_a_fifth_of_the_requests_and_ten_a_second():
    budget = RetryBudget(0.0)

    def spent(now_s):
        return sum(1 for _ in range(1000) if budget.spend(now_s))

    assert spent(0.0) == 100  # saved up
    assert spent(0.0) == 0
    assert spent(2.0) == 20
    for _ in range(52):
        budget.earn()
    assert spent(2.0) == 10
    assert spent(1e6) == 200  # no more than that is ever saved
