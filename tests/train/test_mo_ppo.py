"""One policy for all weights: what it is told, what it learns from, how it plays and is kept."""

from __future__ import annotations

import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from _small import ENVS, ROLLOUT, trainer_of, updates

from llmserve_env.agents import play
from llmserve_env.agents.policy import CONFIG, PolicyAgent, load_policy, save_policy
from llmserve_env.errors import InputError
from llmserve_env.objectives import OBJECTIVES, Objectives
from llmserve_env.tasks import load_task
from tests.of_every_task import FEATURES
from train import mo_ppo, ppo
from train.mo_ppo import Preferences, objectives

TASK = load_task("bursty_workload", horizon_s=200.0)


trainer = trainer_of(mo_ppo, 3)


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """A trainer, and what it collected while episodes ended."""
    first = trainer(tmp_path_factory.mktemp("mo"), frames=2)
    first.collect()
    return first, first.collect()


def test_an_episode_has_the_preference_of_its_seed():
    env = Preferences(gym.make_vec("LLMServeMO-v0", num_envs=3, task_id=TASK))
    observations, _ = env.reset(seed=5)
    first = env.weights
    assert observations in env.observation_space
    np.testing.assert_array_equal(observations[:, -4:], first)
    np.testing.assert_allclose(first.sum(1), 1, rtol=1e-6)
    assert len(np.unique(first)) == 12
    plain = env.env.unwrapped
    for _ in range(TASK.windows):
        observations, _, _, truncated, info = env.step(np.zeros((3, 7), np.int64))
        np.testing.assert_array_equal(env.played, first)
    assert truncated.all()
    np.testing.assert_array_equal(np.stack(info["final_obs"])[:, -4:], first)
    np.testing.assert_array_equal(observations[:, -4:], env.weights)
    assert (env.weights != first).all()
    plain.reset(seed=5)  # by whichever way the episodes came
    np.testing.assert_array_equal(env.weights, first)


def test_advantages_of_several_values_are_those_of_each(collected):
    trainer, rollout = collected
    assert rollout["values"].shape == (ROLLOUT, ENVS, 4)
    assert rollout["over"].any()
    following = torch.arange(4.0 * ENVS).reshape(ENVS, 4)
    together = trainer._advantages(rollout, following)
    for i in range(4):
        each = {name: rollout[name][..., i] for name in ("rewards", "values", "bootstrap")}
        alone = ppo.Trainer._advantages(trainer, {**each, "over": rollout["over"]}, following[:, i])
        torch.testing.assert_close(together[..., i], alone, rtol=0, atol=0)
    assert len({float(together[0, 0, i]) for i in range(4)}) == 4


def test_the_policy_learns_by_the_weights_that_it_saw(collected):
    trainer, rollout = collected
    advantages = rollout["returns"] - rollout["values"]
    by_hand = torch.zeros(ROLLOUT, ENVS)
    ends = rollout["over"].nonzero().tolist()
    present = torch.from_numpy(trainer.env.weights)
    for env in range(ENVS):
        (end,) = [t for t, i in ends if i == env]  # the present episodes began after it
        after = (advantages[end + 1 :, env] * present[env]).sum(-1)
        torch.testing.assert_close(rollout["advantages"][end + 1 :, env], after, rtol=1e-4, atol=1e-5)
        by_hand[end + 1 :, env] = after
    assert by_hand.any()
    assert not torch.allclose(rollout["advantages"], advantages.mean(-1), atol=1e-3)


def test_resumed_is_as_if_never_stopped(tmp_path):
    straight = trainer(tmp_path)
    told = updates(straight, 3)
    first = trainer(tmp_path)
    assert updates(first, 2) == told[:2]
    first.save()
    torch.manual_seed(99)  # nothing may hang on what was drawn elsewhere
    second = trainer(tmp_path)
    second.restore(torch.load(tmp_path / "checkpoint.pt", weights_only=False))
    assert updates(second, 1) == told[2:]
    for name, value in straight.net.state_dict().items():
        assert torch.equal(value, second.net.state_dict()[name]), name
    np.testing.assert_array_equal(straight.stacked, second.stacked)


@pytest.fixture
def policy(network):
    """A policy of random weights that takes preferences."""
    net = network(
        features=[feature.name for feature in FEATURES] + [f"weight_{name}" for name in OBJECTIVES],
        objectives=list(OBJECTIVES),
    )
    return net.policy()


def test_a_policy_answers_to_preferences(policy):
    """By hand: FP16 if quality counts, INT4 if goodput does."""
    weights = {name: np.zeros_like(value) for name, value in policy.weights.items()}
    weights["std"][:] = 1.0
    weights["first.weight"][0, -4] = weights["first.weight"][1, -1] = 1.0
    weights["second.weight"][[0, 1], [0, 1]] = 1.0
    place = sum(len(values) for values in list(policy.config.controls.values())[:3])
    weights["heads.weight"][place + 2, 0] = weights["heads.weight"][place, 1] = 1.0
    built = type(policy)(policy.config, weights)
    seeds = range(4)
    fast, precise = (objectives(built, TASK, np.eye(4)[i], seeds) for i in (0, 3))
    assert (precise[:, 3] / precise[:, 0] > 0.99).all()  # all in FP16
    assert (fast[:, 3] / fast[:, 0] < 0.5).all()
    np.testing.assert_array_equal(objectives(built, TASK, 7 * np.eye(4)[0], seeds), fast)


def test_without_a_preference_it_plays_for_the_tasks_weights(policy):
    own = Objectives(TASK).weights
    scores = play(PolicyAgent(policy), TASK, range(4)).scores
    np.testing.assert_array_equal(play(PolicyAgent(policy, preference=own), TASK, range(4)).scores, scores)
    np.testing.assert_allclose(objectives(policy, TASK, own, range(4)) @ own, scores, rtol=1e-12)
    assert (play(PolicyAgent(policy, preference=[0, 1, 0, 0]), TASK, range(4)).scores != scores).any()


@pytest.mark.parametrize("preference", [[1, 1, 1], [1, -1, 1, 1], [0, 0, 0, 0], [1, np.nan, 0, 0], 1.0])
def test_what_is_no_preference_is_refused(policy, preference):
    with pytest.raises(InputError, match="goodput, latency, cost, quality") as caught:
        PolicyAgent(policy, preference=preference)
    assert caught.value.field == "preference"


def test_a_policy_without_objectives_takes_no_preference(network):
    with pytest.raises(InputError, match="takes none"):
        PolicyAgent(network().policy(), preference=[1, 1, 1, 1])


def test_weights_are_taken_by_name(tmp_path, policy):
    save_policy(tmp_path, policy)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["objectives"].reverse()
    (tmp_path / CONFIG).write_text(json.dumps(config))
    preference = [0.1, 0.2, 0.3, 0.4]
    scores = [
        play(agent, TASK, [3]).scores.tolist()
        for agent in (
            PolicyAgent(policy, preference=preference),
            PolicyAgent(load_policy(tmp_path), preference=preference[::-1]),
        )
    ]
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda config: config.update(objectives=["goodput", "speed"]), "speed"),
        (lambda config: config.update(objectives=["goodput"]), "weight_"),
        (lambda config: config.pop("objectives"), "weight_"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, policy, change, told):
    save_policy(tmp_path, policy)
    assert load_policy(tmp_path).config == policy.config
    config = json.loads((tmp_path / CONFIG).read_text())
    change(config)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(InputError, match=told) as caught:
        load_policy(tmp_path)
    assert caught.value.file == str(tmp_path / CONFIG)


def test_a_policy_written_before_there_were_objectives_is_read(tmp_path, network):
    save_policy(tmp_path, network().policy())
    config = json.loads((tmp_path / CONFIG).read_text())
    del config["objectives"]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert load_policy(tmp_path).config.objectives == []


def test_the_best_is_kept_with_what_it_came_to(tmp_path, network, monkeypatch):
    monkeypatch.setattr(mo_ppo, "SEEDS", mo_ppo.SEEDS[:2])
    first = trainer(tmp_path)
    first.task = TASK
    told = first.validate()
    kept = load_policy(tmp_path)
    assert kept.config.objectives == list(OBJECTIVES)
    assert kept.config.training["validation"]["weighted"] == told["validation"] > 0
    save_policy(tmp_path / "plain", network().policy())
    with pytest.raises(InputError, match=r"train\.mo_ppo"):
        trainer(tmp_path, init=tmp_path / "plain")
