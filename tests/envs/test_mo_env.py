"""LLMServeMO-v0: vectors of rewards that the task's weights turn into the reward of LLMServe-v0."""

from __future__ import annotations

import pickle
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from llmserve_env.objectives import OBJECTIVES, ObjectiveBatch, Objectives
from llmserve_env.tasks import list_tasks, load_task
from llmserve_env.tasks.task import RewardWeights

WINDOWS = 5
ID = "LLMServeMO-v0"


def short(task_id: str = "bursty_workload", windows: int = WINDOWS, **changes):
    task = load_task(task_id)
    return load_task(task_id, horizon_s=windows * task.window_s, **changes)


def single(task, env_id: str = ID):
    return gym.make(env_id, task_id=task, disable_env_checker=True)


@pytest.mark.parametrize("task_id", list_tasks())
def test_the_tasks_weights_give_the_reward_back(task_id):
    task = short(task_id, 12)
    env, plain = single(task), single(task, "LLMServe-v0")
    weights = Objectives(task).weights
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)
    assert env.reset(seed=3)[1]["objectives"] == dict.fromkeys(OBJECTIVES, 0.0)
    plain.reset(seed=3)
    plain.action_space.seed(0)
    earned = np.zeros(4)
    for _ in range(12):
        action = plain.action_space.sample()
        observation, rewards, terminated, truncated, info = env.step(action)
        expected, reward, *ends, told = plain.step(action)
        assert observation.tobytes() == expected.tobytes()
        assert [terminated, truncated] == ends
        assert rewards in env.unwrapped.reward_space
        exact = np.array([info["objectives"][name] for name in OBJECTIVES])
        assert weights @ exact == pytest.approx(reward, rel=1e-12, abs=1e-12)
        np.testing.assert_array_equal(rewards, exact.astype(np.float32))
        assert {**info, "objectives": None} == {**told, "objectives": None}
        earned += exact
    assert earned[0] > 0
    np.testing.assert_allclose(env.unwrapped.batch.means[0], earned / 12)
    assert weights @ env.unwrapped.batch.means[0] == pytest.approx(info["score"], abs=1e-12)
    assert (env.unwrapped.batch.means <= 1).all()


def test_objectives_hang_on_no_weight_but_that_of_memory_in_cost():
    """A weight of zero hides nothing, and by hand: goodput is what parts of the reward are without theirs."""
    task = short()
    own = task.reward
    bare = RewardWeights(
        goodput=1, latency=0, memory=0, cost=0, quality=0, acceptable_quality=own.acceptable_quality
    )
    batches = [ObjectiveBatch(each, 2) for each in (task, task.model_copy(update={"reward": bare}))]
    for batch in batches:
        batch.reset([1, 2])
        for _ in range(WINDOWS):
            batch.step(task.grid.actions(np.array([[3, 3, 0, 1, 0, 1, 0]] * 2)))
    weighed, unweighed = batches
    for name in ("goodput", "latency", "quality"):
        place = OBJECTIVES.index(name)
        np.testing.assert_array_equal(weighed.means[:, place], unweighed.means[:, place])
    parts = weighed.totals / [own.goodput, own.latency, own.memory, own.cost, own.quality]
    spared = (own.memory * parts[:, 2] + own.cost * parts[:, 3]) / (own.memory + own.cost)
    np.testing.assert_allclose(weighed.means, np.stack([*parts.T[:2], spared, parts[:, 4]], 1), rtol=1e-12)
    np.testing.assert_allclose(unweighed.means[:, 2], parts[:, 3], rtol=1e-12)  # idle GPU alone
    assert (np.diff(weighed.means[:, [0, 1]]) < 0).all()


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_many_at_once_are_single_ones_over_autoresets(mode):
    task = short(max_in_flight=25)
    envs = gym.make_vec(ID, num_envs=4, task_id=task, autoreset_mode=mode)
    assert envs.unwrapped.reward_space == single(task).unwrapped.reward_space
    alone = [single(task) for _ in range(4)]
    envs.reset(seed=7)
    for i, env in enumerate(alone):
        env.reset(seed=7 + i)
    envs.action_space.seed(1)
    waiting, ends = np.zeros(4, bool), set()
    for step in range(3 * WINDOWS):
        actions = envs.action_space.sample()
        observations, rewards, terminated, truncated, info = envs.step(actions)
        assert (rewards.dtype, rewards.shape) == (np.float32, (4, 4))
        for i, env in enumerate(alone):
            if waiting[i]:
                observation, reward, told = env.reset()[0], np.zeros(4, np.float32), None
            else:
                observation, reward, *over, told = env.step(actions[i])
                assert over == [terminated[i], truncated[i]]
                if any(over):
                    ends.add((step, i))
                    if mode is AutoresetMode.SAME_STEP:
                        final = info["final_info"]["objectives"]
                        assert [final[name][i] for name in OBJECTIVES] == list(told["objectives"].values())
                        observation, told = env.reset()
            assert reward.tobytes() == rewards[i].tobytes()
            assert observation.tobytes() == observations[i].tobytes()
            if told is not None:
                seen = [info["objectives"][name][i] for name in OBJECTIVES]
                assert seen == list(told["objectives"].values())
        if mode is AutoresetMode.NEXT_STEP:
            waiting = terminated | truncated
    assert len({step for step, _ in ends}) > 1


def test_gymnasiums_checker_misses_nothing_but_the_scalar():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", r".*The reward returned by `step\(\)` must be a float.*")
        check_env(gym.make(ID, horizon_s=4.0, disable_env_checker=True).unwrapped, skip_render_check=True)


def test_a_snapshot_goes_on_alike():
    env = single(short()).unwrapped
    env.reset(seed=1)
    env.action_space.seed(2)
    actions = [env.action_space.sample() for _ in range(WINDOWS)]
    env.step(actions[0])
    kept = env.snapshot()
    first = pickle.dumps([env.step(each)[1] for each in actions[1:]])
    env.restore(kept)
    assert pickle.dumps([env.step(each)[1] for each in actions[1:]]) == first


def test_mo_gymnasium_takes_it():
    import mo_gymnasium as mo

    task = short()
    weights = Objectives(task).weights
    env = mo.wrappers.LinearReward(
        mo.wrappers.MORecordEpisodeStatistics(mo.make(ID, task_id=task)), weight=weights
    )
    plain = single(task, "LLMServe-v0")
    env.reset(seed=1)
    plain.reset(seed=1)
    plain.action_space.seed(0)
    for _ in range(WINDOWS):
        action = plain.action_space.sample()
        _, reward, _, _, info = env.step(action)
        assert reward == pytest.approx(plain.step(action)[1], rel=1e-6)
    assert info["episode"]["r"].shape == (4,)
    assert info["episode"]["r"] @ weights / WINDOWS == pytest.approx(info["score"], rel=1e-6)
    many = mo.wrappers.vector.MOSyncVectorEnv([lambda: mo.make(ID, task_id=task)] * 2)
    ours = mo.wrappers.vector.MORecordEpisodeStatistics(
        gym.make_vec(ID, num_envs=2, task_id=task, autoreset_mode=AutoresetMode.NEXT_STEP)
    )
    many.reset(seed=1)
    ours.reset(seed=1)
    for _ in range(WINDOWS):
        actions = np.stack([plain.action_space.sample()] * 2)
        expected = many.step(actions)[1]
        rewards, *_, told = ours.step(actions)[1:]
        np.testing.assert_array_equal(rewards, expected)
    assert told["episode"]["r"].shape == (2, 4)
