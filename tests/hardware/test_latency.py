"""The timing model: knots are met, the rules between them hold, more work never takes less time."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve_env.hardware import list_profiles, load_profile
from llmserve_env.hardware.latency import compile_latency, host_overhead_us, iteration_time
from llmserve_env.hardware.profile import Link, Tier

MEASURED = ["rtx4090-llama-3.1-8b", "rtxpro6000-llama-3.1-8b"]


@pytest.fixture(scope="module")
def profile():
    return load_profile(MEASURED[0])


@pytest.fixture(scope="module")
def arrays(profile):
    return compile_latency(profile)


def rest(profile, tokens, sampled):
    """Seconds of an iteration without attention."""
    figures = profile.latency
    dense = np.interp(tokens, figures.dense_tokens, figures.dense_us)
    return 1e-6 * (dense + np.interp(sampled, figures.head_sequences, figures.head_us) + host_overhead_us())


@pytest.mark.parametrize("name", list_profiles())
def test_arrays_have_the_shapes_that_the_kernel_expects(name):
    arrays = compile_latency(load_profile(name))
    k, j, c = len(arrays.decode_kv), len(arrays.prefill_kv), len(arrays.prefill_chunk)
    km, cm = len(arrays.mixed_kv), len(arrays.mixed_chunk)
    assert max(k, j, c, km, cm) <= 20  # the kernel scans them one by one
    shapes = {
        "dense_s": (3, 16385),
        "head_s": (3, 4609),
        "decode_s": (3, 513, k),
        "prefill_s": (3, c, j),
        "mixed_s": (3, cm, 513, km),
    }
    for field, shape in shapes.items():
        array = getattr(arrays, field)
        assert array.shape == shape, field
        assert array.dtype == np.float64
        assert array.flags.c_contiguous
        assert np.isfinite(array).all()
        assert (array >= 0).all()
    assert arrays.prefill_chunk[-1] == 16384
    assert arrays.prefill_kv[-1] == 131072
    assert not arrays.decode_s[:, 0].any()
    assert not arrays.mixed_s[:, :, 0].any()


def test_nothing_to_do_takes_no_time(arrays):
    assert iteration_time(arrays, 0, [], 0, 0, 0, 0) == 0


@pytest.mark.parametrize("i", [0, 3, 8])
@pytest.mark.parametrize("j", [0, 2, 7])
def test_decode_meets_its_knots(profile, arrays, i, j):
    figures = profile.latency
    n, kv = figures.decode_sequences[i], figures.decode_kv_tokens[j]
    expected = rest(profile, n, n) + 1e-6 * figures.decode_us[i][j]
    assert iteration_time(arrays, 0, [], n, n * kv, kv, n) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("i", [0, 3, 7])
@pytest.mark.parametrize("j", [0, 4, 10])
def test_prefill_meets_its_knots(profile, arrays, i, j):
    figures = profile.latency
    chunk, kv = figures.prefill_chunk_tokens[i], figures.prefill_kv_tokens[j]
    expected = rest(profile, chunk, 1) + 1e-6 * figures.prefill_us[i][j]
    assert iteration_time(arrays, 0, [(chunk, kv)], 0, 0, 0, 1) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("i", "j", "k"), [(1, 0, 1), (3, 4, 2), (4, 7, 6)])
def test_mixed_batch_of_equal_contexts_meets_its_knots(profile, arrays, i, j, k):
    figures = profile.latency
    chunk, n, kv = figures.mixed_chunk_tokens[i], figures.mixed_sequences[j], figures.mixed_kv_tokens[k]
    alone = figures.prefill_us[figures.prefill_chunk_tokens.index(chunk)][0]
    expected = rest(profile, chunk + n, n) + 1e-6 * (alone + figures.mixed_us[i][j][k])
    assert iteration_time(arrays, 0, [(chunk, 0)], n, n * kv, kv, n) == pytest.approx(expected, rel=1e-12)


def test_between_knots_decode_is_linear(profile, arrays):
    figures = profile.latency
    kv = (figures.decode_kv_tokens[2] + figures.decode_kv_tokens[3]) / 2
    expected = np.mean([figures.decode_us[5][2:4], figures.decode_us[6][2:4]])
    time = iteration_time(arrays, 0, [], 48, 48 * kv, kv, 48) - rest(profile, 48, 48)
    assert time == pytest.approx(1e-6 * expected, rel=1e-9)


def test_beyond_the_knots_decode_goes_on_along_the_last_segment(profile, arrays):
    rows = np.array(profile.latency.decode_us)
    kv = profile.latency.decode_kv_tokens
    more = rows[-1] + (rows[-1] - rows[-2])  # 384 sequences, after 128 and 256
    slope = (more[-1] - more[-2]) / (kv[-1] - kv[-2])
    time = iteration_time(arrays, 0, [], 384, 384 * 20000, 20000, 256) - rest(profile, 384, 256)
    assert time == pytest.approx(1e-6 * (more[-1] + slope * (20000 - kv[-1])), rel=1e-9)


def test_several_chunks_pay_the_floor_once(profile, arrays):
    one = iteration_time(arrays, 0, [(512, 1024)], 0, 0, 0, 0) - rest(profile, 512, 0) + arrays_head0(profile)
    both = iteration_time(arrays, 0, [(512, 1024), (512, 1024)], 0, 0, 0, 0) - rest(profile, 1024, 0)
    both += arrays_head0(profile)
    floor = 1e-6 * profile.latency.prefill_us[0][0]
    assert both == pytest.approx(2 * one - floor, rel=1e-9)


def arrays_head0(profile):
    """`rest` reads the head's first knot for no sequences; the model counts none."""
    return 1e-6 * profile.latency.head_us[0]


def test_a_chunk_longer_than_measured_is_two_chunks_in_a_row(profile, arrays):
    figures = profile.latency
    row = dict(zip(figures.prefill_kv_tokens, figures.prefill_us[-1], strict=True))
    expected = row[0] + row[2048] - figures.prefill_us[0][0]
    at = list(arrays.prefill_chunk).index(4096)
    assert arrays.prefill_s[0, at, 0] == pytest.approx(1e-6 * expected, rel=1e-12)


def test_chunks_below_the_first_knot_cost_as_much_as_it(profile, arrays):
    small = iteration_time(arrays, 0, [(1, 512)], 0, 0, 0, 1) - rest(profile, 1, 1)
    first = iteration_time(arrays, 0, [(16, 512)], 0, 0, 0, 1) - rest(profile, 16, 1)
    assert small == pytest.approx(first, rel=1e-9)


def test_the_longest_context_counts_only_beside_a_prefill(arrays):
    def time(chunks, longest):
        return iteration_time(arrays, 0, chunks, 8, 8 * 1000, longest, 8)

    assert time([], 4000) == time([], 1000)
    effective = 1000 + arrays.mixed_skew / 8 * 3000
    as_long = iteration_time(arrays, 0, [(512, 0)], 8, 8 * effective, effective, 8)
    assert time([(512, 0)], 4000) == pytest.approx(as_long, rel=1e-12)
    assert as_long > time([(512, 0)], 1000)


@pytest.mark.parametrize("name", MEASURED)
def test_more_work_never_takes_less_time(name):
    arrays = compile_latency(load_profile(name))
    times = [iteration_time(arrays, 0, [], n, n * 700, 700, n) for n in range(1, 513)]
    assert (np.diff(times) >= -1e-12).all()
    for n in (1, 30, 200):
        times = [iteration_time(arrays, 0, [], n, n * kv, kv, n) for kv in range(1, 20000, 97)]
        assert (np.diff(times) >= -1e-12).all()
        times = [iteration_time(arrays, 0, [(300, 0)], n, n * kv, kv, n) for kv in range(1, 20000, 97)]
        assert (np.diff(times) >= -1e-12).all()
    times = [iteration_time(arrays, 0, [(chunk, 500)], 0, 0, 0, 1) for chunk in range(1, 16385, 31)]
    assert (np.diff(times) >= -1e-12).all()
    times = [iteration_time(arrays, 0, [(700, kv)], 0, 0, 0, 1) for kv in range(0, 140000, 501)]
    assert (np.diff(times) >= -1e-12).all()


def test_two_gpus_pay_for_what_they_exchange(profile, arrays):
    link = Link(latency_us=10, bandwidth_gb_per_s=25, source="a test")
    two = profile.model_copy(update={"gpu": profile.gpu.model_copy(update={"count": 2}), "link": link})
    extra = compile_latency(two).dense_s[0] - arrays.dense_s[0]
    for tokens in (1, 500, 16384):
        moved = tokens * 4096 * 2  # 2 (tp - 1) / tp = 1 of the hidden states, bf16
        assert extra[tokens] == pytest.approx(64 * (10e-6 + moved / 25e9), rel=1e-9)
    assert extra[0] == 0


def test_a_tier_scales_dense_layers_and_head_only(profile, arrays):
    tier = Tier(
        weight_bytes=1, dense_tokens=(1, 1001), dense_factor=(0.5, 1.5), head_factor=0.7, source="a test"
    )
    tiers = profile.tiers.model_copy(update={"INT8": tier, "INT4": None})
    other = compile_latency(profile.model_copy(update={"tiers": tiers}))
    host = 1e-6 * host_overhead_us()
    for tokens, factor in ((1, 0.5), (501, 1.0), (1001, 1.5), (16384, 1.5)):
        assert other.dense_s[1, tokens] - host == pytest.approx(factor * (arrays.dense_s[0, tokens] - host))
    np.testing.assert_allclose(other.head_s[1], 0.7 * arrays.head_s[0])
    np.testing.assert_array_equal(other.decode_s[1], arrays.decode_s[0])
    np.testing.assert_array_equal(other.dense_s[2], arrays.dense_s[0])  # a tier that it lacks repeats FP16
