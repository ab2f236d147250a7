"""Precision tiers: of every shipped profile, and against the predictions that their factors come from."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve_env.hardware.constants import constants
from llmserve_env.hardware.latency import compile_latency, iteration_time
from llmserve_env.hardware.predictions import read_points
from llmserve_env.hardware.profile import TIERS, list_profiles, load_profile
from llmserve_env.hardware.tiers import linear_parameters, tier_factors, tiers_for

MEASURED = {
    ("INT8", "NVIDIA H100 80GB HBM3"): ("h100-llama-3.1-8b", "h100_sxm", "vllm", "fp8"),
    ("INT8", "NVIDIA A100-SXM4-80GB"): ("a100-llama-3.1-8b", "a100_sxm", "trtllm", "int8_wo"),
    ("INT4", "NVIDIA A100-SXM4-80GB"): ("a100-llama-3.1-8b", "a100_sxm", "trtllm", "int4_wo"),
}


def factors(tier: str, gpu: str):
    (found,) = [entry for entry in tier_factors() if entry.name == tier and gpu in entry.gpus]
    return found


@pytest.mark.parametrize("name", list_profiles())
def test_every_profile_has_three_tiers_of_falling_size_and_quality(name):
    profile = load_profile(name)
    assert profile.tier_names == TIERS
    tiers = [profile.tier(tier) for tier in TIERS]
    assert tiers[0].weight_bytes == profile.model.weight_bytes
    assert tiers[0].weight_bytes > tiers[1].weight_bytes > tiers[2].weight_bytes
    assert tiers[0].quality == 1.0 > tiers[1].quality > tiers[2].quality
    assert [tier.quality for tier in tiers] == [constants().quality[tier].score for tier in TIERS]


@pytest.mark.parametrize("name", list_profiles())
def test_profiles_have_the_tiers_of_the_data_file(name):
    profile = load_profile(name)
    assert tiers_for(profile.gpu.name, profile.model, profile.tiers.FP16.source) == profile.tiers


def test_embedding_and_head_stay_in_bf16():
    # Llama-3.1-8B: 8.030e9 parameters, 1.051e9 of them in the embedding and the LM head.
    profile = load_profile("h100-llama-3.1-8b")
    assert linear_parameters(profile.model) == 6_979_321_856
    assert profile.tiers.INT8.weight_bytes == pytest.approx(2 * 1.051e9 + 6.979e9, rel=0.001)
    assert profile.tiers.INT4.weight_bytes == pytest.approx(2 * 1.051e9 + 6.979e9 * 4.125 / 8, rel=0.001)


def test_unknown_gpus_have_bf16_only():
    tiers = tiers_for("Voodoo 2", load_profile("h100-llama-3.1-8b").model, "a test")
    assert (tiers.INT8, tiers.INT4) == (None, None)


def test_each_gpu_has_one_entry_a_tier_and_borrowed_ones_say_so():
    for tier in ("INT8", "INT4"):
        gpus = [gpu for entry in tier_factors() if entry.name == tier for gpu in entry.gpus]
        assert len(gpus) == len(set(gpus))
    for entry in tier_factors():
        assert entry.assumption == any((entry.name, gpu) not in MEASURED for gpu in entry.gpus)
        assert "assumption" in load_profile("rtx4090-llama-3.1-8b").tier(entry.name).source


@pytest.mark.parametrize("name", list_profiles())
def test_fewer_bits_help_small_batches_and_weight_only_int4_hurts_prefill(name):
    arrays = compile_latency(load_profile(name))
    decode = [iteration_time(arrays, tier, [], 1, 512.0, 512.0, 1) for tier in range(3)]
    prefill = [iteration_time(arrays, tier, [(2048, 0)], 0, 0.0, 0.0, 1) for tier in range(3)]
    assert decode[0] > decode[1] > decode[2]
    assert prefill[2] > prefill[0]
    if not name.startswith("a100"):  # which has no 8-bit floating point: its INT8 is weight-only
        assert prefill[1] < prefill[0]


def dense_factors(latency, base, quantized):
    """What another weight precision multiplies dense times by, at each point's tokens.

    The whole difference between the two predictions is put down to the dense layers: attention, the cache and
    the LM head stay in bf16.

    Args:
        latency: bf16 on that GPU.
        base: bf16 points of one engine.
        quantized: the same engine's points with quantized weights.
    """
    factors = {}
    for kind in ("decode", "prefill"):
        for tokens in sorted(base[kind].keys() & quantized[kind].keys()):
            dense = np.interp(tokens, latency.dense_tokens, latency.dense_us) * 1e-3
            factors[tokens] = float(1 + (quantized[kind][tokens] - base[kind][tokens]) / dense)
    return factors


@pytest.mark.needs_shared
@pytest.mark.parametrize(("tier", "gpu"), MEASURED)
def test_factors_are_the_ratios_of_the_predictions(tier, gpu, shared_data):
    name, system, backend, precision = MEASURED[tier, gpu]
    path = shared_data / "ground_truth" / "predictions" / "aic_llama31_8b.csv"
    base, quantized = (read_points(path, system, backend, q) for q in ("bfloat16", precision))
    expected = dense_factors(load_profile(name).latency, base, quantized)
    entry = factors(tier, gpu)
    assert dict(zip(entry.dense_tokens, entry.dense_factor, strict=True)) == pytest.approx(expected, abs=6e-4)
