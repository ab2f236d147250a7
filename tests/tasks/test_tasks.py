"""Tasks: what is shipped loads, files of one's own too, and what cannot be is refused by file and field."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from llmserve_env.actions import to_array
from llmserve_env.episode import Episode, EpisodeBatch
from llmserve_env.errors import InputError
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import EVALUATION_SEEDS, TRAINING_SEEDS, list_tasks, load_task
from llmserve_env.tasks import task as task_module

FOLDER = Path(task_module.__file__).parent
MINE = """
id = "mine"
title = "Chat"
difficulty = "easy"
description = "For these tests."
window_s = 1.0
horizon_s = 300.0

[cell]
profile = "rtxpro6000-llama-3.1-8b"

[controls]
batch_cap = [8, 64, 512]

[workload.tenants.chat]
slo = "mlperf-llama-3.1-8b-interactive"
shape = 0.87

[[workload.regimes]]
name = "only"
dwell_s = [40, 80]
rates = { chat = 5.0 }

[reward]
goodput = 0.6
latency = 0.15
memory = 0.05
cost = 0.05
quality = 0.15
acceptable_quality = 0.95
"""


def requests_of(workload):
    names = ("arrival_s", "prompt_tokens", "output_tokens", "tenant")
    return [getattr(workload, name).tolist() for name in names]


# What is shipped


def test_the_five_tasks_are_there():
    assert list_tasks() == (
        "adversarial_multitenant", "bursty_workload", "death_spiral", "static_workload", "trace_replay",
    )  # fmt: skip


@pytest.mark.parametrize("task_id", list_tasks())
def test_a_shipped_task_loads(task_id):
    task = load_task(task_id)
    assert task.id == task_id
    assert task.title
    assert task.description
    assert task.windows * task.window_s == pytest.approx(task.horizon_s)
    assert task.windows >= 60
    assert task.start == ServeAction(), "vLLM's defaults"
    assert task.profile.tier("FP16") is not None
    assert task.quality[0] == 1.0
    assert all(0 <= quality <= 1 for quality in task.quality)
    assert len(task.tenants) >= 1
    assert set(task.controls) >= {"batch_cap", "kv_budget_fraction"}
    missing = EpisodeBatch(task)
    missing.reset([0])
    assert missing.backend.not_applied(task.start) == {}


@pytest.mark.parametrize("task_id", list_tasks())
def test_the_levels_of_a_shipped_task_can_all_be_applied(task_id):
    task = load_task(task_id)
    task = load_task(task_id, engines=max(task.cell.engines, 2))  # one engine cannot be split
    batch = EpisodeBatch(task)
    batch.reset([0])
    for name, values in task.controls.items():
        for value in values:
            assert batch.backend.not_applied(ServeAction(**{name: value})) == {}, (name, value)


@pytest.mark.parametrize("task_id", list_tasks())
def test_a_seed_fixes_the_requests(task_id):
    task = load_task(task_id)
    first = task.requests(3)
    assert requests_of(first) == requests_of(load_task(task_id).requests(3))
    assert len(first) > 100
    assert first.tenants == task.tenants
    assert first.arrival_s[0] >= 0
    assert first.arrival_s[-1] < task.horizon_s
    drawn = [task.requests(seed).arrival_s.tobytes() for seed in (0, 1, 2, 3, EVALUATION_SEEDS[0])]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("task_id", list_tasks())
def test_a_shorter_episode_is_the_start_of_a_longer_one(task_id):
    task = load_task(task_id)
    part = load_task(task_id, horizon_s=task.window_s * 20)
    whole, start = task.requests(5), part.requests(5)
    inside = whole.take(np.flatnonzero(whole.arrival_s < part.horizon_s))
    assert requests_of(start) == requests_of(inside)


def test_evaluation_seeds_are_no_training_seeds():
    assert TRAINING_SEEDS.stop <= EVALUATION_SEEDS.start
    assert not set(TRAINING_SEEDS[-3:]) & set(EVALUATION_SEEDS[:3])
    assert len(EVALUATION_SEEDS) == len(TRAINING_SEEDS) == 2**31


# Changes


def test_fields_can_be_replaced():
    task = load_task(
        "static_workload", engines=3, profile="h100-llama-3.1-8b", window_s=2.0, horizon_s=10.0,
        workload="gamma://?rate=3", max_in_flight=50, controls={"batch_cap": [8, 64]},
    )  # fmt: skip
    assert (task.cell.engines, task.cell.profile, task.windows) == (3, "h100-llama-3.1-8b", 5)
    assert task.grid.nvec.tolist() == [2, 1, 1, 1, 1, 1, 1]
    assert task.max_in_flight == 50
    assert task.requests(1).duration_s < 10
    assert load_task("static_workload").cell.engines == 1, "the shipped one stays as it is"


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"horizon_s": 1.5}, None, "whole number of windows, 1 to 1,000,000, it is 1.5"),
        ({"horizon_s": 0.0}, "horizon_s", "greater than 0"),
        ({"horizon_s": float("nan")}, "horizon_s", "less than or equal to 1000000"),
        ({"window_s": -1.0}, "window_s", "greater than or equal to 0.001"),
        ({"window_s": "long"}, "window_s", "number"),
        ({"engines": 0}, "cell.engines", "greater than or equal to 1"),
        ({"engines": 65}, "cell.engines", "less than or equal to 64"),
        ({"profile": "h9000"}, "profile", "rtx4090-llama-3.1-8b"),
        ({"workload": "nothing://"}, None, "expected one of"),
        ({"workload": "gamma://?rate=-1"}, "rate", "> 0"),
        ({"workload": {}}, "tenants", "missing"),
        ({"workload": "absent.csv"}, None, "absent.csv"),
        ({"max_in_flight": 0}, "max_in_flight", "1"),
        ({"start": {"batch_cap": 0}}, "start.batch_cap", "1"),
        ({"controls": {"turbo": [1]}}, None, "expected some of batch_cap"),
        ({"controls": {"batch_cap": [0]}}, "batch_cap", "not a value"),
        ({"controls": {"batch_cap": []}}, "batch_cap", "expected values"),
        ({"bonus": 1}, "bonus", "not permitted"),
        ({"difficulty": "extreme"}, "difficulty", "easy"),
        ({"id": "../x"}, "id", "pattern"),
    ],
)
def test_changes_that_cannot_be_are_refused(changes, field, reason):
    with pytest.raises(InputError, match=re.escape(reason)) as refused:
        load_task("static_workload", **changes)
    assert refused.value.field == field
    assert refused.value.file is not None


@pytest.mark.parametrize("name", ["no_such_task", "", "static_workload.json", "../tasks/static_workload"])
def test_an_unknown_id_is_refused_with_the_known_ones(name):
    with pytest.raises(InputError, match="static_workload, trace_replay") as refused:
        load_task(name)
    assert refused.value.field == "task_id"


# Files


def test_a_task_file_of_ones_own_plays(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(MINE, encoding="utf-8")
    for source in (path, str(path)):
        task = load_task(source, horizon_s=3.0)
        assert task.id == "mine"
        episode = Episode(task)
        episode.reset(0)
        while not episode.done:
            observation = episode.step(ServeAction())
        assert (observation.task_id, observation.step_index) == ("mine", 3)


def test_a_copy_of_a_shipped_file_is_the_shipped_task(tmp_path):
    for task_id in list_tasks():
        path = shutil.copy(FOLDER / f"{task_id}.toml", tmp_path)
        assert load_task(path) == load_task(task_id)


@pytest.mark.parametrize(
    ("old", "new", "field", "reason"),
    [
        ("window_s = 1.0", "window_s = 0", "window_s", "greater than or equal to 0.001"),
        ("window_s = 1.0", "window_s = ", None, "line"),
        ("window_s = 1.0", "", "window_s", "required"),
        ("horizon_s = 300.0", "horizon_s = 300.5", None, "whole number of windows"),
        ('difficulty = "easy"', "difficulty = 3", "difficulty", "string"),
        ('profile = "rtxpro6000-llama-3.1-8b"', 'profile = "gone.toml"', None, "gone.toml"),
        ('profile = "rtxpro6000-llama-3.1-8b"', "", "cell.profile", "required"),
        ("[cell]", "[cell]\ngpus = 3", "cell.gpus", "not permitted"),
        ("goodput = 0.6", "goodput = 0.7", "reward", "sum to 1"),
        ("goodput = 0.6", "goodput = -0.6", "reward.goodput", "greater than or equal to 0"),
        ("acceptable_quality = 0.95", "acceptable_quality = 1.0", "reward.acceptable_quality", "less than 1"),
        ("[8, 64, 512]", "[8, 16, 1024]", "batch_cap", "1024"),
        ("[8, 64, 512]", "[16, 8]", "batch_cap", "ascending"),
        ("[8, 64, 512]", "8", "controls.batch_cap", "list"),
        ("[controls]", "[controls]\nturbo = [1]", None, "turbo"),
        ('slo = "mlperf-llama-3.1-8b-interactive"', 'slo = "none"', "tenants.chat.slo", "expected one of"),
        ("shape = 0.87", "shape = 0", "tenants.chat.shape", "0.01"),
    ],
)
def test_a_fault_in_a_file_is_refused_by_file_and_field(tmp_path, old, new, field, reason):
    assert old in MINE
    path = tmp_path / "mine.toml"
    path.write_text(MINE.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(reason)) as refused:
        load_task(path)
    assert refused.value.field == field
    assert refused.value.file in (str(path), "gone.toml")


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "absent.toml", tmp_path / "bytes.toml"):
        with pytest.raises(InputError, match=f"{path.name}: cannot be read"):
            load_task(path)


# Replays of traces

TRACE = "traces/AzureLLMInferenceTrace_conv.csv"


@pytest.mark.needs_shared
def test_a_seed_draws_where_in_a_trace_an_episode_begins(shared_data):
    path = shared_data / TRACE
    task = load_task("trace_replay", workload=f"trace://{path}?scale=1.5&tenants=premium-standard")
    parts = [task.requests(seed) for seed in range(6)]
    assert requests_of(parts[2]) == requests_of(task.requests(2))
    assert len({part.arrival_s.tobytes() for part in parts}) == 6
    assert all(2500 < len(part) < 8000 for part in parts)
    assert all(part.arrival_s[0] >= 0 and part.arrival_s[-1] < task.horizon_s for part in parts)
    whole = load_task("trace_replay", workload=task.workload, horizon_s=3600.0).requests(0)
    assert len(whole) == 19366, "a longer episode than the trace begins where it does"
    pairs = list(zip(whole.prompt_tokens.tolist(), whole.output_tokens.tolist(), strict=True))
    for part in parts:
        mine = list(zip(part.prompt_tokens.tolist(), part.output_tokens.tolist(), strict=True))
        starts = [k for k in range(len(pairs)) if pairs[k : k + 5] == mine[:5]]
        assert any(pairs[k : k + len(mine)] == mine for k in starts), (
            "a stretch of the trace, nothing left out"
        )
    batch = EpisodeBatch(task)
    batch.reset([0])
    batch.step(to_array([task.start]))
    assert batch.requests[0, 0] > 0


@pytest.mark.parametrize("suffix", ["", "?scale=2"])
def test_a_trace_shorter_than_an_episode_is_played_whole(tmp_path, suffix):
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0.5,100,10\n1.5,200,20\n", encoding="utf-8")
    task = load_task("trace_replay", workload=f"trace://{path}{suffix}", horizon_s=10.0)
    factor = 2 if suffix else 1
    for seed in range(3):
        assert task.requests(seed).arrival_s.tolist() == [0.5 / factor, 1.5 / factor]


def test_a_generator_is_drawn_anew_for_each_seed_whatever_seed_its_address_names():
    task = load_task("trace_replay", workload="poisson://?rate=4&seed=3", horizon_s=50.0)
    assert requests_of(task.requests(1)) != requests_of(task.requests(2))
    assert requests_of(task.requests(1)) == requests_of(task.requests(1))
    assert task.requests(1).duration_s < 50


def test_what_arrives_after_the_horizon_is_left_out():
    task = load_task("trace_replay", workload="poisson://?rate=4&duration=500", horizon_s=50.0)
    assert 40 < task.requests(1).duration_s < 50
    task = load_task("trace_replay", workload="poisson://?rate=4&duration=20", horizon_s=50.0)
    assert task.requests(1).duration_s < 20
