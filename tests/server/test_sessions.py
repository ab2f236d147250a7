"""Sessions: how many, how long, and that each is its player's own."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from llmserve_env.schema import ServeAction
from server.messages.refusals import AtCapacity, Conflict, NotFound
from server.messages.requests import ResetRequest
from server.service import Service, return_memory
from server.sessions import Sessions
from server.settings import Settings
from tests.server._playing import ACTIONS, BEGIN, bare, client, local, ok

REQUEST = ResetRequest(**BEGIN)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def make(clock, **settings):
    return Sessions(Settings(**settings), clock=clock)


def names(sessions, *candidates):
    """Which of the candidates are open."""
    found = []
    for each in candidates:
        try:
            found.append(sessions.get(each.id) is each)
        except NotFound:
            found.append(False)
    return found


def test_a_session_that_nobody_uses_is_closed_when_its_time_is_over(clock):
    sessions = make(clock, session_timeout_s=60.0)
    idle, used = sessions.open(), sessions.open()
    closed = []
    sessions.on_close = closed.append
    clock.now += 50
    used.touch()
    clock.now += 10
    assert sessions.sweep() == 0  # not before it is over
    clock.now += 0.5
    assert sessions.sweep() == 1
    assert names(sessions, idle, used) == [False, True]
    assert closed == [idle]
    clock.now += 50
    assert sessions.sweep() == 1
    assert len(sessions) == 0


def test_a_session_in_which_a_request_plays_is_not_closed(clock):
    async def play() -> None:
        sessions = make(clock, session_timeout_s=60.0, max_sessions=1, reclaim_after_s=10.0)
        session = sessions.open()
        async with session.lock:
            clock.now += 1000
            assert sessions.sweep() == 0
            with pytest.raises(AtCapacity):
                sessions.open()
        assert sessions.sweep() == 1

    asyncio.run(play())


def test_at_capacity_the_session_idle_longest_gives_way_if_for_long_enough(clock):
    sessions = make(clock, max_sessions=2, reclaim_after_s=300.0)
    first, second = sessions.open(), sessions.open()
    clock.now += 100
    first.touch()
    with pytest.raises(AtCapacity) as refused:
        sessions.open()
    assert refused.value.retry_after_s == 200  # when the second may go
    clock.now += 200
    third = sessions.open()
    assert names(sessions, first, second, third) == [True, False, True]


def test_a_session_that_a_websocket_holds_does_not_give_way(clock):
    sessions = make(clock, max_sessions=2, reclaim_after_s=300.0)
    held, free = sessions.open(), sessions.open()
    held.connected = True
    clock.now += 400
    free.touch()
    with pytest.raises(AtCapacity):
        sessions.open()
    clock.now += 300
    assert names(sessions, held, free, sessions.open()) == [True, False, True]


def test_names_cannot_be_guessed_and_no_two_are_alike(clock):
    sessions = make(clock)
    found = {sessions.open().id for _ in range(1000)}
    assert len(found) == 1000
    assert min(map(len, found)) >= 32  # 24 random bytes


def test_closing_twice_is_closing_once(clock):
    sessions = make(clock)
    closed = []
    sessions.on_close = closed.append
    session = sessions.open()
    sessions.close(session)
    sessions.close(session)
    assert closed == [session]


def test_what_waits_for_a_session_that_is_closed_plays_nothing(tmp_path):
    """Its name must not come back with the next restart."""

    async def play() -> None:
        service = Service(Settings(journal=tmp_path))
        session = service.sessions.open()
        await service.reset(session, REQUEST)
        async with session.lock:
            late = [
                asyncio.ensure_future(service.step(session, [ServeAction()])),
                asyncio.ensure_future(service.reset(session, REQUEST)),
            ]
            await asyncio.sleep(0)
            service.sessions.close(session)
        for each in late:
            with pytest.raises(NotFound):
                await each
        assert list(tmp_path.iterdir()) == []

    asyncio.run(play())


def test_a_session_keeps_its_log_when_the_episode_is_over():
    async def play() -> None:
        service = Service(Settings())
        session = service.sessions.open()
        await service.reset(session, REQUEST)
        await service.step(session, [ServeAction(**action) for action in ACTIONS])
        assert session.log() == local()[1]
        with pytest.raises(Conflict):
            await service.step(session, [ServeAction()])
        assert (await service.grade(session)).score == local()[1].score

    asyncio.run(play())


# On the wire


@pytest.mark.parametrize("path", ["/step", "/step_n", "/grader", "/reset"])
def test_a_session_that_there_is_not_is_not_found(server_url, path):
    body = {"/step": {"action": {}}, "/step_n": {"actions": [{}]}}.get(path, {})
    with client(server_url) as http:
        for answer in (
            http.post(path, json={**body, "session_id": "guessed"}),
            http.post(path, json=body, headers={"X-Session-Id": "guessed"}),
        ):
            assert answer.status_code == 404
            assert "session" in answer.json()["detail"]
            assert "set-cookie" not in answer.headers


def test_a_client_whose_cookie_is_of_no_session_gets_a_new_one(server_url):
    with client(server_url) as http:
        http.cookies.set("llmserve_session", "expired")
        assert http.post("/step", json={"action": {}}).status_code == 404
        assert ok(http.post("/reset", json=BEGIN))["metadata"]["session_id"] != "expired"


def test_clients_play_their_own_episodes_turn_by_turn(server_url):
    players = [client(server_url) for _ in range(6)]
    answers = [[ok(http.post("/reset", json={**BEGIN, "seed": seed}))] for seed, http in enumerate(players)]
    for action in ACTIONS:
        for http, seen in zip(players, answers, strict=True):
            seen.append(ok(http.post("/step", json={"action": action})))
    for seed, (http, seen) in enumerate(zip(players, answers, strict=True)):
        assert [bare(answer) for answer in seen] == local(seed)[0]
        assert ok(http.post("/grader"))["score"] == local(seed)[1].score
        assert http.delete("/session").status_code == 204
        http.close()


def test_at_capacity_a_client_is_told_when_to_come_again(single_url):
    with client(single_url) as first, client(single_url) as second:
        ok(first.post("/reset", json=BEGIN))
        refused = second.post("/reset", json=BEGIN)
        assert refused.status_code == 429
        assert 0 < int(refused.headers["Retry-After"]) <= 300
        assert bare(ok(first.post("/step", json={"action": ACTIONS[0]}))) == local()[0][1]
        first.delete("/session")
        ok(second.post("/reset", json=BEGIN))
        second.delete("/session")


def test_a_reset_that_is_refused_takes_no_room(single_url):
    with client(single_url) as http:
        for _ in range(3):
            assert http.post("/reset", json={"task_id": "no_such"}).status_code == 404
        ok(http.post("/reset", json=BEGIN))
        http.delete("/session")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_closed_sessions_give_their_memory_back():
    def held_mb() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6

    async def play() -> None:
        service = Service(Settings())
        for first in (True, False):  # the first lot has the code compiled, and is left open
            before = held_mb()
            opened = [service.sessions.open() for _ in range(4 if first else 100)]
            for session in opened:
                await service.reset(session, ResetRequest(task_id="bursty_workload", seed=1))
        held = held_mb() - before
        for session in opened:
            service.sessions.close(session)
        del opened, session
        return_memory()
        assert held_mb() - before < held / 3

    asyncio.run(play())
