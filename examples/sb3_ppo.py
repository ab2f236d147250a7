"""Stable-Baselines3's PPO, on many episodes in one call of the simulator.

    python examples/sb3_ppo.py --steps 200000

`SB3VecEnv` is a `VecEnv`, so that every algorithm of SB3 takes it as it is. Episodes end by truncation: SB3
bootstraps from `terminal_observation`, and the return that it logs is the score times the number of windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import tyro
from stable_baselines3 import PPO

import llmserve_env  # noqa: F401 - registers the ids
from llmserve_env.envs.sb3 import SB3VecEnv


@dataclass
class Arguments:
    """What to learn, and for how long.

    Attributes:
        task_id: id of a task.
        steps: windows to learn from.
        envs: episodes side by side.
        rollout: windows of each between two updates.
        minibatches: parts of the data of an update.
        seed: random seed of the network, the actions and the first episodes.
    """

    task_id: str = "bursty_workload"
    steps: int = 100_000
    envs: int = 16
    rollout: int = 128
    minibatches: int = 8
    seed: int = 1


def score(model: PPO, task_id: str, first_seed: int, episodes: int) -> float:
    """Mean score of the policy's likeliest actions on episodes that it did not learn from."""
    env = SB3VecEnv(gym.make_vec("LLMServe-v0", num_envs=episodes, task_id=task_id))
    env.seed(first_seed)
    observations, dones = env.reset(), np.zeros(episodes, bool)
    while not dones.all():  # they are of one length
        actions, _ = model.predict(observations, deterministic=True)
        observations, _, dones, infos = env.step(actions)
    return float(np.mean([info["score"] for info in infos]))


def main(arguments: Arguments) -> tuple[PPO, list[float]]:
    """Train; returns the model, and its score before and after."""
    env = SB3VecEnv(gym.make_vec("LLMServe-v0", num_envs=arguments.envs, task_id=arguments.task_id))
    model = PPO(
        "MlpPolicy",
        env,
        n_steps=arguments.rollout,
        batch_size=arguments.envs * arguments.rollout // arguments.minibatches,
        gamma=0.97,
        seed=arguments.seed,
        device="cpu",
    )
    print(f"learning {arguments.task_id} from {arguments.steps} windows", flush=True)
    scores = [score(model, arguments.task_id, 1_000_000, 8)]
    model.learn(arguments.steps, progress_bar=True)
    scores.append(score(model, arguments.task_id, 1_000_000, 8))
    print(f"score {scores[0]:.3f} before, {scores[1]:.3f} after {model.num_timesteps} windows")
    return model, scores


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
