"""A control that a task does not grant stays as it starts, wherever an action comes from, and is named."""

from __future__ import annotations

import json

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve_env.agents.agent import Agent
from llmserve_env.controls import CONTROLS, to_action, to_array
from llmserve_env.envs.tool_env import ServeToolEnv
from llmserve_env.episode import Episode, EpisodeBatch
from llmserve_env.errors import InputError
from llmserve_env.grading import grade
from llmserve_env.play import play_batch
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import Task, list_tasks, load_task
from tests.strategies import actions

from .episodes import beyond, kept, other_values, played, short

SEED = 11
WINDOWS = 3
TASKS = {task_id: short(task_id, WINDOWS) for task_id in list_tasks()}
CASES = [(task_id, name) for task_id, task in TASKS.items() for name in kept(task)]


class Sets(Agent):
    """Sets the same in every window."""

    name = "sets"

    def __init__(self, action: ServeAction) -> None:
        self._action = to_array([action])

    def reset(self, task, seeds) -> None:
        self._count = len(seeds)

    def act(self, observations, windows):
        return np.repeat(self._action, self._count)


def by_episode(task, action):
    episode = Episode(task)
    episode.reset(SEED)
    seen = [episode.step(action) for _ in range(WINDOWS)]
    return [each.metadata["not_applied"] for each in seen], episode.action, seen[-1].metadata["score"]


def by_environment(task, action):
    env = gym.make("LLMServe-v0", task_id=task, disable_env_checker=True).unwrapped
    env.reset(seed=SEED)
    infos = [env.step(to_array([action])[0])[-1] for _ in range(WINDOWS)]
    return [info["not_applied"] for info in infos], to_action(env.batch.actions[0]), infos[-1]["score"]


def by_vector(task, action):
    """In the first and last of three environments, beside one that sets what it may."""
    env = gym.make_vec("LLMServe-v0", num_envs=3, task_id=task, autoreset_mode="Disabled")
    env.reset(seed=[SEED, SEED, SEED])
    told = []
    for _ in range(WINDOWS):
        *_, info = env.step(to_array([action, task.start, action]))
        assert info["_not_applied"].tolist() == [True, False, True]
        parts = {name: why.tolist() for name, why in info["not_applied"].items() if name[0] != "_"}
        assert all(why[0] == why[2] and why[1] is None for why in parts.values())
        told.append({name: why[0] for name, why in parts.items()})
    assert info["score"][0] == info["score"][2]
    return told, to_action(env.unwrapped.batch.actions[2]), info["score"][0]


def by_agent(task, action):
    told = []
    batch = play_batch(
        Sets(action), EpisodeBatch(task), [SEED], lambda batch, _: told.append(batch.info()["not_applied"])
    )
    return told, to_action(batch.actions[0]), batch.scores[0]


def by_tools(task, action):
    env = ServeToolEnv()
    env.reset(task_id=task.id, seed=SEED, horizon_s=task.horizon_s)
    values = action.model_dump(mode="json")
    answers = [json.loads(env.set_serving_config(**values)) for _ in range(WINDOWS)]
    in_force = ServeAction(**answers[-1]["config_in_force"])
    return [each["not_applied"] for each in answers], in_force, env.score


ENTRANCES = [by_episode, by_environment, by_vector, by_agent, by_tools]


@pytest.mark.parametrize("play", ENTRANCES)
@pytest.mark.parametrize(("task_id", "name"), CASES)
def test_it_stays_as_it_starts_and_is_named(play, task_id, name):
    task = TASKS[task_id]
    expected = by_episode(task, task.start)
    assert expected[0] == [{}] * WINDOWS
    asked = ServeAction(**{**task.start.model_dump(), name: other_values(task, name)[-1]})
    told, in_force, score = play(task, asked)
    assert [list(each) for each in told] == [[name]] * WINDOWS
    assert in_force == task.start
    assert score == expected[2]


@settings(max_examples=40)
@given(task_id=st.sampled_from(sorted(TASKS)), sequence=st.lists(actions(), min_size=1, max_size=WINDOWS))
def test_an_episode_is_the_one_without_it(task_id, sequence):
    """What is granted counts alone: records, rewards and log are those of the actions in force."""
    task = TASKS[task_id]
    allowed = [
        ServeAction(
            **{name: getattr(each if name in task.grid.granted else task.start, name) for name in CONTROLS}
        )
        for each in sequence
    ]
    episode = Episode(task)
    episode.reset(SEED)
    for asked, in_force in zip(sequence, allowed, strict=True):
        seen = episode.step(asked)
        set_beyond = {name for name in CONTROLS if getattr(asked, name) != getattr(in_force, name)}
        assert set(seen.metadata["not_applied"]) >= set_beyond
        assert seen.metadata["action"] == in_force.model_dump(mode="json")
    log = episode.log()
    assert log == played(task, SEED, to_array(allowed)).log()
    assert log.actions == allowed
    assert grade(log).verified


def test_what_has_been_said_is_of_the_last_window_of_each_episode():
    task = TASKS["death_spiral"]
    asked, in_force = beyond(task, batch_cap=64)
    batch = EpisodeBatch(task, 3)
    batch.reset([SEED] * 3)
    both = to_array([asked, in_force, asked])
    batch.step(both)
    assert [bool(batch.not_granted(i)) for i in range(3)] == [True, False, True]
    batch.step(to_array([in_force, asked, asked]), which=np.array([True, True, False]))
    assert [bool(batch.not_granted(i)) for i in range(3)] == [False, True, True]
    assert batch.info(2)["not_applied"].keys() == set(kept(task))
    batch.reset([SEED] * 3, which=np.array([False, True, False]))
    assert [bool(batch.not_granted(i)) for i in range(3)] == [False, False, True]
    batch.step(np.zeros((3, len(task.grid.nvec)), np.int64))  # indices set nothing else
    assert not batch.beyond_grant
    assert all(batch.not_granted(i) == {} for i in range(3))


def test_a_snapshot_has_it():
    task = TASKS["bursty_workload"]
    batch = EpisodeBatch(task)
    batch.reset([SEED])
    batch.step(to_array([beyond(task)[0]]))
    other = EpisodeBatch(task)
    other.restore(batch.snapshot())
    assert other.info() == batch.info()
    assert other.info()["not_applied"].keys() == set(kept(task))


@pytest.mark.parametrize(("task_id", "name"), CASES)
def test_a_log_that_sets_it_is_refused_whatever_its_figures_rest_on(task_id, name):
    """As a version wrote it that obeyed the control, and with the figures that are true without it."""
    task = TASKS[task_id]
    value = other_values(task, name)[-1]
    table = task.model_dump(mode="json")
    table["controls"][name] = sorted(
        [table["start"][name], value], key=lambda each: (each is None, str(each))
    )
    more = Task.model_validate(table)
    asked = ServeAction(**{**task.start.model_dump(), name: value})
    obeyed = played(more, SEED, to_array([task.start, *[asked] * (WINDOWS - 1)])).log()
    assert getattr(obeyed.actions[-1], name) == getattr(asked, name)
    result = grade(obeyed)
    assert (result.custom, result.verified) == (True, True)  # it is a task of its own
    honest = played(task, SEED, to_array([task.start] * WINDOWS)).log()
    for log in (
        obeyed.model_copy(update={"task": honest.task}),
        honest.model_copy(update={"actions": [*honest.actions[:1], *[asked] * (WINDOWS - 1)]}),
        obeyed.model_copy(update={"task": honest.task, "live": True}),
    ):
        with pytest.raises(InputError, match=rf"'actions\[1\]\.{name}': expected .* does not grant it"):
            grade(log)


def test_a_task_that_grants_one_value_keeps_it():
    task = load_task(
        "static_workload", horizon_s=2.0, controls={"batch_cap": [32], "speculation_depth": [0, 2]}
    )
    episode = Episode(task)
    episode.reset(SEED)
    seen = episode.step(ServeAction(batch_cap=64, speculation_depth=5))
    assert (seen.metadata["action"]["batch_cap"], seen.metadata["action"]["speculation_depth"]) == (32, 5)
    assert list(seen.metadata["not_applied"]) == ["batch_cap"]


WRONG = {
    "batch_cap": [0, 513, -(2**63), 2**62],
    "kv_budget_fraction": [0.0, -0.0, -0.5, 1.1, np.nan, np.inf, -np.inf],
    "speculation_depth": [-1, 9],
    "quantization_tier": [-1, 3],
    "prefill_decode_split": [-1, 2],
    "priority_routing": [2],
    "admission_rate": [0.0, -0.0, -1.0, 1000.1, np.nan, -np.inf, -np.nan],
}


@pytest.mark.parametrize(("name", "code"), [(name, code) for name in WRONG for code in WRONG[name]])
def test_a_code_that_no_control_has_is_refused_and_changes_nothing(name, code):
    records = to_array([ServeAction()] * 2)
    records[name][1] = code
    batch = EpisodeBatch(TASKS["death_spiral"], 2)
    batch.reset([SEED] * 2)
    before = batch.snapshot()
    with pytest.raises(InputError, match=f"'{name}'"):
        batch.step(records)
    assert batch.snapshot() == before


@pytest.mark.parametrize(
    "actions",
    [
        None,
        [],
        {},
        "x",
        np.zeros(1),
        np.zeros((1, 3), np.int64),
        np.zeros((1, 7)),
        to_array([ServeAction()] * 3),
    ],
    ids=lambda actions: str(actions)[:20],
)
def test_what_is_no_action_is_refused_and_changes_nothing(actions):
    batch = EpisodeBatch(TASKS["static_workload"], 2)
    batch.reset([SEED] * 2)
    before = batch.snapshot()
    with pytest.raises(InputError, match="action"):
        batch.step(actions)
    assert batch.snapshot() == before


@pytest.mark.parametrize(
    "action",
    [
        None,
        {"batch_cap": 8},
        ServeAction.model_construct(batch_cap=None),
        ServeAction.model_construct(batch_cap="x"),
        ServeAction.model_construct(speculation_depth=9),
        ServeAction.model_construct(admission_rate=np.nan),
        ServeAction.model_construct(quantization_tier="FP8"),
    ],
    ids=str,
)
def test_an_action_that_was_not_checked_is_checked(action):
    episode = Episode(TASKS["static_workload"])
    episode.reset(SEED)
    with pytest.raises(InputError):
        episode.step(action)
    assert episode.observation().step_index == 0


def test_a_tool_says_which_argument_it_does_not_have():
    env = ServeToolEnv()
    env.reset(task_id="static_workload", seed=1, horizon_s=2.0)
    values = ServeAction().model_dump(mode="json")
    for wrong in ({**values, "clock_mhz": 1}, {"batch_cap": 8}):
        assert "argument" in json.loads(env.set_serving_config(**wrong))["error"]
    assert json.loads(env.observe())["last_window"]["step_index"] == 0
