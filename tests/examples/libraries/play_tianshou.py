"""Tianshou: PPO on single environments in its own vector environment."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
from tianshou.algorithm import PPO
from tianshou.algorithm.algorithm_base import policy_within_training_step
from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.utils.net.common import Net
from tianshou.utils.net.continuous import ContinuousActorProbabilistic, ContinuousCritic
from torch.distributions import Independent, Normal

import llmserve_env  # noqa: F401 - registers the ids

WINDOWS = 5


def make() -> gym.Env:
    return gym.make("LLMServeContinuous-v0", task_id="bursty_workload", horizon_s=50.0)


def main() -> None:
    env, spaces = DummyVectorEnv([make, make]), make()
    features, actions = spaces.observation_space.shape, spaces.action_space.shape
    nets = [Net(state_shape=features, hidden_sizes=[16]) for _ in range(2)]
    actor = ContinuousActorProbabilistic(preprocess_net=nets[0], action_shape=actions, unbounded=True)
    policy = ProbabilisticActorPolicy(
        actor=actor,
        dist_fn=lambda found: Independent(Normal(*found), 1),
        action_space=spaces.action_space,
        action_scaling=False,  # the box is [-1, 1] already
    )
    critic = ContinuousCritic(preprocess_net=nets[1])
    ppo = PPO(policy=policy, critic=critic, optim=AdamOptimizerFactory(lr=3e-4))
    collector = Collector(ppo, env, VectorReplayBuffer(100, 2))
    env.seed([3, 4])  # reset(seed=3) would give both the same episode
    collector.reset()
    played = collector.collect(n_episode=4)
    assert played.lens.tolist() == [WINDOWS] * 4
    kept, _ = collector.buffer.sample(0)
    last = kept.truncated
    assert last.sum() == 4
    assert not kept.terminated.any()
    assert np.allclose(sorted(kept.info.score[last] * WINDOWS), sorted(played.returns))
    assert len(set(kept.info.seed.tolist())) == 4
    assert np.isinf(kept.info.action.admission_rate).all()  # not granted by the task
    with policy_within_training_step(policy):
        assert ppo.update(collector.buffer, batch_size=10, repeat=1).gradient_steps == 2


if __name__ == "__main__":
    main()
