"""Model predictive control: what it tries, what it sets, and what it does not know."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve_env.actions import to_array
from llmserve_env.agents import MPCAgent, load_agent, play
from llmserve_env.agents.tuned import tuned_constant
from llmserve_env.backend import WINDOW
from llmserve_env.errors import InputError
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import load_task
from llmserve_env.tasks.task import Task

SHORT = load_task("static_workload", horizon_s=16.0)
SMALL = {"candidates": 6, "horizon_s": 4.0}


def test_first_action_is_the_first_preset():
    preset = ServeAction(batch_cap=32)
    agent = MPCAgent([preset], **SMALL)
    agent.reset(SHORT, [1, 2])
    actions = agent.act(np.zeros((2, 1), np.float32), np.zeros(2, WINDOW))
    assert (actions == to_array([preset])[0]).all()


def test_leaves_a_bad_configuration_for_a_good_preset():
    task = load_task("static_workload", horizon_s=30.0)
    bad, good = ServeAction(batch_cap=1), tuned_constant(task.id)
    agent, seen = MPCAgent([bad, good], candidates=3, horizon_s=20.0), []
    play(agent, task, [4], watch=lambda batch, _: seen.append(batch.actions[0].copy()))
    assert seen[0] == to_array([bad])[0]
    assert seen[-1] != to_array([bad])[0]


def test_stays_where_nothing_is_better_by_the_margin():
    seen = []
    agent = MPCAgent([tuned_constant("static_workload")], margin=1e9, **SMALL)
    play(agent, SHORT, [4], watch=lambda batch, _: seen.append(batch.actions[0].copy()))
    assert len({row.tobytes() for row in seen}) == 1


def test_beats_the_defaults_where_they_fail():
    task = load_task("bursty_workload", horizon_s=600.0)
    scores = play(MPCAgent(candidates=12, horizon_s=40.0), task, [31]).scores
    assert scores[0] > play(load_agent("defaults", task), task, [31]).scores[0] + 0.1


def test_does_not_depend_on_how_many_play_together():
    task = load_task("adversarial_multitenant", horizon_s=40.0)
    seeds = [11, 12, 13]
    whole = play(MPCAgent(candidates=40, horizon_s=10.0, samples=2), task, seeds).scores
    alone = [
        play(MPCAgent(candidates=40, horizon_s=10.0, samples=2), task, [seed]).scores[0] for seed in seeds
    ]
    assert whole.tolist() == alone


def test_goes_on_when_some_episodes_have_ended():
    limited = SHORT.model_copy(update={"max_in_flight": 18})
    lengths = []
    whole = play(
        MPCAgent(**SMALL), limited, range(6), watch=lambda batch, _: lengths.append(batch.steps)
    ).scores
    assert len(set(lengths[-1].tolist())) > 1
    assert whole.tolist() == [play(MPCAgent(**SMALL), limited, [seed]).scores[0] for seed in range(6)]


def test_knows_nothing_of_the_episode_but_its_records(monkeypatch):
    """Cut the future off, and nothing changes in what was set before."""
    until, whole = 8.0, SHORT.requests(5)
    seen: dict[str, list[np.void]] = {"whole": [], "cut": []}
    play(MPCAgent(**SMALL), SHORT, [5], watch=lambda batch, _: seen["whole"].append(batch.actions[0].copy()))
    original = Task.requests

    def cut(task, seed):
        return whole.take(np.flatnonzero(whole.arrival_s < until)) if seed == 5 else original(task, seed)

    monkeypatch.setattr(Task, "requests", cut)
    play(MPCAgent(**SMALL), SHORT, [5], watch=lambda batch, _: seen["cut"].append(batch.actions[0].copy()))
    known = int(until / SHORT.window_s) + 1
    assert seen["whole"][:known] == seen["cut"][:known]


def test_makes_room_for_more_than_was_expected():
    busy = load_task("static_workload", horizon_s=12.0)
    agent = MPCAgent(**SMALL)
    agent.reset(busy, [3])
    windows = np.zeros(1, WINDOW)
    for window in range(1, 4):
        windows["end_s"] = window * busy.window_s
        windows["tenant_arrived"][:, 0] = 700
        windows["arrived_prompt_tokens"] = 700_000
        action = agent.act(np.zeros((1, 1), np.float32), windows)
    assert action["batch_cap"][0] in busy.grid.values["batch_cap"]


def test_plays_by_name_and_refuses():
    agent = load_agent("mpc", SHORT)
    assert agent.name == "mpc"
    with pytest.raises(InputError, match="call reset"):
        agent.act(np.zeros((1, 1), np.float32), np.zeros(1, WINDOW))
    for values in ({"candidates": 0}, {"samples": 0}, {"horizon_s": 0.0}):
        with pytest.raises(InputError) as caught:
            MPCAgent(**values)
        assert caught.value.field == next(iter(values))
    with pytest.raises(InputError, match="grant"):
        play(MPCAgent([ServeAction(speculation_depth=2)]), load_task("bursty_workload"), [1])
