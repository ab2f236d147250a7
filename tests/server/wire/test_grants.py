"""A control that a task does not grant stays as it starts at every entrance of the service."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest

from llmserve_env import grade
from llmserve_env.client import RemoteSession
from llmserve_env.controls import CONTROLS, to_array
from llmserve_env.envs.remote_env import LLMServeRemoteEnv
from llmserve_env.envs.tool_env import ServeToolEnv
from llmserve_env.errors import InputError
from llmserve_env.schema import ServeAction
from llmserve_env.session import RemoteEpisode
from llmserve_env.tasks import list_tasks
from server.environment import ServeEnvironment
from server.messages.models import ServiceAction
from server.service import Service
from server.settings import Settings
from tests.contract.episodes import beyond, kept, played, short
from tests.server._playing import ask, client, ok, open_ws

SEED = 11
WINDOWS = 2
TASKS = {task_id: short(task_id, WINDOWS) for task_id in list_tasks()}


def begin(task):
    return {"task_id": task.id, "seed": SEED, "horizon_s": task.horizon_s}


def in_full(answer):
    """What a tool says of an action, which leaves out what is None."""
    nothing = dict.fromkeys(CONTROLS)
    return {"not_applied": answer["not_applied"], "action": {**nothing, **answer["config_in_force"]}}


def by_step(url, task, action):
    with client(url) as http:
        ok(http.post("/reset", json=begin(task)))
        seen = [ok(http.post("/step", json={"action": action})) for _ in range(WINDOWS)]
        return [each["metadata"] for each in seen], ok(http.get("/log")), ok(http.post("/grader"))


def by_step_n(url, task, action):
    with client(url) as http:
        ok(http.post("/reset", json=begin(task)))
        steps = ok(http.post("/step_n", json={"actions": [action] * WINDOWS}))["steps"]
        told = [each["observation"]["metadata"] for each in steps]
        return told, ok(http.get("/log")), ok(http.post("/grader"))


def by_websocket(url, task, action):
    with open_ws(url) as ws:
        ask(ws, "reset", begin(task))
        seen = [ask(ws, "step", action)["data"], ask(ws, "step_n", {"actions": [action]})["data"]["steps"][0]]
        told = [each["observation"]["metadata"] for each in seen]
        return told, ask(ws, "log")["data"], ask(ws, "grade")["data"]


def by_mcp(url, task, action):
    with client(url) as http:

        def rpc(method, **params):
            return ok(http.post("/mcp", json={"jsonrpc": "2.0", "id": 1, "method": method, "params": params}))

        session = rpc("openenv/session/create")["result"]["session_id"]

        def call(name, **arguments):
            told = rpc("tools/call", name=name, arguments=arguments, session_id=session)
            return json.loads(told["result"]["data"])

        call("start_episode", **begin(task))
        answers = [call("set_serving_config", **action) for _ in range(WINDOWS)]
        told = [in_full(each) for each in answers]
        named = {"X-Session-Id": session}
        return told, ok(http.get("/log", headers=named)), ok(http.post("/grader", headers=named))


def by_remote_tools(url, task, action):
    session = RemoteSession(url)
    env = ServeToolEnv(session)
    env.reset(**begin(task))
    answers = [json.loads(env.set_serving_config(**action)) for _ in range(WINDOWS)]
    told = [in_full(each) for each in answers]
    log, result = session.log(), session.grade()
    session.close()
    return told, log.model_dump(mode="json"), result.model_dump(mode="json")


def by_remote_episode(url, task, action):
    episode = RemoteEpisode(task, RemoteSession(url))
    episode.reset(SEED)
    told = [episode.step(ServeAction(**action)).metadata for _ in range(WINDOWS)]
    log, result = episode.log(), episode.grade()
    episode.close()
    return told, log.model_dump(mode="json"), result.model_dump(mode="json")


def by_remote_environment(url, task, action):
    env = LLMServeRemoteEnv(url, task.id, horizon_s=task.horizon_s)
    env.reset(seed=SEED)
    told = [env.step(to_array([ServeAction(**action)])[0])[-1] for _ in range(WINDOWS)]
    for info in told:  # numbers there, and None on the wire
        info["action"] = ServeAction(**info["action"]).model_dump(mode="json")
    log, result = env.log(), env.grade()
    env.close()
    return told, log.model_dump(mode="json"), result.model_dump(mode="json")


def by_openenv(url, task, action):
    async def play():
        env = ServeEnvironment(Service(Settings()))
        await env.reset_async(**begin(task))
        seen = [await env.step_async(ServiceAction(**action)) for _ in range(WINDOWS)]
        log = env.session.log()
        env.close()
        return [each.metadata for each in seen], log.model_dump(mode="json"), None

    return asyncio.run(play())


ENTRANCES = [
    by_step,
    by_step_n,
    by_websocket,
    by_mcp,
    by_remote_tools,
    by_remote_episode,
    by_remote_environment,
    by_openenv,
]


@pytest.mark.parametrize("play", ENTRANCES)
@pytest.mark.parametrize("task_id", TASKS)
def test_it_stays_as_it_starts_and_is_named(server_url, play, task_id):
    task = TASKS[task_id]
    asked, in_force = beyond(task, batch_cap=64)
    told, log, result = play(server_url, task, asked.model_dump(mode="json"))
    honest = played(task, SEED, to_array([in_force] * WINDOWS)).log()
    assert [set(each["not_applied"]) for each in told] == [set(kept(task))] * WINDOWS
    assert [each["action"] for each in told] == [in_force.model_dump(mode="json")] * WINDOWS
    assert log == honest.model_dump(mode="json")
    assert result in (grade(honest).model_dump(mode="json"), None)


@pytest.mark.parametrize("task_id", TASKS)
def test_a_posted_log_that_sets_it_is_refused(server_url, task_id):
    task = TASKS[task_id]
    asked, in_force = beyond(task)
    log = played(task, SEED, to_array([in_force] * WINDOWS)).log().model_dump(mode="json")
    log["actions"][1] = asked.model_dump(mode="json")
    name = next(name for name in CONTROLS if name in kept(task))
    with client(server_url) as http, open_ws(server_url) as ws:
        answer = http.post("/grader", json={"episode_log": log})
        assert answer.status_code == 422
        for text in (answer.text, ask(ws, "grade", {"episode_log": log})["data"]["message"]):
            assert "actions[1]" in text
            assert name in text
            assert "does not grant" in text


@pytest.mark.parametrize("play", [by_remote_environment, by_remote_episode])
def test_a_code_out_of_its_range_is_refused_before_it_is_sent(server_url, play):
    record = to_array([ServeAction()])
    record["kv_budget_fraction"] = np.nan
    task = TASKS["static_workload"]
    if play is by_remote_environment:
        env = LLMServeRemoteEnv(server_url, task.id)
        env.reset(seed=1)
        with pytest.raises(InputError, match="kv_budget_fraction"):
            env.step(record[0])
        env.close()
        return
    episode = RemoteEpisode(task, RemoteSession(server_url))
    episode.reset(SEED)
    with pytest.raises(InputError, match="kv_budget_fraction"):
        episode.batch.step(record)
    episode.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_cap": None},
        {"batch_cap": 8.5},
        {"speculation_depth": 9},
        {"quantization_tier": "FP8"},
        {"admission_rate": 0},
        {"kv_budget_fraction": "much"},
        {"clock_mhz": 1},
    ],
    ids=str,
)
def test_what_is_no_value_is_refused_alike(server_url, wrong):
    task, (name,) = TASKS["static_workload"], wrong
    action = {**ServeAction().model_dump(mode="json"), **wrong}
    with client(server_url) as http, open_ws(server_url) as ws:
        ok(http.post("/reset", json=begin(task)))
        ask(ws, "reset", begin(task))
        for path, body in (("/step", {"action": action}), ("/step_n", {"actions": [action]})):
            answer = http.post(path, json=body)
            assert (answer.status_code, name in answer.text) == (422, True)
        for kind, data in (("step", action), ("step_n", {"actions": [action]})):
            answer = ask(ws, kind, data)
            assert (answer["type"], answer["data"]["status"], name in str(answer["data"])) == (
                "error",
                422,
                True,
            )
        assert ok(http.get("/state"))["step_count"] == 0
    env = ServeToolEnv()
    env.reset(**begin(task))
    assert name in str(json.loads(env.set_serving_config(**action))["error"])
    assert not env.score
