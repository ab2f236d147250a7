"""A service whose requests a real endpoint serves."""

from __future__ import annotations

from llmserve_env.grading import grade
from llmserve_env.schema import EpisodeLog
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
