"""Small networks for the tests of training."""

from __future__ import annotations

import pytest
import torch

import llmserve_env
from llmserve_env.agents.policy import PolicyConfig
from llmserve_env.tasks import load_task
from tests.of_every_task import FEATURES
from train.network import Network


@pytest.fixture
def network():
    """Makes networks for a task, with random weights everywhere."""

    def make(task_id="bursty_workload", **changes):
        grid = load_task(task_id).grid
        plain = {
            "package_version": llmserve_env.__version__,
            "task_id": task_id,
            "features": [feature.name for feature in FEATURES],
            "controls": {name: list(values) for name, values in grid.values.items()},
            "frames": 1,
            "hidden": 16,
            "recurrent": False,
        }
        config = PolicyConfig(**{**plain, **changes})
        torch.manual_seed(3)
        net = Network(config)
        with torch.no_grad():
            for weights in net.parameters():
                weights.normal_(0, 0.4)
            net.mean.uniform_(0, 1)
            net.std.uniform_(0.05, 0.5)
        return net

    return make


@pytest.fixture(autouse=True)
def _one_thread():
    """Fastest for networks as small as these, and the same sums on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
