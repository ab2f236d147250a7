"""Random, constant and loaded agents; episodes that agents play."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve_env.agents import AGENTS, ConstantAgent, RandomAgent, load_agent, play
from llmserve_env.agents.tuned import PATH, tuned_constant, tuned_rule, tuning
from llmserve_env.backend import WINDOW
from llmserve_env.controls import to_action, to_array
from llmserve_env.errors import InputError
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import list_tasks, load_task

SHORT = load_task("static_workload", horizon_s=40.0)


def acted(agent, task, seeds, windows):
    """ACTION[windows, n]."""
    agent.reset(task, seeds)
    nothing = np.zeros((len(seeds), 1), np.float32), np.zeros(len(seeds), WINDOW)
    return np.stack([agent.act(*nothing) for _ in range(windows)])


def test_random_actions_are_uniform_on_the_grid():
    task = load_task("bursty_workload")
    indices = task.grid.indices(acted(RandomAgent(), task, range(100), 120).ravel())
    for column, count in zip(indices.T, task.grid.nvec, strict=True):
        expected = len(column) / count
        seen = np.bincount(column, minlength=count)
        # chi-squared with count - 1 degrees of freedom, 5 standard deviations above its mean
        assert ((seen - expected) ** 2 / expected).sum() < count - 1 + 5 * np.sqrt(2 * count)
    pairs = indices[:, 0] * task.grid.nvec[1] + indices[:, 1]
    assert np.bincount(pairs).min() > 0.7 * len(pairs) / (task.grid.nvec[0] * task.grid.nvec[1])


def test_random_actions_depend_on_the_episodes_seed_alone():
    together = acted(RandomAgent(), SHORT, [5, 6, 7], 9)
    assert (together == acted(RandomAgent(), SHORT, [5, 6, 7], 9)).all()
    assert (together[:, 1:2] == acted(RandomAgent(), SHORT, [6], 9)).all()
    assert (together[:, 0] != together[:, 1]).any()


def test_defaults_are_what_the_task_starts_with():
    actions = acted(load_agent("defaults", SHORT), SHORT, [1, 2], 3)
    assert (actions == to_array([SHORT.start])[0]).all()


def test_constant_refuses_a_control_that_is_not_granted():
    with pytest.raises(InputError, match=r"bursty_workload.*grant") as caught:
        play(ConstantAgent(ServeAction(speculation_depth=2)), load_task("bursty_workload"), [1])
    assert caught.value.field == "speculation_depth"


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize("task_id", list_tasks())
def test_every_agent_plays_every_task_with_granted_controls_only(task_id, name):
    whole = load_task(task_id)
    task = load_task(task_id, horizon_s=6 * whole.window_s)
    agent, start, seen = load_agent(name, task), to_array([task.start]), []
    assert agent.name == name
    play(agent, task, [3, 4], watch=lambda batch, _: seen.append(batch.actions))
    actions = np.concatenate(seen)
    assert all(to_action(row) is not None for row in actions)
    for control, count in zip(task.grid.values, task.grid.nvec, strict=True):
        assert count > 1 or (actions[control] == start[control]).all()


@pytest.mark.parametrize("name", ["random", "reactive"])
def test_play_does_not_depend_on_how_many_play_together(name):
    seeds = [11, 12, 13, 14, 15]
    whole = play(load_agent(name, SHORT), SHORT, seeds)
    for size, threads in ((1, 1), (2, 2), (4, 1)):
        parts = play(load_agent(name, SHORT), SHORT, seeds, size=size, threads=threads)
        for field in ("scores", "components", "requests"):
            assert (getattr(whole, field) == getattr(parts, field)).all()
    assert whole.scores == pytest.approx(whole.components.sum(axis=1))


def test_play_goes_on_when_some_episodes_have_ended():
    limited = SHORT.model_copy(update={"max_in_flight": 12})
    lengths = []
    play(load_agent("random", limited), limited, range(6), watch=lambda batch, _: lengths.append(batch.steps))
    assert len(set(lengths[-1].tolist())) > 1
    alone = [play(load_agent("random", limited), limited, [seed]).scores[0] for seed in range(6)]
    assert play(load_agent("random", limited), limited, range(6)).scores.tolist() == alone


def test_play_refuses_no_seeds():
    with pytest.raises(InputError) as caught:
        play(RandomAgent(), SHORT, [])
    assert caught.value.field == "seeds"


def test_agents_refuse_to_act_before_an_episode():
    for agent in (RandomAgent(), load_agent("reactive", SHORT)):
        with pytest.raises(InputError, match="call reset"):
            agent.act(np.zeros((1, 1), np.float32), np.zeros(1, WINDOW))


def test_load_agent_names_what_there_is():
    with pytest.raises(InputError, match="random, defaults, best-constant, reactive, found 'best'"):
        load_agent("best", SHORT)
    mine = SHORT.model_copy(update={"id": "mine"})
    assert load_agent("random", mine).name == "random"
    for name in ("best-constant", "reactive"):
        with pytest.raises(InputError, match=r"nothing was tuned to 'mine'.*static_workload"):
            load_agent(name, mine)


@pytest.mark.parametrize("task_id", list_tasks())
def test_tuned_values_are_complete(task_id):
    task = load_task(task_id)
    grid, best = task.grid, to_array([tuned_constant(task_id)])
    for control, count in zip(grid.values, grid.nvec, strict=True):
        assert count > 1 or best[control] == to_array([task.start])[control]
    assert tuned_rule(task_id).memory_s > 0
    for agent in ("best_constant", "reactive"):
        found = tuning(task_id, agent)
        assert 0 < found.score < 1
        assert found.episodes > 0
        first, last = map(int, found.seeds.split(".."))
        assert 0 <= first < last < 2**31
        assert found.source.startswith("python -m evaluate.")
    text = PATH.read_text(encoding="utf-8")
    assert text.count(f"[{task_id}.") == 2
