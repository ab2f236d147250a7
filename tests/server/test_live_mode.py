"""A service whose requests a real endpoint serves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from llmserve_env.agents import load_agent
from llmserve_env.client import RemoteSession
from llmserve_env.grading import grade
from llmserve_env.live.settings import EndpointSettings
from llmserve_env.play import play_batch
from llmserve_env.schema import EpisodeLog, ServeAction
from llmserve_env.session import RemoteEpisode
from llmserve_env.tasks import load_task
from server.messages.refusals import AtCapacity
from server.messages.requests import ResetRequest
from server.service import Service
from server.settings import Settings
from tests.live.endpoint_server import CompletionEndpoint, serving
from tests.server._playing import ask, client, open_ws
from tests.server.conftest import running


def test_an_episode_is_served_by_the_endpoint():
    endpoint = CompletionEndpoint()
    with serving(endpoint) as url:
        options = ["--mode", "real", "--endpoint.base-url", url, "--endpoint.model", "m"]
        with running(*options, "--endpoint.precision", "FP16") as here, client(here) as http:
            task = {"task_id": "static_workload", "seed": 1, "horizon_s": 2.0}
            assert http.post("/reset", json=task).status_code == 200
            assert not endpoint.requests
            steps = [http.post("/step", json={"action": {"batch_cap": 4}}).json() for _ in range(2)]
            log = EpisodeLog.model_validate(http.get("/log").json())
    told = steps[-1]["observation"]["metadata"]["live"]
    assert told["endpoint"] == url
    assert told["failures"] == {}
    assert [step["done"] for step in steps] == [False, True]
    assert endpoint.requests
    assert endpoint.peak <= 4
    assert log.live
    result = grade(log)
    assert not result.verified
    assert result.components["quality"] > 0


@pytest.fixture(scope="module")
def live_url():
    """The URL of a service before an endpoint."""
    with serving(CompletionEndpoint()) as url:
        options = ["--mode", "real", "--endpoint.base-url", url, "--endpoint.model", "m"]
        with running(*options) as here:
            yield here


def test_an_agent_plays_it_over_a_session(live_url):
    task = load_task("static_workload", horizon_s=2.0)
    episode = RemoteEpisode(task, RemoteSession(live_url))
    batch = play_batch(load_agent("reactive", task), episode.batch, [1])
    log = episode.log()
    episode.close()
    assert batch.info()["live"]["failures"] == {}
    assert (log.live, len(log.actions)) == (True, 2)
    assert log.score == batch.info()["score"]


def test_live_windows_wait_in_no_thread_that_others_need():
    """With as many sessions as there may be, and not one thread of the pool of all free."""

    async def main(url):
        settings = Settings(mode="real", endpoint=EndpointSettings(url, "m"), max_live_sessions=3)
        service = Service(settings)
        blocked = threading.Event()
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        waiting = loop.run_in_executor(None, blocked.wait)
        sessions = [service.sessions.open() for _ in range(3)]
        try:
            with pytest.raises(AtCapacity):
                service.sessions.open()
            asked = ResetRequest(task_id="static_workload", horizon_s=1.0)
            await asyncio.gather(*(service.reset(each, asked) for each in sessions))
            played = await asyncio.gather(*(service.step(each, [ServeAction()]) for each in sessions))
            return [[each.done for each in steps] for steps in played]
        finally:
            blocked.set()
            await waiting
            for session in sessions:
                service.sessions.close(session)

    with serving(CompletionEndpoint()) as url:
        assert asyncio.run(main(url)) == 3 * [[True]]


def test_a_client_that_hangs_up_has_no_further_windows_served(live_url):
    with client(live_url) as http:
        begun = http.post("/reset", json={"task_id": "static_workload", "seed": 1})
        named = {"X-Session-Id": begun.headers["x-session-id"]}
        with contextlib.suppress(httpx.ReadTimeout):
            httpx.post(f"{live_url}/step_n", json={"actions": [{}] * 200}, headers=named, timeout=0.5)
        assert http.post("/step", json={"action": {}}).status_code == 200  # once the session is free
        assert http.get("/state").json()["step_count"] < 100


def test_so_has_one_that_closes_its_websocket(live_url):
    with client(live_url) as http:
        begun = http.post("/reset", json={"task_id": "static_workload", "seed": 1})
        named = begun.headers["x-session-id"]
        with open_ws(live_url, named) as ws:
            assert ask(ws, "step", {})["type"] == "observation"
            ws.send(json.dumps({"type": "step_n", "data": {"actions": [{}] * 200}}))
        assert http.post("/step", json={"action": {}}).status_code == 200  # once the session is free
        assert http.get("/state").json()["step_count"] < 100
