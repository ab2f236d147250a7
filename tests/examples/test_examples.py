"""The examples run, and what they print is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from llmserve_env.agents import load_agent, play
from llmserve_env.commands.dataset import OnGrid
from llmserve_env.tasks import load_task

ROOT = Path(__file__).parents[2]
TASK = "bursty_workload"
WINDOWS = load_task(TASK).windows


@pytest.fixture(autouse=True)
def _one_thread():
    """Networks are the same on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings(
    "ignore:rich is experimental"
)  # its progress bar, ignored only at the first import
def test_stable_baselines_learns_from_whole_episodes():
    from examples import sb3_ppo

    arguments = sb3_ppo.Arguments(steps=2 * WINDOWS, envs=2, rollout=WINDOWS)
    model, scores = sb3_ppo.main(arguments)
    assert model.num_timesteps == arguments.steps
    assert [episode["l"] for episode in model.ep_info_buffer] == [WINDOWS] * 2
    assert scores[0] != scores[1]

    env = gym.make("LLMServe-v0", task_id=TASK)
    observation, info = env.reset(seed=7)
    for _ in range(WINDOWS):
        observation, _, _, truncated, info = env.step(model.predict(observation, deterministic=True)[0])
    assert truncated
    assert sb3_ppo.score(model, TASK, 7, 1) == info["score"]


def test_cleanrl_style_counts_whole_episodes():
    from examples import cleanrl_style

    arguments = cleanrl_style.Arguments(steps=2 * 3 * WINDOWS, envs=3, rollout=WINDOWS // 4)
    scores = cleanrl_style.main(arguments)
    assert len(scores) == 6
    assert len(set(scores)) == 6
    assert all(0 < score < 1 for score in scores)
    assert cleanrl_style.main(arguments) == scores


def test_a_clone_of_a_constant_is_that_constant():
    from examples import minari_dataset

    found = minari_dataset.main(minari_dataset.Arguments(TASK, "best-constant", episodes=2, epochs=40))
    task = load_task(TASK)
    player = OnGrid(load_agent("best-constant", task))
    assert found["agreement"] == 1
    assert found["clone"] == play(player, task, [1_000_000]).scores[0]
    assert found["teacher"] == pytest.approx(np.mean(play(player, task, range(2)).scores))


def test_rllib_sees_whole_episodes():
    # A process of its own: RLlib's imports warn, and Ray's processes end with it.
    given = ["--iterations", "1", "--batch", "60", "--envs", "2", "--horizon-s", "50"]
    done = subprocess.run(
        [sys.executable, "examples/rllib_ppo.py", *given],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    windows = load_task(TASK, horizon_s=50.0).windows
    (said,) = re.findall(r"^iteration 1: (\d+) windows, episodes of (.+), score (.+)$", done.stdout, re.M)
    assert int(said[0]) >= 60
    assert float(said[1]) == windows
    assert 0 <= float(said[2]) <= 1
