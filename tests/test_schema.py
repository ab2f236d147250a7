"""The action's bounds hold, it takes no unknown fields, and JSON carries it unchanged."""

from __future__ import annotations

import pytest
from hypothesis import given
from pydantic import ValidationError

from llmserve_env.controls import SPECS
from llmserve_env.schema import QuantizationTier, ServeAction
from tests.strategies import actions

ACTIONS = actions()


@given(ACTIONS)
def test_json_round_trip(action):
    assert ServeAction.model_validate_json(action.model_dump_json()) == action
    assert ServeAction.model_validate(action.model_dump(mode="json")) == action
    assert hash(action) == hash(action.model_copy())


@pytest.mark.parametrize(
    ("field", "low", "high", "below", "above"),
    [
        ("batch_cap", 1, 512, 0, 513),
        ("kv_budget_fraction", 0.1, 1.0, 0.0999, 1.0001),
        ("speculation_depth", 0, 8, -1, 9),
    ],
)
def test_bounds(field, low, high, below, above):
    for value in (low, high):
        assert getattr(ServeAction(**{field: value}), field) == value
    for value in (below, above, None, "many", float("nan")):
        with pytest.raises(ValidationError, match=field):
            ServeAction(**{field: value})


def test_whole_numbers_are_whole():
    for field in ("batch_cap", "speculation_depth"):
        with pytest.raises(ValidationError, match=field):
            ServeAction(**{field: 2.5})


def test_tiers_are_named():
    assert [tier.value for tier in QuantizationTier] == ["FP16", "INT8", "INT4"]
    assert ServeAction(quantization_tier="INT8").quantization_tier is QuantizationTier.INT8
    for value in ("int8", "FP8", 1):
        with pytest.raises(ValidationError, match="quantization_tier"):
            ServeAction(quantization_tier=value)


def test_infinity_is_none_where_that_may_be():
    for name, spec in SPECS.items():
        if spec.optional:
            assert ServeAction(**{name: float("inf")}) == ServeAction(**{name: None})
        else:
            with pytest.raises(ValidationError, match=name):
                ServeAction(**{name: float("inf")})
    with pytest.raises(ValidationError, match="admission_rate"):
        ServeAction(admission_rate=-float("inf"))


def test_unknown_fields_are_refused():
    with pytest.raises(ValidationError, match="batch_size"):
        ServeAction(batch_size=8)
    with pytest.raises(ValidationError, match="gpu"):
        ServeAction.model_validate_json('{"gpu": 1}')


def test_it_does_not_change():
    action = ServeAction()
    with pytest.raises(ValidationError, match="frozen"):
        action.batch_cap = 8


def test_the_default_is_plain_vllm():
    plain = {
        "batch_cap": 256,
        "kv_budget_fraction": 1.0,
        "speculation_depth": 0,
        "quantization_tier": "FP16",
        "prefill_decode_split": False,
        "priority_routing": False,
        "admission_rate": None,
    }
    assert ServeAction().model_dump(mode="json").items() >= plain.items()
