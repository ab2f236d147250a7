"""What Hypothesis draws in more than one place."""

from __future__ import annotations

from hypothesis import strategies as st

from llmserve_env.schema import QuantizationTier, ServeAction


def actions(least_rate: float = 0.0) -> st.SearchStrategy[ServeAction]:
    """Any action; an admission rate is above 0, and no less than `least_rate` (requests/s)."""
    return st.builds(
        ServeAction,
        batch_cap=st.integers(1, 512),
        kv_budget_fraction=st.floats(0.1, 1.0),
        speculation_depth=st.integers(0, 8),
        quantization_tier=st.sampled_from(QuantizationTier),
        prefill_decode_split=st.booleans(),
        priority_routing=st.booleans(),
        admission_rate=st.none() | st.floats(least_rate, 1000, exclude_min=least_rate == 0),
    )
