"""Profiles from a predictor: the fit on made-up predictions, then on the published ones."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve_env.commands.calibrate.predictions import predictions
from llmserve_env.errors import InputError
from llmserve_env.hardware.predictions import (
    Decode,
    Predictions,
    Prefill,
    fit,
    fit_error,
    from_points,
    iteration_ms,
    prefill_ms,
    read_grid,
    read_points,
    scaled,
    tensor_parallel,
)
from llmserve_env.hardware.profile import Model, load_profile

SYSTEMS = {"h100-llama-3.1-8b": "h100_sxm", "a100-llama-3.1-8b": "a100_sxm"}
STEP_MS = 10.0
TOKEN_MS = 0.02
KV_MS = 4e-5
FLOP_PER_MS = 4e11


@pytest.fixture(scope="module")
def model() -> Model:
    return load_profile("h100-llama-3.1-8b").model


@pytest.fixture(scope="module")
def synthetic() -> Predictions:
    """A GPU of known physics: a time for a step, a token, a cached token and a FLOP of prefill attention."""
    decodes = [
        Decode(batch, context, STEP_MS + TOKEN_MS * batch + KV_MS * batch * context)
        for batch in (1, 4, 16, 64, 256)
        for context in (128, 512, 1024, 4096)
        if batch * context <= 256 * 1024
    ]
    flop = 4 * 0.5 * 32 * 128 * 32
    prefills = [
        Prefill(length, STEP_MS + TOKEN_MS * length + flop * length**2 / FLOP_PER_MS)
        for length in (64, 512, 1024, 2048, 4096, 8192)
    ]
    return Predictions(tuple(decodes), tuple(prefills))


@pytest.fixture
def published(shared_data):
    return shared_data / "ground_truth" / "predictions"


def test_known_physics_is_found_again(synthetic, model):
    found = fit(synthetic, model, "a test")
    latency = found.latency
    assert found.attention_tflop_per_s == pytest.approx(FLOP_PER_MS * 1e-9, rel=0.01)
    assert found.kv_gb_per_s == pytest.approx(model.kv_bytes_per_token / KV_MS * 1e-6, rel=0.01)
    assert iteration_ms(latency, 16, 2000) == pytest.approx(
        STEP_MS + 16 * (TOKEN_MS + 2000 * KV_MS), rel=0.005
    )
    assert prefill_ms(latency, 3072) == pytest.approx(
        STEP_MS + 3072 * TOKEN_MS + 262144 * 3072**2 / FLOP_PER_MS, rel=0.02
    )
    assert latency.fit_error.decode.p90_percent < 0.1
    head_share = latency.head_us[0] / (latency.head_us[0] + latency.dense_us[0])
    assert head_share == pytest.approx(0.525 / (0.525 + 6.979), abs=0.001)


def test_contexts_that_were_not_predicted_go_on_straight(synthetic, model):
    latency = fit(synthetic, model, "a test").latency
    assert iteration_ms(latency, 256, 4096) == pytest.approx(
        STEP_MS + 256 * (TOKEN_MS + 4096 * KV_MS), rel=0.005
    )
    assert iteration_ms(latency, 1, 100_000) == pytest.approx(STEP_MS + TOKEN_MS + 100_000 * KV_MS, rel=0.005)


def test_a_dip_in_the_predictions_is_levelled(synthetic, model):
    dipped = [p._replace(ms=p.ms - 2) if p.batch == 16 else p for p in synthetic.decodes]
    latency = fit(synthetic._replace(decodes=tuple(dipped)), model, "a test").latency
    assert (np.diff(latency.dense_us) >= 0).all()
    assert (np.diff(latency.head_us) >= 0).all()
    assert (np.diff(np.array(latency.decode_us), axis=0) >= 0).all()
    assert fit_error(latency, Predictions(tuple(dipped), synthetic.prefills)).decode.p90_percent > 1


def test_scaling_follows_the_ratio_of_points(synthetic):
    base = {"decode": {1: 10.0, 256: 20.0}, "prefill": {512: 40.0, 8192: 400.0}}
    other = {"decode": {1: 8.0, 256: 12.0}, "prefill": {512: 40.0, 8192: 400.0}}
    result = scaled(synthetic, base, other)
    ratios = {p.batch: p.ms / q.ms for p, q in zip(result.decodes, synthetic.decodes, strict=True)}
    assert ratios[1] == pytest.approx(0.8)
    assert ratios[16] == pytest.approx(0.7)
    assert ratios[256] == pytest.approx(0.6)
    assert result.prefills == synthetic.prefills


def test_a_rank_of_a_model_twice_the_size_on_two_gpus_is_the_model(synthetic, model):
    fitted = fit(synthetic, model, "a test")
    double = model.model_copy(
        update={
            "layers": 2 * model.layers,
            "vocab_size": 2 * model.vocab_size,
            "kv_bytes_per_token": 2 * model.kv_bytes_per_token,
        }
    )
    derived = tensor_parallel(fitted, model, double, 2, "a test")
    assert derived.dense_us == fitted.latency.dense_us
    assert derived.head_us == fitted.latency.head_us
    assert derived.decode_us == fitted.latency.decode_us
    assert np.allclose(derived.prefill_us, fitted.latency.prefill_us, rtol=1e-3)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("sys,k,B,ctx\n", "lacks the columns ms"),
        ("sys,k,B,ctx,ms\nx,d,1,128,fast\nx,p,1,64,1\n", ":2: field 'ms'"),
        ("sys,k,B,ctx,ms\nx,d,0,128,1\nx,p,1,64,1\n", ":2: field 'B'"),
        ("sys,k,B,ctx,ms\nx,d,1,128,1\n", "no decodes and prefills of 'x'"),
    ],
)
def test_a_broken_grid_is_refused_with_its_place(tmp_path, text, place):
    path = tmp_path / "grid.csv"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_grid(path, "x")
    assert place in str(error.value)


def test_points_of_nobody_are_refused(tmp_path):
    path = tmp_path / "points.csv"
    path.write_text("sys,be,q,kind,n,ms\nx,vllm,fp8,decode,1,3\n")
    with pytest.raises(InputError, match="x, vllm, bfloat16"):
        read_points(path, "x", "vllm", "bfloat16")


def test_several_gpus_need_a_link_and_a_base(tmp_path):
    arguments = {"system": "x", "model_config": tmp_path, "name": "n", "gpu": "NVIDIA H200", "out": tmp_path}
    with pytest.raises(InputError, match="link-latency-us"):
        predictions(tmp_path, **arguments, tp=2)
    with pytest.raises(InputError, match="base-model-config"):
        predictions(tmp_path, **arguments, tp=2, link_latency_us=1.0, link_bandwidth_gbps=1.0)


def test_better_gpus_decode_faster():
    h200, h100, a100 = (load_profile(f"{gpu}-llama-3.1-8b").latency for gpu in ("h200", "h100", "a100"))
    for batch in (1, 8, 32, 128, 256, 512):
        for context in (128, 1024, 8192):
            times = [iteration_ms(latency, batch, context) for latency in (h200, h100, a100)]
            assert times[0] <= times[1] < times[2], (batch, context)


def test_four_gpus_hold_the_70b_that_one_cannot():
    profile = load_profile("h100x4-llama-3.1-70b")
    assert profile.gpu.count == 4
    assert profile.link is not None
    assert profile.tiers.FP16.weight_bytes > profile.gpu.memory_bytes
    assert profile.tiers.FP16.weight_bytes < 4 * 0.9 * profile.gpu.memory_bytes
    assert profile.latency.fit_error.decode is None  # nothing of it was predicted


@pytest.mark.needs_shared
@pytest.mark.parametrize("name", SYSTEMS)
def test_shipped_profiles_are_the_fit_of_the_published_grid(name, published):
    profile = load_profile(name)
    grid = read_grid(published / "aic_grid_llama31_8b.csv", SYSTEMS[name])
    assert fit(grid, profile.model, profile.latency.source).latency == profile.latency
    error = fit_error(profile.latency, grid)
    assert error == profile.latency.fit_error
    assert error.decode.median_percent < 0.1
    assert error.decode.p90_percent < 1
    assert error.prefill.p90_percent < 4


@pytest.mark.needs_shared
def test_the_h200_meets_its_own_points(published):
    latency = load_profile("h200-llama-3.1-8b").latency
    own = from_points(read_points(published / "aic_llama31_8b.csv", "h200_sxm", "vllm", "bfloat16"))
    assert fit_error(latency, own) == latency.fit_error
    assert max(abs(iteration_ms(latency, p.batch, p.context) / p.ms - 1) for p in own.decodes) < 0.02
    assert max(abs(prefill_ms(latency, p.length) / p.ms - 1) for p in own.prefills) < 0.001
