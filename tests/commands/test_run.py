"""`llmserve run`: an episode with an agent, simulated and before real HTTP servers."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from llmserve_env.agents import load_agent, play
from llmserve_env.cli import main
from llmserve_env.grading import grade, read_log
from llmserve_env.live.pilot.decision_log import read_decisions
from llmserve_env.live.servers.engine_settings import EngineSettings, read_settings, write_settings
from llmserve_env.tasks import load_task
from tests.live.control_folder import FolderEngine
from tests.live.endpoint_server import CompletionEndpoint, closed_url, serving

SHORT = ["--task", "static_workload", "--horizon-s", "6"]
FAST = ["--task", "static_workload", "--window-s", "0.3", "--horizon-s", "0.9"]
BUSY = ["--workload", "poisson://?rate=40&duration=60&lengths=fixed:20,3"]


def run(*args):
    return main(["run", *args])


def test_a_simulated_episode_scores_and_grades_as_it_does_everywhere(tmp_path, capsys):
    path = tmp_path / "log.json.gz"
    assert run("--agent", "reactive", *SHORT, "--seed", "3", "--log", str(path)) == 0
    said = capsys.readouterr().out
    task = load_task("static_workload", horizon_s=6.0)
    score = float(play(load_agent("reactive", task), task, [3]).scores[0])
    result = grade(read_log(path))
    assert result.score == score
    assert result.verified
    assert f"score       {score:.4f}" in said
    lines = said.splitlines()
    assert [line.split(":")[0] for line in lines[:6]] == [f"{window}/6" for window in range(1, 7)]
    assert lines[-1] == f"wrote {path}"
    assert "speculation_depth" in lines[0]  # what the agent set


def test_a_pilot_can_stand_there_in_the_simulator_too(tmp_path, capsys):
    path, decisions = tmp_path / "log.json", tmp_path / "decisions.jsonl"
    options = ["--pilot", "always", "--dry-run", "--decisions", str(decisions), "--log", str(path)]
    assert run("--agent", "random", *SHORT, *options) == 0
    start = load_task("static_workload").start
    assert set(read_log(path).actions) == {start}
    text = decisions.read_text()
    assert text.count('"kind":"decision"') == text.count('"kind":"result"') == 6
    assert '"dry_run":true' in text
    assert "6/6" in capsys.readouterr().out


def test_a_live_episode_says_what_it_can_apply_and_what_it_scores(tmp_path, capsys):
    path, decisions = tmp_path / "log.json", tmp_path / "decisions.jsonl"
    FolderEngine(tmp_path)
    endpoint = CompletionEndpoint()
    with serving(endpoint) as url:
        server = f"{url},tier=FP16,control={tmp_path}"
        options = ["--model", "m", "--log", str(path), "--decisions", str(decisions)]
        assert run("--agent", "random", *FAST, *BUSY, "--live", server, *options) == 0
    said = capsys.readouterr().out
    assert "speculation_depth     engine: 0 to 4" in said
    assert "quantization_tier     routing: to servers with FP16" in said
    assert "3/3: " in said
    assert "no: live, its score is what it states" in said
    log = read_log(path)
    result = grade(log)
    assert log.live
    assert result.components["goodput"] > 0
    assert ["goodput", f"{result.components['goodput']:.4f}"] in [line.split() for line in said.splitlines()]
    assert endpoint.requests
    assert not (tmp_path / "settings.json").exists()
    assert '"capabilities":{"batch_cap":"engine: up to 64' in decisions.read_text()
    assert len(list(read_decisions([decisions]))) > 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_with_settings_restored_and_a_log(tmp_path, number, status):
    found = EngineSettings(batch_cap=5)
    write_settings(tmp_path, found)
    FolderEngine(tmp_path)
    path = tmp_path / "log.json"
    with serving(CompletionEndpoint()) as url:
        command = [
            sys.executable,
            "-m",
            "llmserve_env",
            "run",
            "--agent",
            "defaults",
            "--task",
            "static_workload",
        ]
        options = ["--window-s", "0.3", "--model", "m", "--live", f"{url},control={tmp_path}", *BUSY]
        with subprocess.Popen(
            [*command, *options, "--log", str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            before = []
            while not before or not before[-1].startswith("2/"):
                before.append(process.stdout.readline())
                assert before[-1], before
            assert read_settings(tmp_path) == EngineSettings.of(load_task("static_workload").start)
            process.send_signal(number)
            rest, _ = process.communicate(timeout=60)
    assert process.returncode == status
    assert read_settings(tmp_path) == found
    assert len(read_log(path).actions) >= 2
    assert "cut short" in rest
    assert f"wrote {path}" in rest


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--agent", "nobody"], "nobody"),
        (["--agent", "defaults", "--seed", "-1"], "--seed"),
        (["--agent", "defaults", "--dry-run"], "--pilot"),
        (["--agent", "defaults", "--model", "m"], "--live"),
        (["--agent", "defaults", "--log", "no/folder/log.json"], "no folder"),
        (["--agent", "defaults", "--live", closed_url()], "cannot be reached"),
        (["--agent", "defaults", "--live", "h:1", "--model", "m"], "http://HOST"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(capsys, options, expected):
    assert run("--task", "static_workload", *options) == 2
    assert expected in capsys.readouterr().err
