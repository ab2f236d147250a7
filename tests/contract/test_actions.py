"""Actions as arrays and as indices into a task's grid: there and back, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve_env.controls import ACTION, CONTROLS, ActionGrid, to_action, to_array
from llmserve_env.errors import InputError
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import list_tasks, load_task
from tests.of_every_task import CONTROLS as EVERY_TASK
from tests.strategies import actions

ACTIONS = actions()
VALUES = {
    **{name: (value,) for name, value in ServeAction().model_dump().items()},
    "batch_cap": (8, 64, 512),
    "kv_budget_fraction": (0.1, 0.5, 1.0),
    "speculation_depth": (0, 1, 2, 3, 5),
    "quantization_tier": ("FP16", "INT8", "INT4"),
    "prefill_decode_split": (False, True),
    "priority_routing": (False, True),
    "admission_rate": (0.5, 4.0, 1000.0, None),
}


def test_the_controls_are_those_of_the_schema():
    assert CONTROLS == tuple(ServeAction.model_fields) == ACTION.names


@given(st.lists(ACTIONS, max_size=5))
def test_actions_go_through_arrays_unchanged(actions):
    array = to_array(actions)
    assert array.dtype == ACTION
    assert [to_action(row) for row in array] == actions


@pytest.mark.parametrize("task_id", list_tasks())
def test_a_grid_knows_the_place_of_each_of_its_points(task_id):
    grid = load_task(task_id).grid
    everything = grid.all()
    assert len(everything) == grid.nvec.prod() == len(np.unique(everything))
    indices = grid.indices(everything)
    assert (indices >= 0).all()
    assert (indices < grid.nvec).all()
    assert grid.actions(indices).tobytes() == everything.tobytes()
    assert (np.diff(np.ravel_multi_index(tuple(indices.T), grid.nvec)) == 1).all(), "the last changes fastest"
    for row, index in zip(everything[::37], indices[::37], strict=True):
        values = {name: grid.values[name][k] for name, k in zip(grid.values, index, strict=True)}
        assert to_action(row) == ServeAction(**values)


@pytest.mark.parametrize("task_id", list_tasks())
def test_a_control_that_is_not_granted_stays_as_it_starts(task_id):
    task = load_task(task_id)
    for name, count in zip(task.grid.values, task.grid.nvec, strict=True):
        if name in task.controls:
            assert count == len(task.controls[name])
        else:
            assert task.grid.values[name] == (task.start.model_dump()[name],)
    assert (task.grid.actions(task.grid.indices(to_array([task.start]))) == to_array([task.start])).all()


@given(ACTIONS)
def test_the_nearest_point_is_found(action):
    grid = ActionGrid(VALUES)
    (index,) = grid.indices(to_array([action]))
    for name, place in zip(grid.values, index, strict=True):
        if name == "admission_rate" and action.admission_rate is None:
            assert VALUES[name][place] is None
        elif name == "admission_rate":
            rates = [rate for rate in VALUES[name] if rate is not None]
            distance = [abs(rate - action.admission_rate) for rate in rates]
            assert place == distance.index(min(distance))
        elif name in ("batch_cap", "kv_budget_fraction", "speculation_depth"):
            distance = [abs(value - getattr(action, name)) for value in VALUES[name]]
            assert place == distance.index(min(distance))
        else:
            assert VALUES[name][place] == getattr(action, name)


def test_the_lower_of_two_as_near_is_taken():
    grid = ActionGrid({**VALUES, "batch_cap": (10, 20)})
    assert grid.indices(to_array([ServeAction(batch_cap=15)]))[0, 0] == 0


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"batch_cap": ()}, "batch_cap"),
        ({"batch_cap": (0, 8)}, "batch_cap"),
        ({"batch_cap": (8, 513)}, "batch_cap"),
        ({"batch_cap": (64, 8)}, "batch_cap"),
        ({"batch_cap": (8, 8)}, "batch_cap"),
        ({"batch_cap": ("many",)}, "batch_cap"),
        ({"kv_budget_fraction": (0.05, 1.0)}, "kv_budget_fraction"),
        ({"kv_budget_fraction": (float("nan"),)}, "kv_budget_fraction"),
        ({"speculation_depth": (0, 9)}, "speculation_depth"),
        ({"quantization_tier": ("FP16", "FP8")}, "quantization_tier"),
        ({"quantization_tier": ("INT8", "FP16")}, "quantization_tier"),
        ({"admission_rate": (0.0, 4.0)}, "admission_rate"),
        ({"admission_rate": (4.0, 1001.0)}, "admission_rate"),
        ({"admission_rate": (None, 4.0)}, "admission_rate"),
        ({"admission_rate": (4.0, None, None)}, "admission_rate"),
        ({"turbo": (1, 2)}, "turbo"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(changes, field):
    with pytest.raises(InputError) as refused:
        ActionGrid({**VALUES, **changes})
    assert refused.value.field == field


def test_a_grid_without_a_control_is_refused():
    for name in EVERY_TASK:
        with pytest.raises(InputError, match=name):
            ActionGrid({other: values for other, values in VALUES.items() if other != name})
