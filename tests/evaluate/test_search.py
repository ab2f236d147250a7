"""Searches play real episodes: what they return is what playing it scores."""

from __future__ import annotations

import json

import numpy as np
import pytest

from evaluate.experiments.headroom import Settings, main
from evaluate.experiments.headroom_report import scores_of
from evaluate.search import PlanPlayer, best_constants, candidates, clairvoyant
from llmserve_env.agents import load_agent, play
from llmserve_env.controls import CONTROLS, to_array
from llmserve_env.errors import InputError
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import load_task

TASK = load_task("static_workload", horizon_s=12.0)
START = to_array([TASK.start])


def test_a_player_scores_as_an_agent_that_plays_the_same():
    player = PlanPlayer(TASK, size=3)  # neither one batch nor a whole number of them
    scores = player.play([5, 6, 7, 8], np.repeat(START[None], 4, axis=0))
    assert scores == pytest.approx(play(load_agent("defaults", TASK), TASK, [5, 6, 7, 8]).scores, abs=1e-12)
    assert player.episodes == 4


def test_candidates_are_the_whole_grid_and_random_actions_within_it():
    tried = candidates(TASK, 1500, seed=0)
    assert len(tried) == 1500 > len(TASK.grid.all())
    assert (tried[: len(TASK.grid.all())] == TASK.grid.all()).all()
    for name in CONTROLS:
        low, high = TASK.grid.all()[name].min(), TASK.grid.all()[name].max()
        assert ((tried[name] >= low) & (tried[name] <= high)).all()


def test_best_constants_come_with_their_means_best_first():
    small = load_task(
        "static_workload", horizon_s=12.0, controls={"batch_cap": [8, 64], "speculation_depth": [0, 2]}
    )
    player = PlanPlayer(small, size=8)
    actions, means = best_constants(player, range(3), at_least=1, rungs=((1, 4), (3, 2)))
    assert (np.diff(means) <= 0).all()
    for action, mean in zip(actions, means, strict=True):
        again = player.play(range(3), np.repeat(action[None, None], 3, axis=0))
        assert again.mean() == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize("fixed", [(), ("batch_cap", "quantization_tier")])
def test_a_plan_is_at_least_its_start_and_keeps_what_is_fixed(fixed):
    player = PlanPlayer(TASK, size=16)
    start = to_array([ServeAction(batch_cap=8)])
    plan, score = clairvoyant(player, 3, start[None], rounds=2, children=16, width=4, fixed=fixed)
    assert score >= player.play([3], start[None])[0]
    assert player.play([3], plan[None])[0] == score
    for name in fixed:
        assert (plan[name] == start[name]).all()


def test_results_of_other_settings_are_not_overwritten(tmp_path):
    path = tmp_path / "headroom.json"
    path.write_text(json.dumps({"settings": {"task": "static_workload"}}))
    with pytest.raises(InputError, match="other settings"):
        main(Settings("static_workload"), out=path)
    assert json.loads(path.read_text()) == {"settings": {"task": "static_workload"}}
    path.write_text("[]")
    with pytest.raises(InputError, match="no result"):
        main(Settings("static_workload"), out=path)


def test_an_unfinished_measurement_is_not_reported(tmp_path):
    with pytest.raises(InputError, match="not finished"):
        scores_of({"settings": {"seeds": 10}, "scores": {}}, tmp_path / "headroom.json")
