"""How much is played, and of which seed."""

from __future__ import annotations

import pytest

from .schedule import MINUTES

SEEDS = 3
"""Schedules that are played unless more are asked for: one of each number of upstreams."""


BESIDE = 100
"""Requests for each kind of a bad upstream beside a good one, unless more is asked for."""
MANY_BESIDE = 2000


def pytest_addoption(parser):
    group = parser.getgroup("chaos")
    group.addoption("--chaos-seed", type=int, help="play the schedule of this seed only")
    group.addoption("--chaos-minutes", type=float, help="play schedules for so many minutes of their time")


def pytest_generate_tests(metafunc):
    if "seed" not in metafunc.fixturenames:
        return
    # Without this folder on the command line pytest comes to know the options too late to read them.
    seed = metafunc.config.getoption("--chaos-seed", None)
    minutes = metafunc.config.getoption("--chaos-minutes", None)
    count = SEEDS if minutes is None else max(1, round(minutes / MINUTES))
    metafunc.parametrize("seed", range(count) if seed is None else [seed])


@pytest.fixture
def replay(request):
    """The command that plays what a test played once more."""
    return f"pytest tests/chaos --chaos-seed {request.node.callspec.params['seed']}"


@pytest.fixture
def beside(pytestconfig):
    """Requests for each kind of a bad upstream beside a good one."""
    return BESIDE if pytestconfig.getoption("--chaos-minutes", None) is None else MANY_BESIDE
