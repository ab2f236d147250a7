"""PPO for all weights of a task's objectives at once: a policy that is told what counts how much.

    python -m train.mo_ppo --task-id bursty_workload --out out/mo

Each episode of LLMServeMO-v0 has a preference, weights of the objectives drawn from a Dirichlet distribution,
which the policy finds at the end of its observation. The critic foretells every objective by itself; what the
policy learns by is the sum of their advantages times the weights (Abels et al., 2019, condition a network so;
weighted sums of a vector critic are those of Felten et al., 2024). How to play: `PolicyAgent(policy,
preference=...)`; without a preference it plays for the task's own weights.
`evaluate.experiments.pareto` shows the front.

Everything else is `train.ppo`, its arguments, log and --resume, too, but that `validation` is the mean, over
`PREFERENCES` and validation seeds, of the weighted objectives.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import VectorWrapper
from gymnasium.vector.utils import batch_space

from llmserve_env.agents.policy import (
    Policy,
    PolicyAgent,
    PolicyConfig,
    load_policy,
    weight_features,
    with_weights,
)
from llmserve_env.errors import InputError
from llmserve_env.objectives import OBJECTIVES, ObjectiveBatch
from llmserve_env.play import play_batch
from llmserve_env.tasks import Task
from train import ppo
from train.ppo import VALIDATION, train

COUNT = len(OBJECTIVES)
CORNERS = np.eye(COUNT)
PREFERENCES = np.array([*CORNERS, *((one + other) / 2 for one, other in combinations(CORNERS, 2))])
"""Each objective alone and each two alike, by which policies are compared while they are trained."""
SEEDS = VALIDATION[:16]
"""On which they are, with each preference."""
_PREFERENCE = 2**31 + 3  # spawn key of the draw of an episode's preference


@dataclass
class Arguments(ppo.Arguments):
    """How to train."""

    out: Path = Path("out/mo")
    """Folder of the policy, the checkpoint and the log."""
    concentration: float = 1.0
    """Concentration of the Dirichlet distribution: at 1 all weights are equally likely, below it extreme ones
    are likelier."""
    init: Path | None = None
    """Folder of a policy of this script to begin with."""


class Preferences(VectorWrapper):
    """Gives every episode a preference, drawn from its seed, and appends it to its observations.

    Args:
        env: of `gym.make_vec("LLMServeMO-v0", ...)`, with resets in the same step.
        concentration: of the Dirichlet distribution.
    """

    def __init__(self, env: Any, concentration: float = 1.0) -> None:
        super().__init__(env)
        self.concentration = concentration
        size = env.single_observation_space.shape[0] + COUNT
        self.single_observation_space = gym.spaces.Box(0.0, 1.0, (size,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)
        self._seeds = np.full(env.num_envs, -1)
        self._weights = np.zeros((env.num_envs, COUNT), np.float32)
        self.played = self._weights
        """float32[n, 4], the weights of the episodes that the last step was of."""

    @property
    def weights(self) -> np.ndarray:
        """float32[n, 4], of the present episodes."""
        seeds = self.env.unwrapped.batch.seeds
        changed = np.flatnonzero(seeds != self._seeds)
        if len(changed):
            self._weights = self._weights.copy()
            for i in changed:
                root = np.random.SeedSequence(int(seeds[i]), spawn_key=(_PREFERENCE,))
                self._weights[i] = np.random.default_rng(root).dirichlet([self.concentration] * COUNT)
            self._seeds = seeds.copy()
        return self._weights

    def reset(self, **arguments: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """As the environment, with preferences."""
        observations, info = self.env.reset(**arguments)
        return with_weights(observations, self.weights), info

    def step(self, actions: np.ndarray) -> tuple[Any, ...]:
        """As the environment, with preferences."""
        self.played = self.weights
        observations, *rest, info = self.env.step(actions)
        for i in np.flatnonzero(info.get("_final_obs", [])):
            info["final_obs"][i] = np.concatenate([info["final_obs"][i], self.played[i]])
        return with_weights(observations, self.weights), *rest, info


class Trainer(ppo.Trainer):
    """PPO for all preferences.

    Args:
        args: how to train.

    Raises:
        InputError: what it is to begin with takes no weights of these objectives.
    """

    VALUES = COUNT

    def __init__(self, args: Arguments) -> None:
        if args.init is not None and load_policy(args.init).config.objectives != list(OBJECTIVES):
            raise InputError(f"expected a policy of train.mo_ppo, found {args.init}", field="init")
        super().__init__(args)

    def make_env(self) -> Any:
        """The episodes, each with its preference."""
        args = self.args
        env = gym.make_vec("LLMServeMO-v0", num_envs=args.envs, task_id=args.task_id, threads=args.threads)
        return Preferences(env, args.concentration)

    def make_config(self) -> PolicyConfig:
        """A policy that takes weights."""
        config = super().make_config()
        features = config.features + weight_features(OBJECTIVES)
        return config.model_copy(update={"features": features, "objectives": list(OBJECTIVES)})

    def scaled_rewards(self, rewards: np.ndarray, info: dict[str, Any], over: np.ndarray) -> np.ndarray:
        """float32[n, 4]: one scale for all, that of weighted returns, so that weights keep their meaning."""
        super().scaled_rewards((rewards * self.env.played).sum(1), info, over)
        return (rewards / np.sqrt(self.returns.variance + 1e-8)).astype(np.float32)

    def weighed(self, rollout: dict[str, torch.Tensor]) -> torch.Tensor:
        """float32[time, n], the advantages times the weights that the policy saw."""
        seen = rollout["stacked"][..., -COUNT:]
        weights = seen * self.net.std[-COUNT:] + self.net.mean[-COUNT:]
        return (rollout["advantages"] * weights).sum(-1)

    def validate(self) -> dict[str, float]:
        """Mean of the weighted objectives over preferences and seeds; keeps the policy if it is the best."""
        policy = self.policy()
        found = [objectives(policy, self.task, each, SEEDS).mean(0) @ each for each in PREFERENCES]
        self.keep(float(np.mean(found)))
        return {"validation": float(np.mean(found))}

    def validation(self) -> dict[str, Any]:
        """What the policy that is kept came to when it was validated."""
        return {
            "seeds": f"{SEEDS.start}..{SEEDS.stop - 1}",
            "preferences": PREFERENCES.tolist(),
            "weighted": self.best,
        }

    def _rescale(self, observations: np.ndarray) -> None:
        super()._rescale(observations)
        share, total = 1 / COUNT, COUNT * self.args.concentration
        self.net.mean[-COUNT:] = share
        self.net.std[-COUNT:] = (share * (1 - share) / (total + 1)) ** 0.5  # of the Dirichlet distribution


def objectives(policy: Policy, task: Task, preference: np.ndarray, seeds: range) -> np.ndarray:
    """float64[seeds, 4], means of the objectives of episodes that a policy plays with a preference."""
    agent = PolicyAgent(policy, preference=preference.tolist())
    return play_batch(agent, ObjectiveBatch(task, len(seeds)), seeds).means


if __name__ == "__main__":
    torch.set_num_threads(1)  # fastest for layers as small as these
    arguments = tyro.cli(Arguments, description=__doc__)
    print(f"best mean of the weighted objectives: {train(arguments, Trainer):.4f}, in {arguments.out}")
