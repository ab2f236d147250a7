"""The workload record: what it refuses, and what its methods keep."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve_env.errors import InputError
from llmserve_env.workloads import Tenant, Workload

FIELDS = {
    "arrival_s": [0.0, 1.0, 3.0],
    "prompt_tokens": [16, 32, 48],
    "output_tokens": [1, 2, 3],
    "tenant": [0, 1, 0],
    "tenants": (Tenant("a"), Tenant("b")),
    "prefix_block_tokens": 16,
    "prefix_offsets": [0, 1, 3, 6],
    "prefix_ids": [7, 7, 8, 7, 8, 9],
    "request_ids": ("x", "y", "z"),
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("arrival_s", [0.0, 3.0, 1.0]),
        ("arrival_s", [-1.0, 0.0, 1.0]),
        ("arrival_s", [0.0, 1.0, float("nan")]),
        ("prompt_tokens", [0, 1, 1]),
        ("prompt_tokens", [1, 1]),
        ("output_tokens", [1, 0, 1]),
        ("tenant", [0, 2, 0]),
        ("tenant", [0, -1, 0]),
        ("prefix_offsets", [0, 6]),
    ],
)
def test_refuses_what_is_no_workload(field, value):
    with pytest.raises(InputError) as caught:
        Workload(**{**FIELDS, field: value})
    assert caught.value.field == field


def test_take_keeps_what_belongs_together():
    taken = Workload(**FIELDS).take(np.array([0, 2]))
    assert taken.arrival_s.tolist() == [0, 3]
    assert taken.prompt_tokens.tolist() == [16, 48]
    assert taken.tenant.tolist() == [0, 0]
    assert taken.prefix_offsets.tolist() == [0, 1, 4]
    assert taken.prefix_ids.tolist() == [7, 7, 8, 9]
    assert taken.request_ids == ("x", "z")
    assert len(Workload(**FIELDS).take(np.array([], np.int64))) == 0


def test_scaled_arrives_faster():
    assert Workload(**FIELDS).scaled(2.0).arrival_s.tolist() == [0, 0.5, 1.5]
    with pytest.raises(InputError, match="scale"):
        Workload(**FIELDS).scaled(0.0)


def test_tiled_repeats_without_prefixes():
    tiled = Workload(**FIELDS).tiled(7)
    assert tiled.arrival_s.tolist() == [0, 1, 3, 4, 5, 7, 8]
    assert tiled.output_tokens.tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert tiled.prefix_block_tokens == 0
    assert [tiled.request_id(i) for i in (0, 6)] == ["0", "6"]
