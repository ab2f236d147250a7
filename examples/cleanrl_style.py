"""An actor-critic in one file and one loop, as CleanRL writes them, on `gym.make_vec`.

    python examples/cleanrl_style.py --steps 200000

Each control is a categorical head. Episodes are truncated at their horizon, not terminated: the
value of the observation after it (`final_obs`) belongs to the return. `train/ppo.py` is the trainer to use.
"""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.distributions import Categorical
from tqdm import trange

import llmserve_env  # noqa: F401 - registers the ids


@dataclass
class Arguments:
    """What to learn, and for how long.

    Attributes:
        task_id: id of a task.
        steps: windows to learn from.
        envs: episodes side by side.
        rollout: windows of each between two updates.
        gamma: discount of a window.
        seed: random seed of the network and the first episodes.
    """

    task_id: str = "bursty_workload"
    steps: int = 100_000
    envs: int = 16
    rollout: int = 16
    gamma: float = 0.97
    seed: int = 1


def main(arguments: Arguments) -> list[float]:
    """Train; returns the scores of the episodes that ended, in their order."""
    torch.manual_seed(arguments.seed)
    env = gym.make_vec("LLMServe-v0", num_envs=arguments.envs, task_id=arguments.task_id)
    features, sizes = env.single_observation_space.shape[0], env.single_action_space.nvec.tolist()
    actor = nn.Sequential(nn.Linear(features, 64), nn.Tanh(), nn.Linear(64, sum(sizes)))
    critic = nn.Sequential(nn.Linear(features, 64), nn.Tanh(), nn.Linear(64, 1), nn.Flatten(0))
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], lr=1e-3)
    scores: list[float] = []
    observations = torch.from_numpy(env.reset(seed=arguments.seed)[0])
    print(f"learning {arguments.task_id} from {arguments.steps} windows", flush=True)
    for _ in trange(arguments.steps // (arguments.envs * arguments.rollout), unit="update"):
        log_probs, entropies, values, rewards, goes_on = [], [], [], [], []
        for _ in range(arguments.rollout):
            heads = [Categorical(logits=part) for part in actor(observations).split(sizes, dim=1)]
            actions = [head.sample() for head in heads]
            log_probs.append(sum(head.log_prob(a) for head, a in zip(heads, actions, strict=True)))
            entropies.append(sum(head.entropy() for head in heads))
            values.append(critic(observations))
            seen, reward, terminated, truncated, info = env.step(torch.stack(actions, 1).numpy())
            if truncated.any():
                last = torch.from_numpy(np.stack(info["final_obs"][truncated]))
                reward[truncated] += arguments.gamma * critic(last).detach().numpy()
            over = terminated | truncated
            if over.any():
                scores += info["final_info"]["score"][over].tolist()
            rewards.append(torch.from_numpy(reward).float())
            goes_on.append(torch.from_numpy(~over).float())
            observations = torch.from_numpy(seen)
        returns, after = [], critic(observations).detach()
        for reward, mask in zip(reversed(rewards), reversed(goes_on), strict=True):
            after = reward + arguments.gamma * mask * after
            returns.insert(0, after)
        advantages = torch.stack(returns) - torch.stack(values)
        policy_loss = -(torch.stack(log_probs) * advantages.detach()).mean()
        loss = policy_loss + 0.5 * advantages.square().mean() - 0.01 * torch.stack(entropies).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*actor.parameters(), *critic.parameters()], 0.5)
        optimizer.step()
    few = max(1, len(scores) // 10)
    print(
        f"score {np.mean(scores[:few]):.3f} in the first {few} episodes, {np.mean(scores[-few:]):.3f} at last"
    )
    return scores


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
