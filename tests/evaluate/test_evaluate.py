"""Scores in files: of evaluation seeds, resumed, and of nothing but what they say."""

from __future__ import annotations

import json

import numpy as np
import pytest

import evaluate.evaluate as module
from evaluate.evaluate import (
    Arguments,
    agent_labels,
    choose_seeds,
    main,
    measure,
    open_settings,
    table,
)
from evaluate.jobs import Setting
from evaluate.scores import read_scores
from llmserve_env.agents import Shield, load_agent, play
from llmserve_env.agents.policy import Policy, PolicyAgent, PolicyConfig, save_policy, shapes
from llmserve_env.errors import InputError
from llmserve_env.report.stats import interval
from llmserve_env.tasks import EVALUATION_SEEDS, load_task
from tests.of_every_task import FEATURES

STATIC = Setting(task="static_workload")
SEEDS = list(EVALUATION_SEEDS[:23])  # three jobs: they begin at multiples of ten


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C after the first job."""
    whole = module.play_jobs

    def stops(*given):
        yield next(iter(whole(*given)))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "play_jobs", stops)
    return lambda: monkeypatch.setattr(module, "play_jobs", whole)


def content(path):
    found = json.loads(path.read_text())
    return {name: value for name, value in found.items() if name != "made_by"}


def test_scores_are_those_of_the_agent(tmp_path):
    found = measure({"rule": "reactive"}, [STATIC], SEEDS, tmp_path)
    task = load_task("static_workload")
    played = play(load_agent("reactive", task), task, SEEDS)
    scores = found["rule", STATIC]
    assert read_scores(tmp_path / "static_workload" / "rule.json") == scores
    assert scores.of(SEEDS[::-1]).tolist() == played.scores[::-1].tolist()
    assert np.array(list(scores.components.values())).T.tolist() == played.components.tolist()
    assert np.array(list(scores.requests.values())).T.tolist() == played.requests.tolist()
    assert str(interval(played.scores)) in table(found, SEEDS)


def test_what_was_stopped_goes_on_and_comes_out_the_same(tmp_path, interrupted):
    with pytest.raises(KeyboardInterrupt):
        measure({"random": "random"}, [STATIC], SEEDS, tmp_path / "stopped")
    path = tmp_path / "stopped" / "static_workload" / "random.json"
    assert 0 < len(read_scores(path).seeds) < len(SEEDS)
    interrupted()
    measure({"random": "random"}, [STATIC], SEEDS, tmp_path / "stopped")
    measure({"random": "random"}, [STATIC], SEEDS, tmp_path / "straight")
    assert content(path) == content(tmp_path / "straight" / "static_workload" / "random.json")


def test_nothing_is_played_twice(tmp_path, monkeypatch):
    before = measure({"random": "random"}, [STATIC], SEEDS, tmp_path)
    asked = []
    monkeypatch.setattr(module, "play_jobs", lambda jobs, *_: asked.extend(jobs) or [])
    assert measure({"random": "random"}, [STATIC], SEEDS, tmp_path) == before
    assert not asked


def test_scores_of_something_else_are_not_gone_on_with(tmp_path):
    measure({"random": "random"}, [STATIC], SEEDS[:3], tmp_path)
    path = tmp_path / "static_workload" / "random.json"
    with pytest.raises(InputError, match="played with random, not defaults") as caught:
        measure({"random": "defaults"}, [STATIC], SEEDS, tmp_path)
    assert (caught.value.file, caught.value.field) == (str(path), "plays")
    state = json.loads(path.read_text())
    state["scores"][0] += 0.001
    path.write_text(json.dumps(state))
    for seeds in (SEEDS, SEEDS[:3]):  # also where nothing is left to play
        with pytest.raises(InputError, match="the agent or the simulator has changed"):
            measure({"random": "random"}, [STATIC], seeds, tmp_path)
    state["scores"].pop()
    path.write_text(json.dumps(state))
    with pytest.raises(InputError, match="as many entries in every list as seeds"):
        measure({"random": "random"}, [STATIC], SEEDS, tmp_path)


def test_seeds_are_those_of_evaluation_unless_it_is_said():
    assert choose_seeds(3, None, other_seeds=False) == list(EVALUATION_SEEDS[:3])
    assert choose_seeds(2, EVALUATION_SEEDS[50], other_seeds=False)[0] == EVALUATION_SEEDS[50]
    assert choose_seeds(2, 7, other_seeds=True) == [7, 8]
    for episodes, first, other in (
        (2, 0, False),
        (2, EVALUATION_SEEDS.start - 1, False),
        (2, EVALUATION_SEEDS.stop - 1, False),
        (2, -1, True),
        (2, None, True),
        (2, EVALUATION_SEEDS.start - 1, True),
        (1, None, False),
    ):
        with pytest.raises(InputError):
            choose_seeds(episodes, first, other)


def test_scores_on_other_seeds_are_marked(tmp_path, capsys):
    arguments = Arguments(
        "defaults", "static_workload", 2, first_seed=5, other_seeds=True, jobs=1, out=tmp_path
    )
    main(arguments)
    assert "not seeds of evaluation" in capsys.readouterr().out
    scores = read_scores(tmp_path / "static_workload@other-seeds" / "defaults.json")
    assert (scores.seeds_of, scores.seeds) == ("other", [5, 6])
    main(Arguments("defaults", "static_workload", 2, jobs=1, out=tmp_path))
    assert "not seeds of evaluation" not in capsys.readouterr().out


def test_settings_lie_apart(tmp_path):
    settings = open_settings(["static_workload"], profiles=[None, "a100-llama-3.1-8b"], loads=[0.5, 1.0])
    assert len(settings) == 4
    found = measure({"defaults": "defaults"}, settings, SEEDS[:2], tmp_path)
    assert len(list(tmp_path.glob("*/defaults.json"))) == 4
    assert len({tuple(scores.scores) for scores in found.values()}) == 4


def test_labels():
    assert agent_labels(["reactive", "shielded:random", "shielded:a/ppo", "a/b/ppo", "other=a/c/ppo"]) == {
        "reactive": "reactive",
        "shielded:random": "shielded:random",
        "shielded:ppo": "shielded:a/ppo",
        "ppo": "a/b/ppo",
        "other": "a/c/ppo",
    }
    for agents in (["a/ppo", "b/ppo"], ["reactive", "reactive"], ["one=reactive", "reactive"]):
        with pytest.raises(InputError, match="is there already"):
            agent_labels(agents)


def test_policies_are_found_by_their_folder_and_watched_for_changes(tmp_path):
    policy = random_policy(0)
    save_policy(tmp_path / "static_workload", policy)
    task, plays = load_task("static_workload"), f"{tmp_path}/{{task}}"
    agents = {"plain": plays, "shielded": f"shielded:{plays}"}
    found = measure(agents, [STATIC], SEEDS[:2], tmp_path / "out")
    for label, agent in (("plain", PolicyAgent(policy)), ("shielded", Shield(PolicyAgent(policy)))):
        assert found[label, STATIC].scores == play(agent, task, SEEDS[:2]).scores.tolist()
    save_policy(tmp_path / "static_workload", random_policy(1))
    for label, name in agents.items():
        with pytest.raises(InputError) as caught:
            measure({label: name}, [STATIC], SEEDS[:3], tmp_path / "out")
        assert caught.value.field == "policy"
    with pytest.raises(InputError, match="cannot be read"):
        measure({"plain": f"{tmp_path}/nonesuch/policy"}, [STATIC], SEEDS[:2], tmp_path / "out")


def test_tasks_that_do_not_suit_a_policy_are_left_out(tmp_path, capsys):
    save_policy(tmp_path / "policy", random_policy(0))
    agents = {"policy": str(tmp_path / "policy"), "defaults": "defaults"}
    found = measure(agents, [STATIC, Setting(task="bursty_workload")], SEEDS[:2], tmp_path / "out")
    assert [label for label, _ in found] == ["policy", "defaults", "defaults"]
    assert "policy does not play bursty_workload" in capsys.readouterr().err


def random_policy(seed):
    task = load_task("static_workload")
    config = PolicyConfig(
        package_version="0",
        task_id=task.id,
        features=[feature.name for feature in FEATURES],
        controls={name: list(values) for name, values in task.grid.values.items()},
        frames=1,
        hidden=8,
        recurrent=False,
    )
    rng = np.random.default_rng(seed)
    weights = {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes(config).items()}
    return Policy(config, {**weights, "std": np.ones(len(FEATURES), np.float32)})
