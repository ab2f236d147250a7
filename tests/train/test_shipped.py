"""Every policy in weights/ is whole, plays its task, and says how it was made."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

from llmserve_env.agents import load_agent
from llmserve_env.agents.policy import CONFIG, WEIGHTS, load_policy, stack
from llmserve_env.agents.trained import SHIPPED, weights_root
from llmserve_env.tasks import load_task
from train import bc, ppo
from train.network import Network

FOLDERS = sorted(path.parent for path in weights_root().glob(f"*/*/{CONFIG}"))
shipped = pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}/{path.name}")


def test_tasks_have_all_policies_or_none():
    tasks = {folder.parent for folder in FOLDERS}
    assert [task / name for task in sorted(tasks) for name in sorted(SHIPPED)] == FOLDERS
    index = (weights_root() / "README.md").read_text()
    listed = re.findall(r"\]\((\S+)/README.md\)", index)
    assert sorted(listed) == [f"{folder.parent.name}/{folder.name}" for folder in FOLDERS]


@shipped
def test_it_plays_its_task(folder: Path) -> None:
    task = load_task(folder.parent.name)
    config = load_agent(folder.name, task).policy.config
    assert config.controls == {name: list(values) for name, values in task.grid.values.items()}
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS, "README.md"}


@shipped
def test_numpy_computes_what_torch_does(folder: Path) -> None:
    policy = load_policy(folder)
    net, drawn = Network(policy.config), np.random.default_rng(1)
    net.load(policy)
    ours, theirs, stacked = policy.memory(16), torch.zeros(16, policy.config.hidden), None
    for _ in range(8):
        noise = drawn.normal(0, 4, (16, len(policy.config.features))).astype(np.float32)  # some is clipped
        seen = policy.weights["mean"] + policy.weights["std"] * noise
        current = drawn.integers(net.nvec, size=(16, len(net.nvec)))
        stacked = stack(stacked, policy.scaled(seen), policy.config.frames)
        logits, ours = policy.logits(stacked, current, ours)
        with torch.no_grad():
            expected, _, theirs = net(torch.from_numpy(stacked), torch.from_numpy(current), theirs)
        np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-5, atol=1e-5)


@shipped
def test_the_command_in_its_card_made_it(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    python, dash_m, module, *flags = shlex.split(re.findall(r"^```\n(.*)\n```$", card, re.M)[0])
    trainer = {"train.ppo": ppo, "train.bc": bc}[module]
    parsed = tyro.cli(trainer.Arguments, args=flags)
    assert (python, dash_m, parsed.task_id) == ("python", "-m", folder.parent.name)
    assert folder.name == ("bc" if trainer is bc else f"ppo-{parsed.seed}")
    training = load_policy(folder).config.training
    for name, value in training["arguments"].items():
        found = getattr(parsed, name)
        assert (str(found) if isinstance(found, Path) else found) == value, name
    assert not re.findall(r"(?<![\w.])/(?:tmp|work|home|root)\b", card + (folder / CONFIG).read_text())
    assert training["commit"] in card
