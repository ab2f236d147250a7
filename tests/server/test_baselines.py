"""Reference runs of the service: each episode is played once, and who pays for them."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest

from llmserve_env.schema import ServeAction
from server.baseline_suites import deterministic_suite
from server.baselines import Baselines
from server.guard import Guard
from server.settings import Settings
from tests.live.endpoint_server import ChatEndpoint, chat, serving
from tests.server._playing import client, ok
from tests.server.conftest import running

TASK = "bursty_workload"
WINDOWS = 120
ANSWER = chat(json.dumps(ServeAction().model_dump(mode="json")))


@pytest.fixture
def asked(monkeypatch):
    """Takes the function that answers, and gives the endpoint that the environment names."""
    endpoint = ChatEndpoint(lambda number, body: ANSWER)
    with serving(endpoint) as url:
        monkeypatch.setenv("OPENAI_API_KEY", "k")
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        monkeypatch.setenv("OPENAI_MODEL", "m")
        yield endpoint


class Counting(Guard):
    """A guard that says what it was asked to play."""

    def __init__(self):
        super().__init__(Settings(guard_timeout_s=120.0))
        self.played = []

    async def run(self, function, *args, **kwargs):
        self.played.append((*args, kwargs["seed"]))
        return await super().run(function, *args, **kwargs)


def test_fewer_episodes_are_read_from_those_of_more_and_more_are_added():
    async def main():
        guard = Counting()
        baselines = Baselines(guard)
        try:
            two = await baselines.content("deterministic", TASK, 2)
            one = await baselines.content("deterministic", TASK, 1)
            three, again = await asyncio.gather(
                *(baselines.content("deterministic", TASK, 3) for _ in range(2))
            )
        finally:
            guard.close()
            baselines.close()
        return guard.played, [one, two, three, again]

    played, (one, two, three, again) = asyncio.run(main())
    assert [(tasks, episodes) for tasks, episodes, _ in played] == [([TASK], 2), ([TASK], 1)]
    assert one == deterministic_suite([TASK], 1)
    assert two == deterministic_suite([TASK], 2)
    assert three == again
    assert three["episodes"][:2] == two["episodes"][:2]
    assert [len(each["episodes"]) % 3 for each in (three,)] == [0]


def test_a_language_model_is_asked_no_more_when_nobody_waits(asked):
    """Nor does its being asked keep others from the reference agents."""

    async def main():
        loop = asyncio.get_running_loop()
        over, reached = threading.Event(), asyncio.Event()

        def reply(number, body):
            if number == 5:
                loop.call_soon_threadsafe(reached.set)
                assert over.wait(60)
            return ANSWER

        asked.reply = reply
        guard = Guard(Settings(guard_timeout_s=120.0))
        baselines = Baselines(guard)
        try:
            asking = asyncio.create_task(baselines.content("openai", TASK, 10))
            await reached.wait()
            content = await baselines.content("deterministic", TASK, 1)
            assert content["summary"][TASK]
            asking.cancel()
            await asyncio.wait([asking])
            over.set()
            await loop.run_in_executor(baselines._asking, lambda: None)  # it has one thread
            assert len(asked.requests) == 6
            found = await baselines.content("openai", TASK, 1)
        finally:
            over.set()
            guard.close()
            baselines.close()
        return found

    assert asyncio.run(main())["summary"][TASK]["m"]["episodes"] == 1
    assert len(asked.requests) == 6 + WINDOWS


def test_only_who_has_the_key_has_a_language_model_play(asked):
    wanted = {"mode": "openai", "task_id": TASK, "episodes": 1}
    with running("--api-key", "sesame") as url, client(url) as http:
        assert http.get("/baseline", params=wanted).status_code == 401
        other = {"Authorization": "Bearer other"}
        assert http.get("/baseline", params=wanted, headers=other).status_code == 401
        assert not asked.requests
        http.headers["Authorization"] = "Bearer sesame"
        first = ok(http.get("/baseline", params=wanted))
        assert len(asked.requests) == WINDOWS
        assert ok(http.get("/baseline", params=wanted)) == first
        assert len(asked.requests) == WINDOWS


def test_without_a_key_of_the_service_nobody_has(server_url):
    with client(server_url) as http:
        refused = http.get("/baseline", params={"mode": "openai", "task_id": TASK})
        assert refused.status_code == 403
        assert "--api-key" in refused.json()["detail"]
