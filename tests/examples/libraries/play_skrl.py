"""skrl: PPO on the vector environment in the mode SAME_STEP."""

from __future__ import annotations

import sys

import gymnasium as gym
import torch
from skrl.agents.torch.ppo import PPO, PPO_CFG
from skrl.envs.wrappers.torch import wrap_env
from skrl.memories.torch import RandomMemory
from skrl.models.torch import DeterministicMixin, Model, MultiCategoricalMixin
from skrl.trainers.torch import SequentialTrainer

import llmserve_env  # noqa: F401 - registers the ids

STEPS = 16


class Actor(MultiCategoricalMixin, Model):
    """A linear categorical head for each control."""

    def __init__(self, **spaces):
        Model.__init__(self, **spaces)
        MultiCategoricalMixin.__init__(self)
        self.head = torch.nn.Linear(self.num_observations, int(sum(self.action_space.nvec)))

    def compute(self, inputs, role=""):
        return self.head(inputs["observations"]), {}


class Critic(DeterministicMixin, Model):
    """A linear value."""

    def __init__(self, **spaces):
        Model.__init__(self, **spaces)
        DeterministicMixin.__init__(self)
        self.head = torch.nn.Linear(self.num_observations, 1)

    def compute(self, inputs, role=""):
        return self.head(inputs["observations"]), {}


def main(folder: str) -> None:
    env = wrap_env(gym.make_vec("LLMServe-v0", num_envs=2, task_id="bursty_workload", horizon_s=50.0))
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    agent = PPO(
        models={"policy": Actor(**spaces), "value": Critic(**spaces)},
        memory=RandomMemory(memory_size=STEPS, num_envs=2),
        cfg=PPO_CFG(rollouts=STEPS, experiment={"directory": folder}),
        **spaces,
    )
    before = [each.clone() for each in agent.models["policy"].parameters()]
    options = {"timesteps": STEPS, "headless": True, "disable_progressbar": True}
    SequentialTrainer(env=env, agents=agent, cfg=options).train()
    ends = agent.memory.get_tensor_by_name("truncated").squeeze(-1).nonzero()
    assert ends.tolist() == [[step, row] for step in (4, 9, 14) for row in (0, 1)]
    assert agent.memory.get_tensor_by_name("rewards").sum() > 0
    after = agent.models["policy"].parameters()
    assert any(not torch.equal(*pair) for pair in zip(before, after, strict=True))


if __name__ == "__main__":
    main(sys.argv[1])
