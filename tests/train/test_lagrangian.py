"""A price on cost: what is counted, how the price moves, which policy is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _small import ENVS, trainer_of

from llmserve_env.agents import play
from llmserve_env.agents.policy import PolicyAgent, load_policy
from llmserve_env.episode import EpisodeBatch
from llmserve_env.tasks import load_task
from train import lagrangian
from train.lagrangian import merit, moved

trainer = trainer_of(lagrangian, 3)


def test_the_price_rises_over_the_budget_and_falls_below_it_to_zero():
    assert moved(0.5, 0.3, 0.1, 2.0) == pytest.approx(0.9)
    assert moved(0.5, 0.05, 0.1, 2.0) == pytest.approx(0.4)
    assert moved(0.05, 0.0, 0.1, 2.0) == 0.0
    price, cost = 0.0, 0.4
    for _ in range(400):  # a policy that misses less the more it costs settles at its budget
        price = moved(price, cost, 0.1, 0.5)
        cost = 0.4 / (1 + price)
    assert cost == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize(("budget", "up"), [(0.0, True), (1.0, False)])
def test_training_moves_the_price(tmp_path, budget, up):
    first = trainer(tmp_path, cost_budget=budget, multiplier=0.5)
    told = [first.learn(first.collect()) for _ in range(2)]
    assert told[0]["multiplier"] == 0.5  # no episode has ended
    assert "cost" not in told[0]
    assert (told[1]["multiplier"] > 0.5) is up
    assert told[1]["multiplier"] == pytest.approx(max(0.0, 0.5 + told[1]["cost"] - budget))


def test_costs_are_those_of_the_episodes_that_ended(tmp_path):
    first = trainer(tmp_path)
    one = first.collect()
    seeds = first.env.unwrapped.batch.seeds.tolist()
    assert not first.costs
    two = first.collect()
    assert len(first.costs) == ENVS
    batch = EpisodeBatch(first.task, ENVS)
    batch.reset(seeds)
    spent = np.zeros(ENVS)
    for indices in torch.cat([one["actions"], two["actions"]]).numpy()[: first.task.windows]:
        batch.step(first.task.grid.actions(indices))
        spent += batch.costs
    np.testing.assert_allclose(first.costs, spent / first.task.windows, rtol=1e-12)
    assert (spent > 0).all()


def test_the_policy_learns_by_reward_less_priced_cost(tmp_path):
    first = trainer(tmp_path, multiplier=3.0)
    rollout = first.collect()
    advantages = rollout["returns"] - rollout["values"]
    torch.testing.assert_close(
        rollout["advantages"], advantages[..., 0] - 3.0 * advantages[..., 1], rtol=1e-4, atol=1e-4
    )
    assert (rollout["rewards"][..., 1] >= 0).all()
    assert (rollout["rewards"][..., 1] > 0).any()


def test_what_is_kept_says_what_it_cost(tmp_path, monkeypatch):
    monkeypatch.setattr(lagrangian, "VALIDATION", lagrangian.VALIDATION[:4])
    first = trainer(tmp_path)
    first.task = load_task("bursty_workload", horizon_s=200.0)
    told = first.validate()
    spent = []
    play(
        PolicyAgent(load_policy(tmp_path)),
        first.task,
        lagrangian.VALIDATION,
        watch=lambda batch, _: spent.append(batch.costs.mean()),
    )
    assert told["validation_cost"] == pytest.approx(np.mean(spent), rel=1e-9)
    kept = load_policy(tmp_path).config.training["validation"]
    assert (kept["score"], kept["cost"]) == (told["validation"], told["validation_cost"])


def test_whatever_is_within_the_budget_is_better_than_what_is_not():
    ordered = [merit(*each, 0.1) for each in ((0.9, 0.6), (0.9, 0.5), (0.0, 0.1), (0.1, 0.02), (0.2, 0.1))]
    assert ordered == sorted(ordered)
    assert len(set(ordered)) == 5


def test_resumed_is_as_if_never_stopped(tmp_path):
    straight = trainer(tmp_path, multiplier=0.2)
    told = [straight.learn(straight.collect()) for _ in range(3)]
    first = trainer(tmp_path, multiplier=0.2)
    first.learn(first.collect())
    first.save()
    second = trainer(tmp_path, multiplier=0.2)
    second.restore(torch.load(tmp_path / "checkpoint.pt", weights_only=False))
    assert [second.learn(second.collect()) for _ in range(2)] == told[1:]
    for name, value in straight.net.state_dict().items():
        assert torch.equal(value, second.net.state_dict()[name]), name
