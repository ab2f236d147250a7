"""`llmserve demo` writes what it says."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llmserve_env.agents import load_agent, play
from llmserve_env.cli import main
from llmserve_env.report.stats import interval
from llmserve_env.rewards import COMPONENTS
from llmserve_env.tasks import EVALUATION_SEEDS, load_task


def test_demo_writes_its_files(tmp_path, capsys):
    out = tmp_path / "a" / "demo"
    agents = ["random", "defaults", "reactive"]
    asked = ["--tasks", "static_workload", "--agents", *agents, "--seeds", "3"]
    assert main(["demo", "--out", str(out), *asked]) == 0
    told = capsys.readouterr().out
    found = json.loads((out / "scores.json").read_text())
    assert {path.name for path in out.iterdir()} == {"scores.json", "episode.png"}
    assert all(f"wrote {path}" in told for path in out.iterdir())
    assert (out / "episode.png").read_bytes().startswith(b"\x89PNG")
    assert found["seeds"] == list(EVALUATION_SEEDS[:3])
    assert set(found["made_by"]) == {"command", "commit", "cpu", "python"}
    assert list(found["tasks"]) == ["static_workload"]
    assert list(found["tasks"]["static_workload"]) == agents
    task = load_task("static_workload")
    for name, result in found["tasks"]["static_workload"].items():
        played = play(load_agent(name, task), task, EVALUATION_SEEDS[:3])
        assert result["scores"] == played.scores.tolist()
        assert list(result["components"]) == list(COMPONENTS)
        assert np.isclose(sum(result["components"].values()), np.mean(result["scores"]))
        assert (
            result["requests"]["in_slo"] <= result["requests"]["completed"] <= result["requests"]["arrived"]
        )
        row = next(line for line in told.splitlines() if line.startswith(name))
        assert str(interval(result["scores"])) in row
    worst, defaults, rule = (found["tasks"]["static_workload"][name]["iqm"]["estimate"] for name in agents)
    assert worst < defaults < rule


def test_demo_plays_the_policies_that_there_are(tmp_path, capsys, ship):
    ship("static_workload")
    asked = ["--tasks", "trace_replay", "static_workload", "--agents", "defaults", "ppo", "--seeds", "2"]
    assert main(["demo", "--out", str(tmp_path / "demo"), *asked]) == 0
    found = json.loads((tmp_path / "demo" / "scores.json").read_text())["tasks"]
    assert {task: list(agents) for task, agents in found.items()} == {
        "trace_replay": ["defaults"],
        "static_workload": ["defaults", "ppo"],
    }
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ppo"))
    assert row.split()[1] == "–"
    assert str(interval(found["static_workload"]["ppo"]["scores"])) in row


def test_demo_without_any_player_says_what_there_is(tmp_path, capsys, ship):
    ship("static_workload")
    asked = ["--tasks", "static_workload", "trace_replay", "--agents", "ppo"]
    assert main(["demo", "--out", str(tmp_path / "demo"), *asked]) == 2
    assert "no 'ppo' was trained on 'trace_replay'" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--seeds", "1"], "field 'seeds': expected 2 or more, found 1"),
        (["--tasks", "nonesuch"], "nonesuch"),
        (["--agents", "nonesuch"], "random, defaults, best-constant, reactive"),
        (["--agents"], "field 'agents': expected one or more"),
    ],
)
def test_demo_refuses_before_it_writes(tmp_path, capsys, asked, told):
    assert main(["demo", "--out", str(tmp_path / "demo"), *asked]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_demo_refuses_a_file_as_its_folder(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert main(["demo", "--out", str(tmp_path / "taken")]) == 2
    assert "taken: cannot be made" in capsys.readouterr().err
