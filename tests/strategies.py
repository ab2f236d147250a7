"""What Hypothesis draws in more than one place."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from llmserve_env.controls import SPECS, ControlSpec
from llmserve_env.schema import ServeAction


def actions(least_rate: float = 0.0) -> st.SearchStrategy[ServeAction]:
    """Any action; an admission rate is above 0, and no less than `least_rate` (requests/s)."""
    values = {name: _values(spec) for name, spec in SPECS.items()}
    most = SPECS["admission_rate"].high
    values["admission_rate"] = st.none() | st.floats(least_rate, most, exclude_min=least_rate == 0)
    return st.builds(ServeAction, **values)


def _values(spec: ControlSpec) -> st.SearchStrategy[Any]:
    """Any value of a control."""
    if spec.options:
        return st.sampled_from(spec.options)
    numbers = st.integers if spec.type is int else st.floats
    found: st.SearchStrategy[Any] = numbers(spec.low, spec.high)
    return st.none() | found if spec.optional else found
