"""Episodes in which nothing arrives: silence is traffic, too, and no error in the middle of a training."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve_env.controls import to_array
from llmserve_env.episode import EpisodeBatch
from llmserve_env.errors import InputError
from llmserve_env.tasks import load_task
from llmserve_env.workloads import open_workload
from llmserve_env.workloads.sources import GENERATORS

SPARSE = [f"{name}://?rate=0.02" for name in GENERATORS if name != "servegen"]
TABLE = "client,window_start_s,rate_rps,cv,pattern,shape,scale\n" + "".join(
    f"0,{start},2.0,1.0,Gamma,0.7,0.7\n" for start in (0, 600, 4200)
)
TRACE = "arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{at},10,5\n" for at in (0, 1, 900, 901))


def played(source, seeds) -> list[int]:
    """Requests of each episode, one after the other in one batch."""
    task = load_task("static_workload", workload=source, horizon_s=10.0)
    batch, action = EpisodeBatch(task), to_array([task.start])
    found = []
    for seed in seeds:
        batch.reset([seed])
        while not batch.over[0]:
            step = batch.step(action)
            assert np.isfinite(step.observations).all()
        assert 0 <= batch.scores[0] <= 1
        found.append(len(task.requests(seed)))
    return found


@pytest.mark.parametrize("source", SPARSE)
def test_every_generator_gives_episodes_when_it_is_silent(source):
    counts = played(source, range(12))
    assert 0 in counts


def test_a_gap_of_a_servegen_table_is_silence(tmp_path):
    path = tmp_path / "clients.csv"
    path.write_text(TABLE)
    counts = played(f"servegen://{path}", range(12))
    assert 0 in counts
    assert max(counts) > 5


@pytest.mark.parametrize("query", ["", "?overlay=1", "?scale=0.5", "?jitter=3"])
def test_a_gap_of_a_trace_is_silence(tmp_path, query):
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    assert 0 in played(f"trace://{path}{query}", range(12))


def test_who_asks_for_a_workload_is_told_that_nothing_arrives():
    with pytest.raises(InputError, match="no request arrives in 1 s"):
        open_workload("poisson://?rate=0.0001&duration=1")
