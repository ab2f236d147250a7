"""The guard: what clients sent costs them their request, and nobody else anything."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace

import pytest

from llmserve_env import load_task
from llmserve_env.errors import InputError
from server.guard import Guard
from server.messages.refusals import AtCapacity
from server.settings import Settings
from tests.server._playing import ACTIONS, BEGIN, ask, bare, client, local, ok, open_ws

SCENARIO = {
    "order": "shuffled",
    "tenants": {
        "chat": {"slo": "mlperf-llama-3.1-8b-interactive", "weight": 3.0, "lengths": "azure-conv"},
        "batch": {"slo": "mlperf-llama-3.1-8b-server", "lengths": "fixed:512,64"},
    },
    "regimes": [{"name": "calm", "dwell_s": [60, 60], "rates": {"chat": 2.0, "batch": 1.0}}],
}


@pytest.fixture(scope="module")
def guard():
    guard = Guard(Settings(guard_timeout_s=60.0, guard_memory_gb=0.5, guard_queue=2))
    yield guard
    guard.close()


def nested(levels: int) -> list:
    found: list = []
    for _ in range(levels):
        found = [found]
    return found


def test_it_gives_results_and_errors_whole(guard):
    assert asyncio.run(guard.run(abs, -1)) == 1
    with pytest.raises(InputError) as refused:
        asyncio.run(guard.run(load_task, "static_workload", horizon_s="long"))
    with pytest.raises(InputError) as here:
        load_task("static_workload", horizon_s="long")
    assert str(refused.value) == str(here.value)
    assert refused.value.field == here.value.field == "horizon_s"


@pytest.mark.parametrize(
    ("function", "argument", "said"),
    [
        (bytearray, 2 * 10**9, "more than the 0.5 GB"),
        (os._exit, 1, "more than the 0.5 GB"),  # as when the system kills it
        (len, nested(100_000), "nested too deeply"),
    ],
)
def test_what_goes_past_a_bound_is_refused_and_the_next_is_served(guard, function, argument, said):
    with pytest.raises(InputError, match=said):
        asyncio.run(guard.run(function, argument))
    assert asyncio.run(guard.run(abs, -1)) == 1


def test_what_takes_too_long_is_refused_and_the_next_is_served(guard, monkeypatch):
    asyncio.run(guard.start())
    monkeypatch.setattr(guard, "_settings", replace(guard._settings, guard_timeout_s=0.25))
    with pytest.raises(InputError, match=r"longer than the 0\.25 s"):
        asyncio.run(guard.run(time.sleep, 600))
    monkeypatch.undo()
    assert asyncio.run(guard.run(abs, -1)) == 1


def test_who_waits_is_counted(guard):
    async def play() -> None:
        waiting = [asyncio.ensure_future(guard.run(abs, -1)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(AtCapacity):
            await guard.run(abs, -1)
        assert await asyncio.gather(*waiting) == [1, 1]
        assert await guard.run(abs, -1) == 1

    asyncio.run(play())


# On the wire


@pytest.fixture
def http(tight_url):
    with client(tight_url) as http:
        yield http
        http.delete("/session")


@pytest.mark.parametrize(
    "workload",
    [
        "poisson://?rate=4",
        "gamma://?rate=4&shape=0.25&lengths=fixed:128,16",
        "mmpp://?preset=azure-conv&tenants=premium-standard",
        "sessions://?rate=2",
        SCENARIO,
    ],
)
def test_generators_and_scenarios_play(http, workload):
    begun = {"task_id": "static_workload", "seed": 3, "workload": workload, "horizon_s": 10.0}
    ok(http.post("/reset", json=begun))
    done = ok(http.post("/step_n", json={"actions": [{}] * 8}))
    assert done["played"] == 8
    done = ok(http.post("/step_n", json={"actions": [{}] * 8, "every": False}))
    assert (done["played"], done["steps"][0]["done"]) == (2, True)
    grade = ok(http.post("/grader"))
    assert (grade["custom"], grade["verified"], grade["complete"]) == (True, True, True)
    log = ok(http.get("/log"))
    assert ok(http.post("/grader", json={"episode_log": log})) == grade


@pytest.mark.parametrize(
    ("workload", "place"),
    [
        ("trace://README.md", "workload"),
        ("README.md", "workload"),
        ("/etc/passwd", "workload"),
        ("scenario://README.md", "workload"),
        ("servegen://README.md", "workload"),
        ("poisson://README.md?rate=1", "workload"),
        ("poisson://?rate=1&lengths=README.md", "workload"),
        ("poisson://?rate=1&tenants=README.md", "workload"),
        (
            {**SCENARIO, "tenants": {"chat": {**SCENARIO["tenants"]["chat"], "lengths": "README.md"}}},
            "lengths",
        ),
        ("poisson://?rate=1&bogus=1", "bogus"),
        ({"tenants": {}}, ""),
        ({}, ""),
        ("", "workload"),
    ],
)
def test_files_and_what_cannot_be_are_refused(http, workload, place):
    answer = http.post("/reset", json={"task_id": "static_workload", "workload": workload})
    assert answer.status_code == 422, answer.text
    assert place in ".".join(str(part) for part in answer.json()["detail"][0]["loc"])
    assert "root:" not in answer.text


@pytest.mark.parametrize(
    ("begun", "said"),
    [
        ({"workload": "poisson://?rate=20", "horizon_s": 300.0}, "at most 4,000 requests"),
        ({"horizon_s": 1000.0}, "at most 400"),
        ({"workload": "poisson://?rate=1e12"}, "at most 100,000,000 are drawn"),
        ({"workload": "poisson://?rate=300000"}, "that there are"),  # memory, or time
    ],
)
def test_what_is_too_large_is_refused_and_others_play_on(http, tight_url, begun, said):
    with open_ws(tight_url) as ws:
        ask(ws, "reset", BEGIN)
        answer = http.post("/reset", json={"task_id": "static_workload", **begun})
        assert answer.status_code == 422, answer.text
        assert said in answer.json()["detail"][0]["msg"]
        answers = [ask(ws, "step", action)["data"] for action in ACTIONS]
        assert [bare(each) for each in answers] == local()[0][1:]
    ok(http.post("/reset", json={"workload": "poisson://?rate=4", "horizon_s": 10.0}))  # there is a worker


def test_a_log_of_too_much_is_refused(http):
    log = local()[1].model_dump(mode="json")
    endless = {**log["task"], "workload": "poisson://?rate=100000", "horizon_s": 900.0}
    answer = http.post("/grader", json={"episode_log": {**log, "task": endless}})
    assert answer.status_code == 422
    assert "that there are" in answer.json()["detail"][0]["msg"]
    named = {**log["task"], "workload": "trace:///etc/passwd"}
    answer = http.post("/grader", json={"episode_log": {**log, "task": named}})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"][-1] == "workload"
    assert ok(http.post("/grader", json={"episode_log": log}))["score"] == log["score"]
