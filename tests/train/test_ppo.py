"""PPO goes on from a checkpoint as if it had never stopped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _small import trainer_of, updates

from llmserve_env.agents.policy import save_policy
from llmserve_env.errors import InputError
from llmserve_env.tasks import TRAINING_SEEDS
from tests.of_every_task import FEATURES
from train import ppo
from train.ppo import Statistics

trainer = trainer_of(ppo, 4)


@pytest.mark.parametrize(
    "changes",
    [{}, {"recurrent": True}, {"frames": 3}, {"init": True}],
    ids=["plain", "recurrent", "frames", "from a clone"],
)
def test_resumed_is_as_if_never_stopped(tmp_path, network, changes):
    if changes.get("init"):
        save_policy(tmp_path / "clone", network().policy())
        changes = {"init": tmp_path / "clone", "init_warmup": 1}
    straight = trainer(tmp_path, **changes)
    told = updates(straight, 4)
    first = trainer(tmp_path, **changes)
    assert updates(first, 2) == told[:2]
    first.save()
    torch.manual_seed(99)  # nothing may hang on what was drawn elsewhere
    second = trainer(tmp_path, **changes)
    second.restore(torch.load(tmp_path / "checkpoint.pt", weights_only=False))
    assert updates(second, 2) == told[2:]
    for name, value in straight.net.state_dict().items():
        assert torch.equal(value, second.net.state_dict()[name]), name
    one, other = straight.optimizer.state_dict()["state"], second.optimizer.state_dict()["state"]
    for place, moments in one.items():
        assert all(torch.equal(value, other[place][name]) for name, value in moments.items())
    np.testing.assert_array_equal(straight.stacked, second.stacked)
    assert straight.finished == second.finished
    np.testing.assert_array_equal(straight.env.unwrapped.batch.seeds, second.env.unwrapped.batch.seeds)


def test_running_statistics_are_those_of_all_values():
    values = np.random.default_rng(0).normal(3, 2, (100, 4))
    running = Statistics(np.zeros(4), np.ones(4))
    for part in np.split(values, [1, 30, 31]):
        running.add(part)
    np.testing.assert_allclose(running.mean, values.mean(0), rtol=1e-4)
    np.testing.assert_allclose(running.variance, values.var(0), rtol=1e-3)


def test_what_is_not_to_be_seen_counts_as_nothing(tmp_path):
    blind = trainer(tmp_path, unseen=["oldest_wait", "kv_cache_occupancy"])
    updates(blind, 1)
    policy, names = blind.policy(), [feature.name for feature in FEATURES]
    for name, seen in (("oldest_wait", False), ("kv_cache_occupancy", False), ("queue_depth", True)):
        pair = np.tile(policy.weights["mean"], (2, 1))
        pair[1, names.index(name)] = 1.0
        one, other = policy.scaled(pair)
        assert (np.abs(one - other) > 1e-20).any() == seen, name


def test_only_entries_of_the_observation_can_be_left_unseen(tmp_path):
    with pytest.raises(InputError, match="found 'queue'"):
        trainer(tmp_path, unseen=["queue"])


def test_seeds_never_reach_those_of_evaluation(tmp_path):
    first = trainer(tmp_path, seed=2_148)
    assert int(first.env.unwrapped.batch.seeds.max()) in TRAINING_SEEDS
