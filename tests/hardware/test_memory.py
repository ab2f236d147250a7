"""KV blocks: the measured figure, and the formula where there is none."""

from __future__ import annotations

import pytest

from llmserve_env.errors import InputError
from llmserve_env.hardware import load_profile
from llmserve_env.hardware.memory import kv_blocks
from llmserve_env.hardware.profile import Tier, Tiers


@pytest.fixture
def profile():
    """The RTX 4090 with bf16 weights and INT8 ones of half their size."""
    profile = load_profile("rtx4090-llama-3.1-8b")
    fp16 = profile.tiers.FP16
    half = Tier(weight_bytes=fp16.weight_bytes // 2, source="a test")
    return profile.model_copy(update={"tiers": Tiers(FP16=fp16, INT8=half)})


def changed(profile, table, **values):
    return profile.model_copy(update={table: getattr(profile, table).model_copy(update=values)})


def test_rtx_4090_has_what_vllm_reported_less_the_null_block(profile):
    assert kv_blocks(profile) == 2587


def test_the_formula_agrees_with_the_measurement_that_it_was_solved_from(profile):
    assert kv_blocks(changed(profile, "engine", kv_blocks=None)) == 2587


def test_smaller_weights_leave_more_blocks(profile):
    freed = profile.model.weight_bytes // 2
    more = freed // (profile.model.kv_bytes_per_token * 16)
    assert kv_blocks(profile, "INT8") - kv_blocks(profile) in (more, more + 1)


def test_two_gpus_share_the_weights(profile):
    two = changed(changed(profile, "engine", kv_blocks=None), "gpu", count=2)
    share = 25250627584 * 0.9 - profile.engine.reserved_bytes_per_gpu
    assert kv_blocks(two) == (2 * share - 16060522496) // (131072 * 16) - 1


def test_weights_that_do_not_fit_are_refused(profile):
    small = changed(changed(profile, "engine", kv_blocks=None), "gpu", memory_bytes=16_000_000_000)
    with pytest.raises(InputError, match=r"1 x 16\.0 GB leave no KV cache beside 16\.1 GB of FP16"):
        kv_blocks(small)


def test_a_tier_that_the_profile_lacks_is_refused(profile):
    with pytest.raises(InputError, match=r"has no INT4 weights, only FP16, INT8"):
        kv_blocks(profile, "INT4")
