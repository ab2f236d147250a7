"""The ids: in this process and in spawned ones, and what the checkers of Gymnasium and SB3 say."""

from __future__ import annotations

import importlib
import multiprocessing
import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import llmserve_env
from llmserve_env.envs.wrappers import DictActions

IDS = ("LLMServe-v0", "LLMServeContinuous-v0", "LLMServeDict-v0")
WRAPPED = r".*The environment .* is different from the unwrapped version.*"  # two of the ids are made so


def first_steps(env_id: str) -> list:
    env = gym.make(env_id, horizon_s=3.0)
    env.action_space.seed(0)
    rewards = [env.reset(seed=1)[1]["seed"]]
    for _ in range(3):
        rewards.append(env.step(env.action_space.sample())[1])
    return rewards


@pytest.mark.parametrize("env_id", IDS)
def test_gymnasiums_checker_has_nothing_to_say(env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", WRAPPED)
        check_env(gym.make(env_id, horizon_s=4.0, disable_env_checker=True).env)


@pytest.mark.parametrize("env_id", IDS)
def test_make_wraps_as_usual(env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make(env_id, horizon_s=4.0)
    assert env.spec.id == env_id
    again = env.spec.make()
    for each in (env, again):
        each.action_space.seed(3)
    assert env.reset(seed=1)[1] == again.reset(seed=1)[1]
    assert env.step(env.action_space.sample())[1] == again.step(again.action_space.sample())[1]


@pytest.mark.parametrize("env_id", ["LLMServe-v0", "LLMServeContinuous-v0"])
def test_stable_baselines_checker_has_nothing_to_say(env_id):
    from stable_baselines3.common import env_checker

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env_checker.check_env(gym.make(env_id, horizon_s=4.0))


def test_a_spawned_process_plays_the_same_episode():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (spawned,) = pool.map(first_steps, [f"llmserve_env:{IDS[0]}"])
    assert spawned == first_steps(IDS[0])


@pytest.mark.parametrize("order", ["gymnasium, llmserve_env", "llmserve_env, gymnasium"])
def test_importing_the_package_registers_in_either_order(order):
    code = f"import {order}; print(gymnasium.spec('LLMServe-v0').id, 'numba' in llmserve_env.__dict__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("LLMServe-v0 False\n", "")


def test_registering_twice_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(llmserve_env)


def test_a_continuous_vector_environment():
    env = gym.make_vec("LLMServeContinuous-v0", num_envs=3, horizon_s=3.0)
    single = gym.make("LLMServeContinuous-v0", horizon_s=3.0)
    env.action_space.seed(0)
    env.reset(seed=5)
    single.reset(seed=5)
    for _ in range(2):
        actions = env.action_space.sample()
        observations, rewards, *_ = env.step(actions)
        observation, reward, *_ = single.step(actions[0])
        assert np.array_equal(observations[0], observation)
        assert rewards[0] == reward


def test_wrappers_go_around_a_made_environment():
    env = DictActions(gym.make("LLMServe-v0", horizon_s=3.0))
    env.reset(seed=0)
    action = dict.fromkeys(env.action_space.spaces, 1)
    *_, info = env.step(action)
    assert info["action"]["batch_cap"] == env.unwrapped.task.grid.values["batch_cap"][1]
