"""SAC remembers what happened, learns from it, and goes on from a checkpoint as if it had never stopped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from llmserve_env.agents import Shield, play
from llmserve_env.agents.continuous_policy import (
    ContinuousPolicyAgent,
    is_continuous,
    load_continuous_policy,
)
from llmserve_env.agents.find import find_agent
from llmserve_env.agents.policy import CLIP, CONFIG, WEIGHTS, load_policy, save_policy
from llmserve_env.controls import to_array
from llmserve_env.errors import InputError
from llmserve_env.tasks import load_task
from tests.of_every_task import CONTROLS, FEATURES
from train.sac import Arguments, Trainer

ENVS = 4
RESTARTS = [CONTROLS.index(name) for name in ("quantization_tier", "prefill_decode_split")]


def trainer(out: Path, task="bursty_workload", **changes) -> Trainer:
    arguments = {
        "task_id": task, "out": out, "steps": 100 * ENVS, "envs": ENVS, "first": 40 * ENVS, "held": 0.05,
        "explorers": 0.25, "warmup": 5, "replay": 150, "batch": 32, "hidden": 16, "device": "cpu", **changes,
    }  # fmt: skip
    return Trainer(Arguments(**arguments))


def go(trainer: Trainer, windows: int) -> list[dict[str, float]]:
    told = []
    for _ in range(windows):
        trainer.play()
        if not trainer.exploring:
            told.append(trainer.learn())
    return told


def scramble(trainer: Trainer) -> None:
    """Random weights everywhere."""
    torch.manual_seed(3)
    with torch.no_grad():
        for weights in trainer.actor.parameters():
            weights.normal_(0, 0.4)
        trainer.actor.mean.uniform_(0, 1)
        trainer.actor.std.uniform_(0.05, 0.5)


def test_a_cut_off_episode_goes_on_and_a_terminated_one_does_not(tmp_path):
    short = load_task("bursty_workload", horizon_s=20.0)
    low = short.model_copy(update={"max_in_flight": 5})
    ends = {}
    for task in (short, low):
        sac = trainer(tmp_path, task, first=0)
        singles = []  # what each window ended in, seen in an environment that never resets by itself
        batch, observations = sac.env.unwrapped.batch, []
        step = batch.step
        batch.step = lambda *args, step=step, seen=singles, **more: (
            seen.append(step(*args, **more)) or seen[-1]
        )
        go(sac, 2 * short.windows)
        rows = {name: kept[: sac.replay.count] for name, kept in sac.replay.rows.items()}
        observations = np.concatenate([result.observations for result in singles])
        over = np.concatenate([result.terminated | result.truncated for result in singles])
        np.testing.assert_array_equal(rows["following"], observations)  # the last one, not the next first
        np.testing.assert_array_equal(
            rows["terminated"], np.concatenate([result.terminated for result in singles])
        )
        part = {name: torch.from_numpy(kept.copy()) for name, kept in rows.items()}
        part["rewards"] = torch.zeros_like(part["rewards"])
        with torch.no_grad():
            for target in (sac.targets.one, sac.targets.other):
                target[-1].weight.zero_()
                target[-1].bias.fill_(5.0)
            sac.log_temperature.fill_(-30.0)
        ends[task.max_in_flight] = sac.returns_of(part).numpy()[over]
    assert len(ends[None])
    np.testing.assert_allclose(ends[None], 0.99 * 5.0, rtol=1e-6)
    np.testing.assert_array_equal(ends[5][:1], 0.0)


def test_resumed_is_as_if_never_stopped(tmp_path):
    changes = {"task": load_task("bursty_workload", horizon_s=150.0), "held": 0.2}  # the second of 30 windows
    straight = trainer(tmp_path, **changes)
    told = go(straight, 60)
    first = trainer(tmp_path, **changes)
    assert go(first, 50) == told[:11]
    first.save()
    torch.manual_seed(99)  # nothing may hang on what was drawn elsewhere
    second = trainer(tmp_path, **changes)
    second.restore(torch.load(tmp_path / "checkpoint.pt", weights_only=False))
    assert go(second, 10) == told[11:]
    for name in ("actor", "critics", "targets"):
        for key, value in getattr(straight, name).state_dict().items():
            assert torch.equal(value, getattr(second, name).state_dict()[key]), (name, key)
    assert straight.replay.count == straight.replay.size  # it went round
    for name, kept in straight.replay.rows.items():
        np.testing.assert_array_equal(kept, second.replay.rows[name], err_msg=name)
    np.testing.assert_array_equal(straight.env.unwrapped.batch.seeds, second.env.unwrapped.batch.seeds)
    assert straight.finished == second.finished


@pytest.mark.parametrize(("nats", "learns"), [(50.0, True), (0.1, False)])
def test_it_learns_what_earns_most_within_its_budget(tmp_path, nats, learns):
    sac = trainer(
        tmp_path, first=0, learning_rate=3e-3, temperature_rate=0.1, temperature=0.01, nats=nats, batch=64
    )
    random = np.random.default_rng(0)
    box = random.uniform(-1, 1, (150, len(CONTROLS))).astype(np.float32)
    seen = random.random((150, len(FEATURES)), np.float32)
    current = np.tile(sac.start, (150, 1))
    sac.replay.add(
        observations=seen, current=current, box=box, following=seen, set=current,
        rewards=-np.abs(box[:, 0] + 0.4), terminated=np.ones(150),
    )  # fmt: skip
    policy = sac.policy()
    before = policy.box(policy.scaled(seen), current)[:, 0]
    np.testing.assert_allclose(before, sac.start[0], atol=0.1)
    divergence = [sac.learn()["divergence"] for _ in range(150)]
    policy = sac.policy()
    after = policy.box(policy.scaled(seen), current)[:, 0]
    assert divergence[0] < 0.1
    if learns:
        assert np.abs(after + 0.4).mean() < 0.25
    else:
        assert max(divergence[-50:]) < 2.0
        assert after.mean() > 0.3


def test_an_untrained_policy_leaves_the_configuration_alone(tmp_path):
    task = load_task("bursty_workload", horizon_s=100.0)
    sac = trainer(tmp_path, task, first=0, explorers=0.0, warmup=100)
    go(sac, 15)
    assert len(np.unique(sac.replay.rows["box"][:60, 0])) > 50  # noise there is
    changed = sac.replay.rows["current"][:60] != sac.replay.rows["set"][:60]
    assert changed.any()
    assert not changed[:, RESTARTS].any()
    set_by = []
    play(
        ContinuousPolicyAgent(sac.policy()),
        task,
        range(2),
        watch=lambda batch, _: set_by.append(batch.actions.copy()),
    )
    start = to_array([task.start])[0]
    assert all(
        (row[name] == start[name]).all()
        for row in set_by
        for name in CONTROLS
        if name != "kv_budget_fraction"
    )


def test_what_the_task_does_not_grant_has_no_effect(tmp_path):
    sac = trainer(tmp_path, "death_spiral")
    seen, current = torch.rand(5, len(FEATURES)), torch.from_numpy(np.tile(sac.start, (5, 1)))
    noise = torch.randn(5, len(CONTROLS))
    box, divergence = sac.actor.sample(seen, current, noise)
    assert (box[:, RESTARTS] == 0).all()
    with torch.no_grad():
        for head in (sac.actor.move, sac.actor.spread):
            head.bias[RESTARTS] += 2.0
    again, same = sac.actor.sample(seen, current, noise)
    assert torch.equal(box, again)
    assert torch.equal(divergence, same)
    go(sac, 3)
    assert (sac.replay.rows["box"][: 3 * ENVS, RESTARTS] == 0).all()


def test_numpy_computes_what_torch_does(tmp_path):
    sac = trainer(tmp_path)
    scramble(sac)
    save_policy(tmp_path, sac.policy())
    policy = load_continuous_policy(tmp_path)
    random = np.random.default_rng(1)
    seen = random.random((50, len(FEATURES)), np.float32)
    current = random.uniform(-1, 1, (50, len(CONTROLS))).astype(np.float32)
    current[0] = 1.0
    scaled = policy.scaled(seen)
    assert (np.abs(scaled) == CLIP).any()
    with torch.no_grad():
        mean, _, _ = sac.actor(torch.from_numpy(seen), torch.from_numpy(current))
    box = policy.box(scaled, current)
    np.testing.assert_allclose(box, torch.tanh(mean).numpy(), atol=1e-5)
    assert np.isfinite(box).all()
    assert box.std(axis=0).min() > 0.05


def test_it_plays_as_in_the_environment_and_each_episode_apart(tmp_path):
    sac = trainer(tmp_path, load_task("bursty_workload", horizon_s=100.0))
    scramble(sac)
    save_policy(tmp_path / "sac", sac.policy())
    agent = find_agent(str(tmp_path / "sac"), sac.task)
    assert agent.name == "sac"
    observations, _ = sac.env.reset(seed=list(range(ENVS)))
    current = np.tile(sac.start, (ENVS, 1))
    for _ in range(sac.task.windows):
        with torch.no_grad():
            mean, _, _ = sac.actor(torch.from_numpy(observations), torch.from_numpy(current))
        box = torch.tanh(mean).numpy()
        observations, _, _, _, info = sac.env.step(box)
        current = sac.actions.box(sac.actions.records(box))
    scores = play(agent, sac.task, range(ENVS)).scores
    np.testing.assert_allclose(scores, info["final_info"]["score"], atol=1e-4)
    apart = [play(agent, sac.task, [seed]).scores[0] for seed in range(ENVS)]
    np.testing.assert_allclose(scores, apart, atol=1e-12)
    assert isinstance(find_agent(f"shielded:{tmp_path / 'sac'}", sac.task), Shield)


def test_bad_files_are_refused(tmp_path):
    sac = trainer(tmp_path)
    save_policy(tmp_path, sac.policy())
    assert is_continuous(tmp_path)
    with pytest.raises(InputError, match=r"policy\.json"):
        load_policy(tmp_path)  # no policy of logits
    whole = {name: (tmp_path / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    config = json.loads(whole[CONFIG])
    for name, content, told in (
        (WEIGHTS, whole[WEIGHTS][:1000], "damaged"),
        (WEIGHTS, None, "cannot be read"),
        (CONFIG, json.dumps({**config, "hidden": 17}).encode(), "expected shape"),
        (CONFIG, json.dumps({**config, "features": ["mood", *config["features"][1:]]}).encode(), "mood"),
        (CONFIG, json.dumps({**config, "more": 1}).encode(), "more"),
    ):
        (tmp_path / name).unlink()
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=told):
            find_agent(str(tmp_path), sac.task)
        (tmp_path / name).write_bytes(whole[name])
    with pytest.raises(InputError, match="on which the policy was trained"):
        find_agent(str(tmp_path), sac.task).reset(load_task("death_spiral"), [0])
