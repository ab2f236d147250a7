"""Controls as the fields of ServeAction declare them: codes, ranges, grids, boxes."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve_env.agents.policy import Setter
from llmserve_env.controls import (
    ACTION,
    CONTROLS,
    SPECS,
    ActionGrid,
    BoxActions,
    check_records,
    to_array,
    to_values,
)
from llmserve_env.errors import InputError
from llmserve_env.schema import EXTRA_GROUPS, GROUPS, ServeAction
from llmserve_env.tasks import load_task
from tests.strategies import actions

START = {name: [value] for name, value in ServeAction().model_dump().items()}
LARGE = ActionGrid(
    {
        **START,
        "batch_cap": range(1, 513),
        "kv_budget_fraction": [0.1 + 0.009 * i for i in range(100)],
        "speculation_depth": range(9),
        "quantization_tier": ["FP16", "INT8", "INT4"],
        "admission_rate": [*range(1, 50), None],
    }
)
"""69 million combinations."""


def test_a_spec_says_what_the_schema_says():
    schema = ServeAction.model_json_schema()["properties"]
    for name, spec in SPECS.items():
        said = schema[name]
        number = next((each for each in said.get("anyOf", [said]) if "maximum" in each), {})
        assert spec.high == number.get("maximum", len(spec.options) - 1)
        if "minimum" in number:
            assert spec.low == number["minimum"]
        assert spec.optional == ("anyOf" in said)
        assert spec.default == getattr(ServeAction(), name)
        assert spec.meaning == " ".join(said["description"].split())
        assert spec.declared.group in (*GROUPS, *EXTRA_GROUPS)
        assert spec.declared.label


@given(actions())
def test_codes_and_values_mean_each_other(action):
    row = to_array([action])[0]
    assert ServeAction(**to_values(row)) == action
    for name, spec in SPECS.items():
        assert spec.code(getattr(action, name)) == row[name]
        assert spec.checked(spec.value(row[name].item())) == row[name]
    assert check_records(to_array([action])).tobytes() == to_array([action]).tobytes()


@pytest.mark.parametrize("name", CONTROLS)
def test_codes_out_of_a_range_are_refused(name):
    spec, records = SPECS[name], to_array([ServeAction()] * 3)
    for code in (spec.low, spec.high):
        records[name][1] = code
        check_records(records)
    bad = [spec.low - 1, spec.high + 1]
    if spec.type is float:
        bad += [math.nan, -math.inf] + ([] if spec.optional else [math.inf])
    for code in bad:
        records[name][1] = code
        with pytest.raises(InputError) as refused:
            check_records(records)
        assert refused.value.field == name
    if spec.optional:
        records[name][1] = math.inf
        check_records(records)


def test_labels_and_texts():
    assert SPECS["batch_cap"].title == "Batch cap (sequences per engine)"
    assert SPECS["priority_routing"].title == "Priority routing"
    assert [SPECS["quantization_tier"].text(code) for code in range(3)] == ["FP16", "INT8", "INT4"]
    assert [SPECS["priority_routing"].text(code) for code in range(2)] == ["off", "on"]
    assert [SPECS["admission_rate"].text(code) for code in (2.5, math.inf)] == ["2.5", "none"]
    assert SPECS["kv_budget_fraction"].range_text == "0.1..1.0"
    assert SPECS["admission_rate"].range_text == "..1000, None"
    assert [SPECS["batch_cap"].nearest(code) for code in (0, 7, 900)] == [1, 7, 512]


def test_a_grid_of_millions_costs_no_more_than_its_values():
    assert LARGE.size == math.prod(LARGE.nvec.tolist()) > 10**7
    tracemalloc.start()
    grid = ActionGrid(LARGE.values)
    picked = grid.at(np.linspace(0, grid.size - 1, 1000).astype(np.int64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000
    assert picked.dtype == ACTION
    assert grid.actions(grid.indices(picked)).tobytes() == picked.tobytes()
    first, last = to_values(picked[0]), to_values(picked[-1])
    assert first == {name: values[0] for name, values in grid.values.items()}
    assert last == {name: values[-1] for name, values in grid.values.items()}


@given(st.lists(st.integers(0, LARGE.size - 1), min_size=1, max_size=20))
def test_the_box_finds_the_points_of_a_large_grid(places):
    box, chosen = BoxActions(LARGE), LARGE.at(places)
    found = box.records(box.box(chosen))
    for name in CONTROLS:
        np.testing.assert_allclose(found[name], chosen[name], atol=1e-6)


def test_the_ends_of_a_grid_are_its_finite_values():
    assert LARGE.ends("admission_rate") == (1.0, 49.0)
    assert LARGE.ends("batch_cap") == (1.0, 512.0)
    assert ActionGrid({**START, "admission_rate": [None]}).ends("admission_rate") == (math.inf, math.inf)
    assert LARGE.granted == (
        *("batch_cap", "kv_budget_fraction", "speculation_depth"),
        *("quantization_tier", "admission_rate"),
    )
    codes = LARGE.codes("quantization_tier")
    codes[:] = 0
    assert LARGE.codes("quantization_tier").tolist() == [0, 1, 2], "a copy"


def test_what_a_policy_does_not_set_stays_as_the_task_starts():
    task = load_task("static_workload")
    some = Setter(["speculation_depth", "batch_cap"], task, 2)
    assert [CONTROLS[column] for column in some.columns] == ["speculation_depth", "batch_cap"]
    drawn = task.grid.actions(task.grid.nvec[None].repeat(2, axis=0) - 1)
    kept = some.kept(drawn.copy())
    start = to_array([task.start])[0]
    for name in CONTROLS:
        expected = drawn[name][0] if name in ("speculation_depth", "batch_cap") else start[name]
        assert kept[name].tolist() == [expected] * 2
