"""Twins: told of the very requests that come, they are the cell itself."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve_env.agents.mpc.traffic import Requests
from llmserve_env.agents.mpc.twin import Twins, wider
from llmserve_env.episode import EpisodeBatch
from llmserve_env.errors import InputError
from llmserve_env.tasks import load_task


def came(workload, start_s, end_s):
    """The requests of a workload in between."""
    mask = (workload.arrival_s >= start_s) & (workload.arrival_s < end_s)
    fields = (workload.arrival_s, workload.prompt_tokens, workload.output_tokens, workload.tenant)
    return Requests(*(field[mask] for field in fields))


@pytest.mark.parametrize("task_id", ["static_workload", "bursty_workload"])
def test_equals_the_cell_and_so_do_its_copies(task_id):
    whole = load_task(task_id)
    task = load_task(task_id, horizon_s=40 * whole.window_s)
    real = EpisodeBatch(task, 2)
    real.reset([5, 6])
    workloads = [task.requests(seed) for seed in (5, 6)]
    twins, copies = Twins(task, 2, max(map(len, workloads))), Twins(task, 3, 9000)
    rng, span = np.random.default_rng(0), task.window_s
    for window in range(task.windows):
        if window % 7 == 0:
            actions = task.grid.actions(rng.integers(task.grid.nvec, size=(2, len(task.grid.nvec))))
        for i, workload in enumerate(workloads):
            twins.tell(i, came(workload, window * span, (window + 1) * span))
        real.step(actions)
        assert twins.serve(actions, span).tobytes() == real.windows.tobytes()
        if window > 20:  # copies of the second, in the middle of things
            for slot in (0, 2):
                copies.tell(slot, came(workloads[1], window * span, (window + 1) * span))
            copies.serve(np.repeat(actions[1:], 3), span, np.array([True, False, True]))
            assert copies.windows[0].tobytes() == copies.windows[2].tobytes() == real.windows[1].tobytes()
        if window == 20:
            copies.copy_from(np.array([0, 2]), twins, 1)


def test_a_copy_forgets_what_it_was_rolled_through():
    task = load_task("static_workload")
    workload, action = task.requests(3), task.grid.all()
    twins, copies = Twins(task, 1, len(workload)), Twins(task, 1, len(workload))
    twins.tell(0, came(workload, 0.0, 20.0))
    twins.serve(action[:1], 20.0)
    seen = []
    for tried in (action[-1:], action[:1], action[-1:]):
        copies.copy_from(np.array([0]), twins, 0)
        copies.tell(0, came(workload, 20.0, 60.0))
        seen.append([copies.serve(tried, 10.0).tobytes() for _ in range(4)])
    assert seen[0] == seen[2] != seen[1]


def test_room_is_bounded_and_can_be_widened():
    task = load_task("static_workload")
    workload = task.requests(3)
    first, rest = came(workload, 0.0, 5.0), came(workload, 5.0, 10.0)
    twins = Twins(task, 1, len(first.arrival_s))
    twins.tell(0, first)
    twins.serve(task.grid.all()[:1], 5.0)
    with pytest.raises(InputError, match="requests"):
        twins.tell(0, rest)
    more = wider(task, twins, 2000)
    more.tell(0, rest)
    more.serve(task.grid.all()[:1], 5.0)
    assert more.windows["arrived"][0] == len(rest.arrival_s)
    assert more.now_s[0] == 10.0
