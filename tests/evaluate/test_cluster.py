"""Jobs come out alike on a Ray cluster of two nodes, also if one of them goes in the middle."""

from __future__ import annotations

import socket
import sys

import numpy as np
import pytest

from evaluate import evaluate
from evaluate.jobs import Job, Setting, play_job
from evaluate.runners import play_jobs
from evaluate.scores import read_scores
from llmserve_env.errors import InputError

SETTING = Setting(task="static_workload")
JOBS = [
    Job(agent, SETTING, tuple(range(low, low + 5))) for agent in ("random", "aimd") for low in range(0, 30, 5)
]


@pytest.fixture(scope="module")
def cluster():
    """Two nodes, here, of a CPU each; the last test that plays takes one away."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "include_log_monitor": False}
    made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    made.add_node(**node)
    made.wait_for_nodes()
    yield made
    made.shutdown()


def test_two_nodes_give_what_one_process_gives(cluster, tmp_path, capsys):
    given = {"agent": "random", "task": "static_workload", "jobs": 1, "first_seed": 0, "other_seeds": True}
    here, there = tmp_path / "here", tmp_path / "there"
    evaluate.main(evaluate.Arguments(**given, episodes=60, out=here))
    evaluate.main(evaluate.Arguments(**given, episodes=10, out=there))
    evaluate.main(evaluate.Arguments(**given, episodes=60, out=there, ray=cluster.address))
    assert "played 5 jobs on 2 nodes" in capsys.readouterr().err
    (path,) = here.rglob("random.json")
    found = [read_scores(folder / path.relative_to(here)) for folder in (here, there)]
    assert found[0].model_dump(exclude={"made_by"}) == found[1].model_dump(exclude={"made_by"})


def test_what_a_job_cannot_play_is_told_from_a_node(cluster):
    with pytest.raises(InputError, match="nonesuch"):
        list(play_jobs([Job("nonesuch", SETTING, (1,))], 1, cluster.address))


def test_a_node_that_goes_takes_no_job_with_it(cluster):
    found = {}
    for job, played in play_jobs(JOBS, 1, cluster.address):
        if not found:
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        found[job] = played
    assert set(found) == set(JOBS)
    for job, played in found.items():
        serial = play_job(job)
        np.testing.assert_array_equal(played.scores, serial.scores)
        np.testing.assert_array_equal(played.components, serial.components)
        np.testing.assert_array_equal(played.requests, serial.requests)


def test_a_cluster_that_is_not_there_is_told(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(InputError, match=f"no Ray cluster at '{address}'"):
        list(play_jobs(JOBS, 1, address))
    with pytest.raises(InputError, match="expected local, auto or HOST:PORT, found 'nonesuch'"):
        list(play_jobs(JOBS, 1, "nonesuch"))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match="pip install ray"):
        list(play_jobs(JOBS, 1, "local"))
