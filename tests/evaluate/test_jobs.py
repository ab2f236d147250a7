"""Settings change what they say, and jobs come out alike wherever they are played."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from evaluate.jobs import Job, Setting, play_job
from evaluate.runners import play_jobs
from llmserve_env.agents import load_agent, play
from llmserve_env.errors import InputError
from llmserve_env.tasks import EVALUATION_SEEDS, load_task


@pytest.mark.parametrize("task", ["bursty_workload", "trace_replay"])
def test_load_is_a_factor_on_the_arrivals(task):
    counts = {
        load: sum(len(Setting(task=task, load=load).open().requests(seed)) for seed in range(5))
        for load in (0.5, 1.0, 2.0)
    }
    assert counts[1.0] == sum(len(load_task(task).requests(seed)) for seed in range(5))
    assert counts[0.5] == pytest.approx(counts[1.0] / 2, rel=0.1)
    assert counts[2.0] == pytest.approx(counts[1.0] * 2, rel=0.1)


def test_load_scales_a_workload_that_is_given(tmp_path):
    uri = "poisson://?rate=3&lengths=fixed:100,10"
    task = Setting(task="static_workload", workload=uri, load=2.0).open()
    assert len(task.requests(0)) == pytest.approx(6 * task.horizon_s, rel=0.1)
    with pytest.raises(InputError, match="with a rate") as caught:
        Setting(task="static_workload", workload="poisson://", load=2.0).open()
    assert caught.value.field == "load"


def test_profile_takes_the_place_of_the_tasks():
    task = Setting(task="static_workload", profile="a100-llama-3.1-8b").open()
    assert task.profile.name == "a100-llama-3.1-8b" != load_task("static_workload").profile.name


@pytest.mark.parametrize("load", [0.4, 2.1, float("nan")])
def test_loads_out_of_range_are_refused(load):
    with pytest.raises(ValidationError):
        Setting(task="static_workload", load=load)


def test_processes_change_nothing():
    seeds = EVALUATION_SEEDS[:4]
    setting = Setting(task="static_workload", load=1.5)
    jobs = [
        Job(agent, setting, tuple(part))
        for agent in ("random", "reactive")
        for part in (seeds[:2], seeds[2:])
    ]
    there = dict(play_jobs(jobs, 2))
    assert set(there) == set(jobs)
    for job in jobs:
        here = play_job(job)
        straight = play(load_agent(job.agent, setting.open()), setting.open(), job.seeds)
        for played in (here, straight):
            np.testing.assert_array_equal(there[job].scores, played.scores)
            np.testing.assert_array_equal(there[job].components, played.components)
            np.testing.assert_array_equal(there[job].requests, played.requests)


def test_what_a_job_cannot_play_is_told_from_other_processes():
    jobs = [Job("nonesuch", Setting(task="static_workload"), (seed,)) for seed in range(2)]
    with pytest.raises(InputError, match="nonesuch"):
        list(play_jobs(jobs, 2))


def test_no_process_outlives_the_one_that_gave_it_work():
    code = """
from evaluate.jobs import Job, Setting
from evaluate.runners import play_jobs
jobs = [Job("random", Setting(task="static_workload"), (seed,)) for seed in range(5000)]
for _ in play_jobs(jobs, 2):
    print("played", flush=True)
"""
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=root) as parent:
        assert parent.stdout.readline() == b"played\n"
        parent.terminate()
        parent.communicate(timeout=60)  # the others hold its output open as long as they live
