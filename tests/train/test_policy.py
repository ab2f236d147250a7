"""A policy plays with NumPy what the network learned with torch, and its files are what they say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from llmserve_env.agents import play
from llmserve_env.agents.policy import (
    CLIP,
    CONFIG,
    WEIGHTS,
    PolicyAgent,
    load_policy,
    save_policy,
    stack,
)
from llmserve_env.errors import InputError
from llmserve_env.tasks import load_task
from tests.of_every_task import CONTROLS, FEATURES

SHAPES = [(False, 1), (False, 4), (True, 1), (True, 3)]


def observations(windows, episodes):
    return np.random.default_rng(1).random((windows, episodes, len(FEATURES)), np.float32)


def indices(net, windows, episodes):
    return np.random.default_rng(2).integers(net.nvec, size=(windows, episodes, len(CONTROLS)))


@pytest.mark.parametrize(("recurrent", "frames"), SHAPES)
def test_numpy_computes_what_torch_does(network, recurrent, frames):
    net = network(recurrent=recurrent, frames=frames)
    policy = net.policy()
    seen, current = observations(5, 7), indices(net, 5, 7)
    ours, theirs = policy.memory(7), torch.zeros(7, 16)
    mean, std = net.mean.numpy(), net.std.numpy()
    scaled = np.clip((seen - mean) / std, -CLIP, CLIP)
    assert (np.abs(scaled) == CLIP).any()
    stacked, rows = None, []
    for t in range(5):
        stacked = stack(stacked, policy.scaled(seen[t]), frames)
        # By hand: frame f of the stack is the observation of f windows before the latest, or the first one.
        by_hand = [scaled[max(t - back, 0)] for back in reversed(range(frames))]
        np.testing.assert_array_equal(stacked, np.concatenate(by_hand, axis=1))
        logits, ours = policy.logits(stacked, current[t], ours)
        with torch.no_grad():
            expected, _, theirs = net(torch.from_numpy(stacked), torch.from_numpy(current[t]), theirs)
        np.testing.assert_allclose(logits, expected.numpy(), atol=1e-5)
        if recurrent:
            np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)
        rows.append((stacked, logits))
    # The sequence that is learned from is the same windows one by one.
    with torch.no_grad():
        begins = torch.zeros(5, 7)
        together, _ = net.sequence(
            torch.from_numpy(np.stack([row[0] for row in rows])),
            torch.from_numpy(current),
            torch.zeros(7, 16),
            begins,
        )
    np.testing.assert_allclose(np.concatenate([row[1] for row in rows]), together.numpy(), atol=1e-5)


def test_staying_counts_for_the_value_that_is_set(network):
    net = network()
    policy = net.policy()
    seen = policy.scaled(observations(1, 1)[0])
    first = np.cumsum([0, *net.nvec[:-1]])
    for control, count in enumerate(net.nvec):
        before, _ = policy.logits(seen, np.zeros((1, len(CONTROLS)), np.int64), policy.memory(1))
        moved = np.zeros((1, len(CONTROLS)), np.int64)
        moved[0, control] = count - 1
        after, _ = policy.logits(seen, moved, policy.memory(1))
        difference = np.zeros(sum(net.nvec))
        difference[first[control]] -= policy.weights["stay"][control]
        difference[first[control] + count - 1] += policy.weights["stay"][control]
        np.testing.assert_allclose(after[0] - before[0], difference, atol=1e-5)


@pytest.mark.parametrize(("recurrent", "frames"), SHAPES)
def test_a_policy_is_the_same_after_a_file(tmp_path, network, recurrent, frames):
    task = load_task("bursty_workload", horizon_s=100.0)
    policy = network(recurrent=recurrent, frames=frames).policy()
    save_policy(tmp_path / "a" / "policy", policy)
    loaded = load_policy(tmp_path / "a" / "policy")
    assert loaded.config == policy.config
    assert set(loaded.weights) == set(policy.weights)
    for name, weights in policy.weights.items():
        np.testing.assert_array_equal(loaded.weights[name], weights)
    before, after = (play(PolicyAgent(each), task, range(4)).scores for each in (policy, loaded))
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("recurrent", [False, True])
def test_episodes_are_played_apart(network, recurrent):
    task = load_task("bursty_workload", horizon_s=200.0)
    agent = PolicyAgent(network(recurrent=recurrent, frames=2).policy())
    together = play(agent, task, range(5)).scores
    apart = [play(agent, task, [seed]).scores[0] for seed in range(5)]
    np.testing.assert_allclose(together, apart, atol=1e-12)
    assert len(set(apart)) > 1


def test_a_network_takes_a_policys_weights_and_keeps_its_critic(network):
    net, other = network(), network()
    with torch.no_grad():
        for weights in other.parameters():
            weights.add_(1.0)
    critic = {name: value.clone() for name, value in other.critic.state_dict().items()}
    other.load(net.policy())
    for name, value in other.policy().weights.items():
        np.testing.assert_array_equal(value, net.policy().weights[name])
    for name, value in other.critic.state_dict().items():
        assert torch.equal(value, critic[name])


def test_files_that_are_missing_or_damaged_are_named(tmp_path, network):
    save_policy(tmp_path, network().policy())
    weights, config = (tmp_path / WEIGHTS).read_bytes(), (tmp_path / CONFIG).read_text()
    for name, content in ((WEIGHTS, weights[: len(weights) // 2]), (WEIGHTS, b""), (CONFIG, config[:50])):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(InputError) as caught:
            load_policy(tmp_path)
        assert caught.value.file == str(tmp_path / name)
        (tmp_path / name).write_bytes(before)
    for name in (WEIGHTS, CONFIG):
        (tmp_path / name).rename(tmp_path / "aside")
        with pytest.raises(InputError, match="cannot be read") as caught:
            load_policy(tmp_path)
        assert caught.value.file == str(tmp_path / name)
        (tmp_path / "aside").rename(tmp_path / name)
    load_policy(tmp_path)


@pytest.mark.parametrize(
    ("change", "file", "told"),
    [
        (lambda config: config.update(hidden=17), WEIGHTS, "expected shape"),
        (lambda config: config.update(recurrent=True), WEIGHTS, "found None"),
        (lambda config: config.update(frames=2), WEIGHTS, "expected shape"),
        (lambda config: config["controls"].update(batch_cap=[1, 2]), WEIGHTS, "expected shape"),
        (lambda config: config["features"].__setitem__(0, config["features"][1]), CONFIG, "a name twice"),
        (lambda config: config["features"].append("more"), CONFIG, "more"),
        (lambda config: config["controls"].pop("batch_cap"), WEIGHTS, "expected shape"),
        (lambda config: config["controls"].update(turbo=[1, 2]), CONFIG, "no such controls: turbo"),
        (lambda config: config.update(format=2), CONFIG, "format"),
        (lambda config: config.update(extra=2), CONFIG, "extra"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, network, change, file, told):
    save_policy(tmp_path, network().policy())
    config = json.loads((tmp_path / CONFIG).read_text())
    change(config)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(InputError, match=told) as caught:
        load_policy(tmp_path)
    assert caught.value.file == str(tmp_path / file)


def test_weights_that_are_no_numbers_are_refused(tmp_path, network):
    net = network()
    save_policy(tmp_path, net.policy())
    from safetensors.numpy import load_file, save_file

    weights = load_file(tmp_path / WEIGHTS)
    weights["heads.bias"][0] = np.nan
    save_file(weights, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match="finite") as caught:
        load_policy(tmp_path)
    assert (caught.value.file, caught.value.field) == (str(tmp_path / WEIGHTS), "heads.bias")


def test_tasks_of_another_grid_are_refused(network):
    agent = PolicyAgent(network("static_workload").policy())
    with pytest.raises(InputError, match="on which the policy was trained"):
        agent.reset(load_task("bursty_workload"), [0])
    agent.reset(load_task("trace_replay"), [0])
