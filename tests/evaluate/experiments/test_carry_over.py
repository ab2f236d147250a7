"""The same episodes in the simulator and live: what is kept, what refused, and how rankings are compared."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import evaluate.experiments.carry_over as module
from evaluate.experiments.carry_over import FOLDER, Arguments, choose, entrants, main, open_task
from evaluate.experiments.carry_over_report import Compared, table
from llmserve_env.agents import play
from llmserve_env.errors import InputError
from llmserve_env.tasks import EVALUATION_SEEDS, TRAINING_SEEDS

sys.path.append(str(Path(__file__).parents[2] / "live"))
from endpoint_server import CompletionEndpoint, serving

AGENTS = ["defaults", "cautious constant", "best constant", "reactive rule", "ppo", "shielded ppo"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The agents and the task, with episodes of 0.2 s."""
    monkeypatch.setattr(module, "SETTLE_S", 0.0)
    copy = tmp_path / "carry_over"
    shutil.copytree(FOLDER, copy)
    text = (copy / "task.toml").read_text()
    text = text.replace("window_s = 1.0", "window_s = 0.1").replace("horizon_s = 48.0", "horizon_s = 0.2")
    (copy / "task.toml").write_text(text)
    return copy


def arguments(folder, url=None, **changes):
    given = {"folder": folder, "live": url, "episodes": 2, "json": folder / "out" / "found.json", **changes}
    return Arguments(**given)


def kept(folder):
    return [json.loads(line) for line in (folder / "out" / "found.jsonl").read_text().splitlines()]


def test_all_agents_play_the_same_evaluation_seeds_in_both_worlds(folder, capsys):
    with serving(CompletionEndpoint()) as url:
        main(arguments(folder, url, picture=folder / "found.svg"))
    found = json.loads((folder / "out" / "found.json").read_text())
    assert found["seeds"] == list(EVALUATION_SEEDS[:2])
    assert list(found["scores"]) == AGENTS
    task = open_task(arguments(folder))
    for label, agent in entrants(task, folder).items():
        assert found["scores"][label]["simulated"] == play(agent.make(), task, found["seeds"]).scores.tolist()
        assert len(found["scores"][label]["live"]) == 2
    lines = kept(folder)
    assert [(line["seed"], line["agent"]) for line in lines[:7]] == [
        *((EVALUATION_SEEDS[0], label) for label in AGENTS),
        (EVALUATION_SEEDS[1], AGENTS[1]),  # they take turns in going first
    ]
    assert {line["arrived"] for line in lines if line["seed"] == EVALUATION_SEEDS[0]} == {
        len(task.requests(EVALUATION_SEEDS[0]))
    }
    shield = [line["interventions"] for line in lines if line["agent"] == "shielded ppo"]
    assert [list(each) for each in shield] == [["panic", "rescue", "veto"]] * 2
    assert "Spearman's rho" in capsys.readouterr().out
    assert "shielded ppo" in (folder / "found.svg").read_text()


def test_what_was_played_is_not_played_again(folder, monkeypatch):
    real, played = module.play_live, []

    def interrupted(agent, task, seed, settings):
        if len(played) == 3:
            raise KeyboardInterrupt
        played.append(seed)
        return real(agent, task, seed, settings)

    monkeypatch.setattr(module, "play_live", interrupted)
    endpoint = CompletionEndpoint()
    with serving(endpoint) as url:
        with pytest.raises(KeyboardInterrupt):
            main(arguments(folder, url))
        first = kept(folder)
        assert len(first) == 3
        monkeypatch.setattr(module, "play_live", real)
        with (folder / "out" / "found.jsonl").open("ab") as file:
            file.write(b'{"agent": "sha')  # as a kill leaves it
        main(arguments(folder, url))
        assert kept(folder)[:3] == first
        assert len(kept(folder)) == 12
        asked = len(endpoint.requests)
        main(arguments(folder, url))
        assert len(endpoint.requests) == asked
        # Another constant is another agent; all others stay.
        chosen = folder / "agents.toml"
        chosen.write_text(chosen.read_text().replace("batch_cap = ", "batch_cap = 1", 1))
        main(arguments(folder, url))
    assert [line["agent"] for line in kept(folder)[12:]] == ["best constant"] * 2


def test_requests_that_the_server_fails_are_no_result(folder):
    failing = CompletionEndpoint(refuse=lambda body: 503)
    with serving(failing) as url, pytest.raises(InputError, match="requests failed"):
        main(arguments(folder, url))
    assert not (folder / "out" / "found.jsonl").exists()


def test_a_control_that_nobody_applies_is_refused(folder):
    text = (folder / "task.toml").read_text()
    (folder / "task.toml").write_text(text.replace("[controls]", "[controls]\nspeculation_depth = [0, 2]"))
    task = open_task(arguments(folder))
    with serving(CompletionEndpoint()) as url:
        settings = module._settings(arguments(folder, url))
        with pytest.raises(InputError, match="not applied"):
            module.play_live(module.ConstantAgent(task.start), task, 0, settings)


@pytest.mark.parametrize("damaged", [b'{"agent": 1}\n', b"\xff\n", b"[" * 100_000 + b"\n"])
def test_damaged_lines_are_named(folder, damaged):
    (folder / "out").mkdir()
    (folder / "out" / "found.jsonl").write_bytes(damaged)
    with serving(CompletionEndpoint()) as url, pytest.raises(InputError, match="no episode of this command"):
        main(arguments(folder, url))


def test_choosing_keeps_to_what_the_server_was_started_with(folder):
    task = open_task(arguments(folder))
    chosen, scores = choose(task, episodes=500, seeds=16)
    assert max(chosen.best_constant.batch_cap, chosen.reactive.batch_cap) <= 64
    assert chosen.reactive.crowd_batch_cap <= 64
    (folder / "agents.toml").write_text(module._toml(chosen, scores))
    assert module._read_chosen(folder / "agents.toml") == chosen


def test_in_simulation_every_agent_is_clearly_better_than_the_one_before():
    task = open_task(Arguments())
    means = [
        play(agent.make(), task, TRAINING_SEEDS[5000:5032]).scores.mean()
        for agent in entrants(task, FOLDER).values()
    ]
    assert (np.diff(means[:5]) > 0.02).all()


def test_rankings_are_compared_where_the_live_episodes_decide():
    wave = np.array([0.02, -0.02] * 4)
    simulated = {name: np.full(8, level) for name, level in zip("abcd", (0.1, 0.3, 0.31, 0.6), strict=True)}
    live = {"a": 0.2 + wave, "b": np.full(8, 0.401), "c": 0.4 + wave, "d": np.full(8, 0.5)}
    compared = Compared(simulated, live)
    assert compared.same
    assert [(pair.first, pair.second) for pair in compared.pairs if not pair.decided] == [("c", "b")]
    assert compared.correlations["Kendall's tau"].estimate == pytest.approx(2 / 3)
    assert "Of 6 pairs the live episodes decide 5, and the simulator has 5" in table(compared, official=True)
    turned = Compared(simulated, {name: -scores for name, scores in live.items()})
    assert not turned.same
    assert turned.correlations["Spearman's rho"].high < 0
    assert "**the other way round**" in table(turned, official=True)
    assert "no results to report" in table(compared, official=False)


def test_agents_that_all_score_alike_have_no_ranks():
    alike = Compared({"a": [0.1, 0.2], "b": [0.3, 0.4]}, {"a": [0.5, 0.5], "b": [0.5, 0.5]})
    assert alike.correlations["Spearman's rho"].estimate == 0
    assert alike.same
