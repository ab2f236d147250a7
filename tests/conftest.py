"""Fixtures for all tests."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import llmserve_env
from llmserve_env.agents import trained
from llmserve_env.agents.policy import Policy, PolicyConfig, save_policy, shapes
from llmserve_env.tasks import Task, load_task
from tests.of_every_task import FEATURES

# A shell without job control starts what it puts into the background with interrupts ignored, which processes
# that tests start, to interrupt them, would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long examples take is no property of the code: a busy machine would fail them.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public measurements beside the checkout; tests that need it are skipped without it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the public measurements in {folder}, which are not part of the project")
    return folder


@pytest.fixture(scope="session")
def random_policy() -> Callable[..., Policy]:
    """Makes policies of random weights for a task."""

    def make(task: Task, seed: int = 0) -> Policy:
        config = PolicyConfig(
            package_version=llmserve_env.__version__,
            task_id=task.id,
            features=[feature.name for feature in FEATURES],
            controls={name: list(values) for name, values in task.grid.values.items()},
            frames=1,
            hidden=8,
            recurrent=False,
        )
        drawn = np.random.default_rng(seed)
        weights = {name: drawn.random(shape, np.float32) for name, shape in shapes(config).items()}
        return Policy(config, weights)

    return make


@pytest.fixture
def ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_policy: Callable[..., Policy]):
    """Takes the weights away, and ships random ones as ppo of the tasks that it is called with."""
    monkeypatch.setattr(trained, "_PACKAGE", tmp_path / "llmserve_env")

    def put(*task_ids: str) -> None:
        for task_id in task_ids:
            save_policy(tmp_path / "weights" / task_id / "ppo-1", random_policy(load_task(task_id)))

    return put
