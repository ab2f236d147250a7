"""Plain HTTP: an episode plays as here, whoever names its session however; what the routes tell."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest

import llmserve_env
from llmserve_env import grade, list_tasks
from llmserve_env.controls import to_array
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import EVALUATION_SEEDS, TRAINING_SEEDS
from tests.of_every_task import FEATURES
from tests.server._playing import ACTIONS, BEGIN, ask, bare, client, local, ok, open_ws


@pytest.fixture
def http(server_url):
    with client(server_url) as http:
        yield http
        http.delete("/session")


def test_an_episode_is_the_one_that_is_played_here(http):
    here, log = local()
    answers = [ok(http.post("/reset", json=BEGIN))]
    answers += [ok(http.post("/step", json={"action": action})) for action in ACTIONS]
    assert [bare(answer) for answer in answers] == here
    assert all(answer["metadata"] == answer["observation"]["metadata"] for answer in answers)
    assert ok(http.get("/log")) == log.model_dump(mode="json")
    assert ok(http.post("/grader")) == grade(log).model_dump(mode="json")
    state = ok(http.get("/state"))
    assert (state["step_count"], state["windows"], state["done"], state["score"]) == (4, 4, True, log.score)


def test_http_and_websocket_play_alike(http, server_url):
    ok(http.post("/reset", json=BEGIN))
    steps = ok(http.post("/step_n", json={"actions": ACTIONS}))
    with open_ws(server_url) as ws:
        ask(ws, "reset", BEGIN)
        there = ask(ws, "step_n", {"actions": ACTIONS})["data"]
        assert (
            [bare(step) for step in steps["steps"]]
            == [bare(step) for step in there["steps"]]
            == local()[0][1:]
        )
        assert ask(ws, "log")["data"]["digests"] == ok(http.get("/log"))["digests"] == local()[1].digests


def test_many_windows_in_a_request_are_those_one_by_one(http):
    here, log = local()
    ok(http.post("/reset", json=BEGIN))
    every = ok(http.post("/step_n", json={"actions": [*ACTIONS, *ACTIONS]}))  # it ends after four
    assert ([bare(step) for step in every["steps"]], every["rewards"], every["played"]) == (
        here[1:],
        log.rewards,
        4,
    )
    ok(http.post("/reset", json=BEGIN))
    last = ok(http.post("/step_n", json={"actions": ACTIONS[:3], "every": False}))
    assert ([bare(step) for step in last["steps"]], last["rewards"], last["played"]) == (
        [here[3]],
        log.rewards[:3],
        3,
    )


def test_features_are_what_gymnasium_agents_see(http):
    env = gym.make("LLMServe-v0", task_id=BEGIN["task_id"], horizon_s=BEGIN["horizon_s"]).unwrapped
    expected = [env.reset(seed=5)[0], env.step(to_array([ServeAction(**ACTIONS[1])])[0])[0]]
    begun = ok(http.post("/reset", json={**BEGIN, "features": True}))
    stepped = ok(http.post("/step", json={"action": ACTIONS[1]}))
    found = [answer["metadata"]["features"] for answer in (begun, stepped)]
    np.testing.assert_array_equal(np.array(found, np.float32), np.array(expected))
    assert len(found[0]) == len(FEATURES)
    assert "features" not in ok(http.post("/reset", json=BEGIN))["metadata"]


def test_the_body_goes_before_the_header_and_the_header_before_the_cookie(server_url):
    with client(server_url) as by_cookie, client(server_url) as other, client(server_url) as third:
        ids = [
            ok(each.post("/reset", json=BEGIN))["metadata"]["session_id"]
            for each in (by_cookie, other, third)
        ]
        assert len(set(ids)) == 3
        played = [
            by_cookie.post("/step", json={"action": {}}),
            by_cookie.post("/step", json={"action": {}}, headers={"X-Session-Id": ids[1]}),
            by_cookie.post(
                "/step", json={"action": {}, "session_id": ids[2]}, headers={"X-Session-Id": ids[1]}
            ),
        ]
        assert [ok(answer)["metadata"]["session_id"] for answer in played] == ids
        assert [answer.headers["X-Session-Id"] for answer in played] == ids
        steps = [ok(each.get("/state"))["step_count"] for each in (by_cookie, other, third)]
        assert steps == [1, 1, 1]


def test_a_client_that_keeps_nothing_gets_a_session_by_each_reset(server_url):
    with client(server_url) as http:
        first = ok(http.post("/reset"))["metadata"]["session_id"]
        assert ok(http.post("/reset"))["metadata"]["session_id"] == first  # by its cookie
        http.cookies.clear()
        assert ok(http.post("/reset"))["metadata"]["session_id"] != first


def test_a_closed_session_is_gone_for_its_client_alone(http, server_url):
    with client(server_url) as other:
        ok(other.post("/reset", json=BEGIN))
        session_id = ok(http.post("/reset", json=BEGIN))["metadata"]["session_id"]
        assert http.delete("/session").status_code == 204
        assert http.get("/state").status_code == 404
        assert ok(http.post("/reset", json=BEGIN))["metadata"]["session_id"] != session_id
        assert ok(other.get("/state"))["step_count"] == 0


def test_the_cookie_is_not_for_scripts_and_not_sent_in_clear_behind_https(server_url):
    with client(server_url) as http:
        plain = http.post("/reset").headers["set-cookie"]
        assert "HttpOnly" in plain
        assert "samesite=lax" in plain.lower()
    with client(server_url) as http:
        behind = http.post("/reset", headers={"X-Forwarded-Proto": "https"}).headers["set-cookie"]
        assert "Secure" in behind
        assert "samesite=none" in behind.lower()
    with client(server_url) as http:
        session_id = ok(http.post("/reset"))["metadata"]["session_id"]
        http.cookies.clear()
        assert "set-cookie" not in http.post("/reset", json={"session_id": session_id}).headers


def test_a_posted_log_gets_the_grade_that_it_has_here(http):
    _, log = local(seed=2**31 + 7)
    found = ok(http.post("/grader", json={"episode_log": log.model_dump(mode="json")}))
    assert found == grade(log).model_dump(mode="json")
    assert (found["held_out"], found["verified"], found["custom"]) == (True, True, True)


def test_what_can_be_played_is_listed(http):
    listed = ok(http.get("/tasks"))
    assert tuple(task["id"] for task in listed["tasks"]) == list_tasks()
    assert listed["default"] in list_tasks()
    ranges = {"training": TRAINING_SEEDS, "evaluation": EVALUATION_SEEDS}
    assert listed["seeds"] == {name: [each.start, each.stop - 1] for name, each in ranges.items()}


def test_openenv_finds_what_it_asks_for(http):
    assert ok(http.get("/health")) == {"status": "healthy"}
    assert ok(http.get("/metadata"))["version"] == llmserve_env.__version__
    assert ok(http.get("/schema")).keys() >= {"action", "observation", "state"}
    assert http.get("/demo").headers["location"] == "web/"
