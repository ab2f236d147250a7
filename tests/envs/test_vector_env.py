"""The vector environment against single ones, bit for bit, in every autoreset mode."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from llmserve_env.controls import to_array
from llmserve_env.envs.serve_env import LLMServeEnv
from llmserve_env.envs.vector_env import LLMServeVectorEnv
from llmserve_env.errors import InputError
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import load_task

WINDOWS = 5
THREADS = [
    1,
    2,
]
LEFT_OUT = ("action", "_action", "not_applied", "_not_applied")


def arguments(task_id: str = "static_workload", **changes):
    """Short episodes; those that `max_in_flight` ends do so after different numbers of windows."""
    return {"task_id": load_task(task_id, horizon_s=WINDOWS * load_task(task_id).window_s, **changes)}


def without(info):
    """A SyncVectorEnv's info without what the vector environment leaves out."""
    kept = {name: value for name, value in info.items() if name not in LEFT_OUT}
    if "final_info" in kept:
        kept["final_info"] = without(kept["final_info"])
    return kept


def same(ours, theirs) -> None:
    *ours, info = ours
    *theirs, expected = theirs
    for a, b in zip(ours, theirs, strict=True):
        assert (a.dtype, a.tobytes()) == (b.dtype, b.tobytes())
    assert data_equivalence(info, without(expected), exact=True)


def pair(count: int, mode: AutoresetMode, threads: int = 1, **changes):
    given = arguments(**changes)
    ours = LLMServeVectorEnv(count, threads=threads, autoreset_mode=mode, **given)
    theirs = SyncVectorEnv([lambda: LLMServeEnv(**given)] * count, autoreset_mode=mode)
    assert ours.action_space == theirs.action_space
    assert ours.observation_space == theirs.observation_space
    ours.action_space.seed(count)
    return ours, theirs


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
@pytest.mark.parametrize("seed", [0, 2**31 + 7])
def test_it_equals_single_environments_over_autoresets(mode, count, threads, seed):
    ours, theirs = pair(count, mode, threads)
    same(ours.reset(seed=seed), theirs.reset(seed=seed))
    for _ in range(2 * WINDOWS + 3):
        actions = ours.action_space.sample()
        same(ours.step(actions), theirs.step(actions))
    seeds = [None if i % 2 else 11 + i for i in range(count)]
    same(ours.reset(seed=seeds), theirs.reset(seed=seeds))
    same(ours.reset(), theirs.reset())


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_it_equals_single_environments_that_end_at_different_times(mode):
    ours, theirs = pair(6, mode, max_in_flight=8)
    same(ours.reset(seed=1), theirs.reset(seed=1))
    ended = set()
    for step in range(4 * WINDOWS):
        actions = ours.action_space.sample()
        given_back = ours.step(actions)
        same(given_back, theirs.step(actions))
        ended |= {(step, int(i)) for i in np.flatnonzero(given_back[2])}
    assert len({step for step, _ in ended}) > 1


def test_resets_are_the_callers_where_autoreset_is_disabled():
    ours, theirs = pair(6, AutoresetMode.DISABLED, max_in_flight=8)
    same(ours.reset(seed=1), theirs.reset(seed=1))
    for _ in range(3 * WINDOWS):
        actions = ours.action_space.sample()
        given_back = ours.step(actions)
        same(given_back, theirs.step(actions))
        over = given_back[2] | given_back[3]
        if over.any():
            with pytest.raises(InputError, match="over: call reset"):
                ours.step(actions)
            options = {"reset_mask": over}
            same(ours.reset(options=dict(options)), theirs.reset(options=dict(options)))
            assert options == {"reset_mask": over}


def test_some_are_reset_with_seeds():
    ours, theirs = pair(3, AutoresetMode.SAME_STEP)
    same(ours.reset(seed=1), theirs.reset(seed=1))
    actions = ours.action_space.sample()
    same(ours.step(actions), theirs.step(actions))
    mask = np.array([True, False, True])
    for seed in ([7, None, None], 20):
        same(
            ours.reset(seed=seed, options={"reset_mask": mask}),
            theirs.reset(seed=seed, options={"reset_mask": mask}),
        )
    for _ in range(WINDOWS + 1):
        same(ours.step(actions), theirs.step(actions))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_a_copy_in_the_middle_goes_on_alike(copied):
    env = LLMServeVectorEnv(3, **arguments())
    env.reset(seed=0)
    actions = np.stack([env.action_space.sample() for _ in range(WINDOWS + 2)])
    env.step(actions[0])
    twin = copied(env)
    for each in actions[1:]:
        same(env.step(each), twin.step(each))


def test_what_it_returns_is_not_written_to_again():
    env = LLMServeVectorEnv(2, **arguments())
    kept = [env.reset(seed=0)]
    snapshots = [pickle.dumps(kept[0])]
    for _ in range(WINDOWS + 1):
        kept.append(env.step(env.action_space.sample()))
        snapshots.append(pickle.dumps(kept[-1]))
    assert [pickle.dumps(each) for each in kept] == snapshots


def test_records_set_values_between_those_of_the_grid():
    env = LLMServeVectorEnv(2, **arguments())
    env.reset(seed=0)
    env.step(to_array([ServeAction(batch_cap=77), ServeAction(batch_cap=9)]))
    assert env.batch.actions["batch_cap"].tolist() == [77, 9]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")
def test_a_forked_child_goes_on_with_threads_of_its_own():
    env = LLMServeVectorEnv(4, threads=2, **arguments())
    env.reset(seed=0)
    actions = [env.action_space.sample() for _ in range(2)]
    env.step(actions[0])
    with multiprocessing.get_context("fork").Pool(1) as pool:
        rewards = pool.apply(_rewards, (env, actions[1]))
    assert rewards == env.step(actions[1])[1].tolist()


def _rewards(env, actions):
    return env.step(actions)[1].tolist()


def test_make_vec_gives_it():
    env = gym.make_vec("LLMServe-v0", num_envs=4, task_id="static_workload", threads=1, horizon_s=5.0)
    assert isinstance(env, LLMServeVectorEnv)
    assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert env.spec.id == "LLMServe-v0"
    assert len(env.np_random) == 4
    wrapped = gym.wrappers.vector.RecordEpisodeStatistics(env)
    wrapped.reset(seed=0)
    for _ in range(5):
        *_, info = wrapped.step(wrapped.action_space.sample())
    assert (info["episode"]["l"] == 5).all()


@pytest.mark.parametrize("env_id", ["LLMServe-v0", "LLMServeContinuous-v0", "LLMServeMO-v0"])
@pytest.mark.parametrize("mode", AutoresetMode)
def test_every_vector_environment_says_how_it_resets(env_id, mode):
    env = gym.make_vec(env_id, num_envs=2, autoreset_mode=mode.value)
    assert env.autoreset_mode is env.metadata["autoreset_mode"] is mode


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_envs": 0}, "num_envs"),
        ({"num_envs": "2"}, "num_envs': expected a whole number, found '2'"),
        ({"num_envs": 2.5}, "num_envs': expected a whole number, found 2.5"),
        ({"threads": 0}, "threads"),
        ({"threads": "all"}, "threads"),
        ({"autoreset_mode": "Never"}, "NextStep, SameStep, Disabled"),
        ({"render_mode": "ansi"}, "render_mode"),
        ({"max_episode_steps": 10}, "horizon_s"),
        ({"task_id": "no_such_task"}, "static_workload"),
        ({"task_id": None}, "task_id': expected the id or the file of a task, found None"),
    ],
)
def test_bad_arguments_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        gym.make_vec("LLMServe-v0", **given)


@pytest.mark.parametrize(
    "given",
    [
        {"seed": [1]},
        {"seed": 1.0},
        {"seed": "12"},
        {"seed": [1, "2"]},
        {"options": 3},
        {"seed": -3},
        {"seed": [0, -1]},
        {"options": {"reset_mask": np.zeros(2, bool)}},
        {"options": {"reset_mask": np.ones(3, bool)}},
        {"options": {"reset_mask": [1, 0]}},
        {"options": {"mask": None}},
    ],
)
def test_bad_resets_are_refused(given):
    env = LLMServeVectorEnv(2, **arguments())
    env.reset(seed=0)
    with pytest.raises(InputError):
        env.reset(**given)


@pytest.mark.parametrize(
    "actions",
    [np.zeros((3, 7), int), np.zeros(7, int), np.full((2, 7), 99), np.zeros((2, 7)), [[0] * 7, [0]], None],
)
def test_bad_actions_are_refused(actions):
    env = LLMServeVectorEnv(2, **arguments())
    with pytest.raises(InputError):
        env.step(np.zeros((2, 7), int))
    env.reset(seed=0)
    with pytest.raises(InputError):
        env.step(actions)


@pytest.mark.parametrize(
    "actions",
    [
        np.zeros((3, 7)),
        np.zeros(7),
        np.full((2, 7), np.nan),
        np.zeros((2, 7), complex),
        [["0"] * 7] * 2,
        [[0] * 7, [0]],
        None,
    ],
)
def test_bad_boxes_are_refused(actions):
    env = gym.make_vec("LLMServeContinuous-v0", num_envs=2)
    env.reset(seed=0)
    with pytest.raises(InputError):
        env.step(actions)


def test_seeds_may_be_of_numpy():
    env = LLMServeVectorEnv(2, **arguments())
    assert env.reset(seed=np.int64(3))[1]["seed"].tolist() == [3, 4]
    assert env.reset(seed=np.array([7, 5]))[1]["seed"].tolist() == [7, 5]
