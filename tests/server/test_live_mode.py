"""A service whose requests a real endpoint serves."""

from __future__ import annotations

from llmserve_env.agents import load_agent
from llmserve_env.client import RemoteSession
from llmserve_env.grading import grade
from llmserve_env.play import play_batch
from llmserve_env.schema import EpisodeLog
from llmserve_env.session import RemoteEpisode
from llmserve_env.tasks import load_task
from tests.live.endpoint_server import CompletionEndpoint, serving
from tests.server._playing import client
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


def test_an_agent_plays_it_over_a_session():
    task = load_task("static_workload", horizon_s=2.0)
    with serving(CompletionEndpoint()) as url:
        options = ["--mode", "real", "--endpoint.base-url", url, "--endpoint.model", "m"]
        with running(*options) as here:
            episode = RemoteEpisode(task, RemoteSession(here))
            batch = play_batch(load_agent("reactive", task), episode.batch, [1])
            log = episode.log()
            episode.close()
    assert batch.info()["live"]["failures"] == {}
    assert (log.live, len(log.actions)) == (True, 2)
    assert log.score == batch.info()["score"]
