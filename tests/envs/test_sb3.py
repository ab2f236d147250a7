"""Behind SB3's interface the vector environment gives what SB3 makes of single ones."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from llmserve_env.envs.sb3 import SB3VecEnv
from llmserve_env.errors import InputError
from llmserve_env.tasks import TRAINING_SEEDS, load_task

COUNT = 3


def made(**changes) -> tuple[SB3VecEnv, DummyVecEnv]:
    task = load_task("static_workload", horizon_s=5 * load_task("static_workload").window_s, **changes)
    ours = SB3VecEnv(gym.make_vec("LLMServe-v0", num_envs=COUNT, task_id=task))
    theirs = DummyVecEnv([lambda: Monitor(gym.make("LLMServe-v0", task_id=task))] * COUNT)
    return ours, theirs


def comparable(info: dict) -> dict:
    """Without what a vector environment leaves out, and the time of the clock."""
    kept = {name: value for name, value in info.items() if name not in ("action", "not_applied")}
    if "episode" in kept:
        kept["episode"] = {name: value for name, value in kept["episode"].items() if name != "t"}
    return kept


@pytest.mark.parametrize("changes", [{}, {"max_in_flight": 8}], ids=["horizon", "also terminated"])
def test_it_equals_single_environments_in_monitors(changes):
    ours, theirs = made(**changes)
    for env in (ours, theirs):
        env.seed(5)
    np.testing.assert_array_equal(ours.reset(), theirs.reset())
    ours.action_space.seed(0)
    ended, cut = 0, 0
    for _ in range(13):
        actions = np.stack([ours.action_space.sample() for _ in range(COUNT)])
        (*found, infos), (*expected, others) = ours.step(actions), theirs.step(actions)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        for info, other in zip(infos, others, strict=True):
            lasts = [each.pop("terminal_observation", None) for each in (info, other)]
            np.testing.assert_array_equal(*lasts)
            assert comparable(info) == comparable(other)
            ended += "episode" in info
            cut += info["TimeLimit.truncated"]
        assert [info["seed"] for info in ours.reset_infos] == [info["seed"] for info in theirs.reset_infos]
    assert ended >= 2 * COUNT
    assert (cut < ended) == bool(changes)


def test_terminal_observation_is_the_last_of_the_episode():
    ours, theirs = made()
    ours.seed(5)
    ours.reset()
    single = theirs.envs[1]
    single.reset(seed=6)
    action = np.zeros(7, np.int64)
    done = False
    while not done:
        last, _, _, done, _ = single.step(action)
        observations, _, dones, infos = ours.step(np.tile(action, (COUNT, 1)))
    assert dones.all()
    np.testing.assert_array_equal(infos[1]["terminal_observation"], last)
    assert not np.array_equal(observations[1], last)


def test_masks_are_those_of_single_environments():
    ours, theirs = made()
    ours.reset()
    theirs.reset()
    assert ours.has_attr("action_masks")
    assert not ours.has_attr("nonesuch")
    masks = np.stack(ours.env_method("action_masks"))
    np.testing.assert_array_equal(masks, np.stack(theirs.env_method("action_masks")))
    assert len(ours.env_method("action_masks", indices=[0, 2])) == 2
    with pytest.raises(AttributeError, match="no method"):
        ours.env_method("snapshot")


def test_without_a_seed_episodes_are_of_training():
    ours, _ = made()
    ours.seed(None)
    ours.reset()
    assert all(info["seed"] in TRAINING_SEEDS for info in ours.reset_infos)
    assert len({info["seed"] for info in ours.reset_infos}) == COUNT


def test_another_autoreset_mode_is_refused():
    with pytest.raises(InputError, match="SAME_STEP"):
        SB3VecEnv(gym.make_vec("LLMServe-v0", num_envs=2, autoreset_mode="NextStep"))
