"""Actions as indices, boxes and dictionaries; observations in parts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from llmserve_env.controls import ActionGrid, BoxActions
from llmserve_env.envs import spaces
from llmserve_env.errors import InputError
from llmserve_env.observation import TENANT_SLOTS
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import list_tasks, load_task
from tests.of_every_task import CONTROLS, FEATURES

GRID = ActionGrid(
    {
        **{name: [value] for name, value in ServeAction().model_dump().items()},
        "batch_cap": [8, 16, 32, 64, 128, 256, 512],
        "kv_budget_fraction": [0.5, 0.75, 0.9, 1.0],
        "speculation_depth": [1, 2, 5],
        "quantization_tier": ["FP16", "INT4"],
        "prefill_decode_split": [False],
        "priority_routing": [False, True],
        "admission_rate": [2.0, 10.0, None],
    }
)
BOX = BoxActions(GRID)
TASK = load_task("static_workload")
BOXES = arrays.arrays(np.float32, (4, 7), elements=st.floats(-1, 1, width=32))


def one(**entries: float):
    """The record of a box with some entries set, the others 0."""
    box = np.zeros((1, 7), np.float32)
    for name, value in entries.items():
        box[0, CONTROLS.index(name)] = value
    return BOX.records(box)[0]


@pytest.mark.parametrize("task_id", list_tasks())
def test_every_grid_point_is_a_box(task_id):
    grid = load_task(task_id).grid
    box, everything = BoxActions(grid), grid.all()
    found = box.records(box.box(everything))
    for name in CONTROLS:
        if name == "kv_budget_fraction":
            assert found[name] == pytest.approx(everything[name], abs=1e-6)
        else:
            assert found[name].tolist() == everything[name].tolist()


@given(BOXES)
def test_a_box_and_its_actions_mean_each_other(box):
    actions = BOX.records(box)
    again = BOX.box(actions)
    assert again in spaces.spaces.Box(-1, 1, (4, 7), np.float32)
    assert (again[:, CONTROLS.index("prefill_decode_split")] == 0).all()
    back = BOX.records(again)
    for name in CONTROLS:
        assert back[name] == pytest.approx(actions[name], abs=1e-6)


@given(BOXES)
def test_what_a_box_sets_is_monotone_and_between_the_first_and_last_value(box):
    actions = BOX.records(np.sort(box, axis=0))
    for name in CONTROLS:
        codes = GRID.all()[name]
        assert (actions[name][1:] >= actions[name][:-1]).all()
        assert actions[name].min() >= codes.min()
        assert actions[name].max() <= codes.max()


def test_the_mapping_control_by_control():
    assert [one(batch_cap=x)["batch_cap"] for x in (-1, 0, 1)] == [8, 64, 512]
    assert [one(kv_budget_fraction=x)["kv_budget_fraction"] for x in (-1, 0, 1)] == [0.5, 0.75, 1.0]
    assert [one(speculation_depth=x)["speculation_depth"] for x in (-1, -0.59, 0, 0.61, 1)] == [1, 2, 3, 5, 5]
    assert [one(quantization_tier=x)["quantization_tier"] for x in (-1, -0.01, 0, 1)] == [0, 0, 2, 2]
    assert [one(priority_routing=x)["priority_routing"] for x in (-0.01, 0)] == [0, 1]
    assert [one(prefill_decode_split=x)["prefill_decode_split"] for x in (-1, 1)] == [0, 0]


def test_a_box_is_clipped_and_must_be_numbers():
    assert one(batch_cap=9.0)["batch_cap"] == 512
    assert one(batch_cap=-np.inf)["batch_cap"] == 8
    with pytest.raises(InputError, match=r"action\[0\] \(batch_cap\)': expected a number"):
        one(batch_cap=np.nan)
    with pytest.raises(InputError, match="7 numbers"):
        BOX.records(np.zeros((1, 5)))


def test_a_dictionary_names_the_granted_controls():
    space = spaces.action_dict_space(GRID)
    assert set(space.spaces) == set(CONTROLS) - {"prefill_decode_split"}
    space.seed(0)
    for _ in range(20):
        action = space.sample()
        indices = spaces.from_dict(GRID, action)
        assert indices in spaces.action_space(GRID)
        assert {name: indices[CONTROLS.index(name)] for name in action} == action


@pytest.mark.parametrize("action", [{}, {**dict.fromkeys(CONTROLS, 0)}, {"speed": 1}])
def test_a_dictionary_with_other_controls_is_refused(action):
    with pytest.raises(InputError, match="batch_cap"):
        spaces.from_dict(GRID, action)


@pytest.mark.parametrize("value", [1.5, "1", None, [1, 2]])
def test_a_dictionary_with_what_is_no_index_is_refused(value):
    action = {**dict.fromkeys(GRID.granted, 0), "batch_cap": value}
    with pytest.raises(InputError, match=r"action\['batch_cap'\]': expected a whole number"):
        spaces.from_dict(GRID, action)
    with pytest.raises(InputError, match="field 'action': expected an index for each of batch_cap"):
        spaces.from_dict(GRID, value)


def test_an_observation_in_parts_loses_nothing():
    observation = np.arange(len(FEATURES), dtype=np.float32)
    mask = np.ones(int(TASK.grid.nvec.sum()), bool)
    places = spaces.parts(TASK.groups)
    parts = spaces.to_dict(places, observation / len(FEATURES), mask)
    assert parts in spaces.observation_dict_space(TASK)
    parts = spaces.to_dict(places, observation, mask)
    assert np.concatenate([parts[name].ravel() for name in places]).tolist() == observation.tolist()
    names = [feature.name for feature in FEATURES]
    assert parts["tenants"][1, 0] == names.index("tenant_1_arrival_rate")
    assert parts["tenants"].shape[0] == TENANT_SLOTS
    assert parts["settings"][0] == names.index("set_batch_cap")


def test_a_control_without_any_effect_can_still_be_chosen():
    mask = spaces.action_mask(GRID, lambda action: {"batch_cap": "none works"})
    assert mask[:7].all()
