"""RLlib's PPO (new API stack).

    python examples/rllib_ppo.py --iterations 20 --runners 2

Runners are processes, on any nodes of a Ray cluster (`--ray auto`); "llmserve_env:" before the id has each of
them register the environment. RLlib takes our vector environment, in the autoreset mode NEXT_STEP
that it expects.
"""

from __future__ import annotations

from dataclasses import dataclass

import ray
import tyro
from ray.rllib.algorithms.ppo import PPOConfig


@dataclass
class Arguments:
    """What to learn, and for how long.

    Attributes:
        task_id: id of a task.
        iterations: rounds of collecting and learning.
        batch: windows of an iteration.
        runners: processes that play, none to play in this one.
        ray: address of the cluster; local starts one here.
        envs: episodes side by side in each process.
        horizon_s: length of an episode (default: the task's).
        seed: random seed of the networks and the episodes.
    """

    task_id: str = "bursty_workload"
    iterations: int = 10
    batch: int = 4096
    runners: int = 0
    ray: str = "local"
    envs: int = 8
    horizon_s: float | None = None
    seed: int = 1


def main(arguments: Arguments) -> None:
    """Train, and print the mean reward of a window, which is the score of episodes."""
    print(f"starting Ray ({arguments.ray}), then {arguments.iterations} iterations", flush=True)
    local = {"include_dashboard": False} if arguments.ray == "local" else {}  # it takes longer than a lesson
    ray.init(arguments.ray, log_to_driver=False, logging_level="ERROR", **local)
    config = (
        PPOConfig()
        .environment(
            "llmserve_env:LLMServe-v0",
            env_config={
                "task_id": arguments.task_id,
                "horizon_s": arguments.horizon_s,
                "autoreset_mode": "NextStep",
            },
        )
        .env_runners(
            num_env_runners=arguments.runners,
            num_envs_per_env_runner=arguments.envs,
            gym_env_vectorize_mode="vector_entry_point",
        )
        .training(
            train_batch_size_per_learner=arguments.batch,
            minibatch_size=min(256, arguments.batch),
            gamma=0.97,
            lr=3e-4,
        )
        .debugging(seed=arguments.seed)
    )
    algorithm = config.build_algo()
    for iteration in range(1, arguments.iterations + 1):
        found = algorithm.train()["env_runners"]
        windows, length = int(found["num_env_steps_sampled_lifetime"]), found["episode_len_mean"]
        score = found["episode_return_mean"] / length
        print(
            f"iteration {iteration}: {windows} windows, episodes of {length:g}, score {score:.3f}", flush=True
        )
    algorithm.stop()
    ray.shutdown()


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
