"""PPO under a budget: the greatest score that misses no more SLOs than it may.

    python -m train.lagrangian --task-id bursty_workload --cost-budget 0.1 --out out/lagrangian

The cost of an episode is the mean of `info["cost"]` over its windows: the weight of the requests that missed
their SLO, as a share of the weight of all. The task's own reward is maximised, and a multiplier prices the
cost: the policy learns by the advantage of the reward less the multiplier times that of the cost, each with
a critic's value of its own. After an update whose windows ended episodes the multiplier moves by how far
these were over the budget, and never below 0 (Lagrangian PPO, Ray et al., 2019):

    multiplier = max(0, multiplier + rate x share of the episodes that ended x (their mean cost - budget))

Why the task's reward, of which goodput is a part already: where the budget does not bind the multiplier is 0
and this is `train.ppo`; where it is tighter than what that would reach, as for a service that has promised
more than its task's weights ask for, the multiplier is what a missed SLO costs on top, in the reward's unit,
and what the score loses against `train.ppo` is the price of the promise.

Kept is the policy with the best score among those within the budget on the validation seeds, or, as long as
there is none, the one with the least cost. The log is that of `train.ppo`, and

    cost             mean cost of the episodes that ended since the last line
    multiplier       after the update
    validation_cost  mean cost of the likeliest actions on the validation seeds
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from llmserve_env.agents import play
from llmserve_env.agents.policy import PolicyAgent, load_policy
from train import ppo
from train.ppo import VALIDATION, train


@dataclass
class Arguments(ppo.Arguments):
    """How to train."""

    out: Path = Path("out/lagrangian")
    """Folder of the policy, the checkpoint and the log."""
    cost_budget: float = 0.1
    """Mean cost of an episode that is allowed, 0..1."""
    multiplier: float = 0.0
    """Multiplier of the cost at first."""
    multiplier_rate: float = 1.0
    """Rate at which the multiplier moves."""


class Trainer(ppo.Trainer):
    """PPO whose reward has a price on cost.

    Args:
        args: how to train.
    """

    VALUES = 2
    STATE = (*ppo.Trainer.STATE, "multiplier", "spent", "costs", "kept")

    def __init__(self, args: Arguments) -> None:
        super().__init__(args)
        self.multiplier = args.multiplier
        self.spent = np.zeros(args.envs)  # costs of the episodes so far
        self.costs: list[float] = []  # mean costs of those that ended
        self.kept: dict[str, float] = {}  # what the policy that is kept came to

    def scaled_rewards(self, rewards: np.ndarray, info: dict[str, Any], over: np.ndarray) -> np.ndarray:
        """float32[n, 2]: reward and cost, in one unit."""
        scaled = super().scaled_rewards(rewards, info, over)
        costs = info["cost"]
        if over.any():  # what the info says of these is of the next episode
            costs = np.where(over, info["final_info"]["cost"], costs)
        self.spent = self.spent + costs
        self.costs += (self.spent[over] / self.task.windows).tolist()
        self.spent[over] = 0.0
        return np.stack([scaled, costs / np.sqrt(self.returns.variance + 1e-8)], 1).astype(np.float32)

    def weighed(self, rollout: dict[str, torch.Tensor]) -> torch.Tensor:
        """float32[time, n], the advantage of the reward less the priced one of the cost."""
        return rollout["advantages"][..., 0] - self.multiplier * rollout["advantages"][..., 1]

    def learn(self, rollout: dict[str, torch.Tensor]) -> dict[str, float]:
        """Update the network, then the multiplier, unless the policy waits for its critic."""
        warming = self.clone is not None and self.update < self.args.init_warmup
        told = super().learn(rollout)
        if warming:
            self.costs = []
        if self.costs:
            cost, share = float(np.mean(self.costs)), len(self.costs) / self.args.envs
            rate = share * self.args.multiplier_rate
            self.multiplier = moved(self.multiplier, cost, self.args.cost_budget, rate)
            self.costs = []
            told["cost"] = cost
        return told | {"multiplier": self.multiplier}

    def validate(self) -> dict[str, float]:
        """Mean score and cost of the likeliest actions on the validation seeds."""
        spent = 0.0

        def watch(batch: Any, _: Any) -> None:
            nonlocal spent
            spent += batch.costs.sum()

        score = float(play(PolicyAgent(self.policy()), self.task, VALIDATION, watch=watch).scores.mean())
        cost = float(spent) / len(VALIDATION) / self.task.windows
        told = {"validation": score, "validation_cost": cost}
        before, self.kept = self.kept, told
        if not self.keep(merit(score, cost, self.args.cost_budget)):
            self.kept = before
        return told

    def validation(self) -> dict[str, Any]:
        """What the policy that is kept came to when it was validated."""
        return {
            "seeds": f"{VALIDATION.start}..{VALIDATION.stop - 1}",
            "score": self.kept.get("validation"),
            "cost": self.kept.get("validation_cost"),
            "multiplier": self.multiplier,
        }


def moved(multiplier: float, cost: float, budget: float, rate: float) -> float:
    """The multiplier after a step: up if the cost is above the budget, else down, but never below 0."""
    return max(0.0, multiplier + rate * (cost - budget))


def merit(score: float, cost: float, budget: float) -> float:
    """By which policies are compared: the score within the budget, else minus how far it is overdrawn."""
    return score if cost <= budget else budget - cost


if __name__ == "__main__":
    torch.set_num_threads(1)  # fastest for layers as small as these
    arguments = tyro.cli(Arguments, description=__doc__)
    train(arguments, Trainer)
    found = load_policy(arguments.out).config.training["validation"]
    print(
        f"on the validation seeds: score {found['score']:.4f}, cost {found['cost']:.4f} of a budget of "
        f"{arguments.cost_budget:g}, in {arguments.out}"
    )
