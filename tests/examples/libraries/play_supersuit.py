"""SuperSuit: wrappers around a single environment, and several of them side by side."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import supersuit
from gymnasium.vector import AutoresetMode

import llmserve_env  # noqa: F401 - registers the ids

WINDOWS = 5


def make() -> gym.Env:
    return gym.make("LLMServe-v0", task_id="bursty_workload", horizon_s=50.0)


def main() -> None:
    stacked = supersuit.frame_stack_v1(make(), 3)
    first, _ = stacked.reset(seed=7)
    seen = stacked.step([0] * 7)[0]
    assert seen.shape == stacked.observation_space.shape
    alone = make()
    assert seen[-2 * (features := len(first) // 3) : -features].tolist() == alone.reset(seed=7)[0].tolist()
    assert seen[-features:].tolist() == alone.step([0] * 7)[0].tolist()

    several = supersuit.gym_vec_env_v0(make(), 2)
    assert several.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    several.reset(seed=7)
    ends = [several.step(np.zeros((2, 7), int))[3].tolist() for _ in range(WINDOWS + 2)]
    assert ends == [[False, False]] * 4 + [[True, True]] + [[False, False]] * 2

    baselines = supersuit.stable_baselines3_vec_env_v0(make(), 2)
    baselines.reset()
    for _ in range(WINDOWS):
        _, _, dones, infos = baselines.step(np.zeros((2, 7), int))
    assert dones.all()
    assert all(info["terminal_observation"].shape == (features,) for info in infos)


if __name__ == "__main__":
    main()
