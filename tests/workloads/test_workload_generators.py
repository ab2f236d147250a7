"""Generators: exact replay, their laws, and the statistics of the traffic that their presets stand for."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise
from math import gamma, sqrt

import numpy as np
import pytest
import trace_samples
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve_env.errors import InputError
from llmserve_env.workloads import describe, open_workload
from llmserve_env.workloads.generators import MMPP, Clients, Gamma, OnOff, Weibull
from llmserve_env.workloads.presets import presets
from llmserve_env.workloads.sources import GENERATORS

ARRAYS = ("arrival_s", "prompt_tokens", "output_tokens", "tenant", "prefix_offsets", "prefix_ids")


@pytest.fixture
def address(tmp_path):
    """A scheme's shortest URI."""

    def of(scheme: str) -> str:
        if scheme != "servegen":
            return f"{scheme}://?"
        path = tmp_path / "clients.csv"
        path.write_text(trace_samples.SERVEGEN)
        return f"servegen://{path}?"

    return of


def same(one, other) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ARRAYS)


@pytest.mark.parametrize("scheme", GENERATORS)
def test_one_seed_is_one_workload(address, scheme):
    uri = f"{address(scheme)}duration=900&tenants=premium-standard"
    assert same(open_workload(uri, seed=7), open_workload(f"{uri}&seed=7"))
    assert not np.array_equal(open_workload(uri, seed=7).arrival_s, open_workload(uri, seed=8).arrival_s)


@pytest.mark.parametrize("scheme", GENERATORS)
def test_a_longer_duration_only_appends(address, scheme):
    uri = f"{address(scheme)}tenants=distserve-mix"
    long = open_workload(f"{uri}&duration=1190")
    assert (long.arrival_s < 1190).all()
    for duration in (500, 900):
        short = open_workload(f"{uri}&duration={duration}")
        assert len(short) == (long.arrival_s < duration).sum()
        assert same(short, long.take(np.arange(len(short))))


@pytest.mark.parametrize("scheme", GENERATORS)
def test_requests_is_a_limit(address, scheme):
    many = open_workload(f"{address(scheme)}requests=300")
    assert len(many) == 300
    assert same(open_workload(f"{address(scheme)}requests=200"), many.take(np.arange(200)))
    assert len(open_workload(f"{address(scheme)}requests=5&duration=600")) == 5


@settings(max_examples=60)
@given(
    rate=st.floats(0.01, 100), shape=st.floats(0.1, 5), seed=st.integers(0, 2**32), duration=st.floats(1, 100)
)
def test_any_parameters_give_a_valid_workload(rate, shape, seed, duration):
    law = f"rate={rate!r}&shape={shape!r}&seed={seed}&duration={duration!r}"
    for uri in (f"gamma://?{law}", f"weibull://?{law}"):
        with suppress(InputError):  # nothing may arrive in a short time at a low rate
            workload = open_workload(uri)
            assert 0 <= workload.arrival_s[0] <= workload.arrival_s[-1] < duration


@pytest.mark.parametrize(("shape", "dispersion"), [(0.25, 4), (0.87, 1 / 0.87), (1.0, 1), (4.0, 0.25)])
def test_gamma_gaps(shape, dispersion):
    """CV = shape^-0.5 and, at scales of many gaps, an index of dispersion of 1/shape."""
    facts = describe(open_workload(f"gamma://?rate=20&shape={shape}&duration=20000"))
    assert facts.rate_rps == pytest.approx(20, rel=0.02)
    assert facts.gap_cv == pytest.approx(shape**-0.5, rel=0.02)
    assert facts.scales[1].dispersion == pytest.approx(dispersion, rel=0.1)
    assert Gamma(rate_rps=20, shape=shape).mean_rate_rps == 20


@pytest.mark.parametrize("shape", [0.4, 1.0, 2.0])
def test_weibull_gaps(shape):
    facts = describe(open_workload(f"weibull://?rate=20&shape={shape}&duration=20000"))
    cv = sqrt(gamma(1 + 2 / shape) / gamma(1 + 1 / shape) ** 2 - 1)
    assert facts.rate_rps == pytest.approx(20, rel=0.02)
    assert facts.gap_cv == pytest.approx(cv, rel=0.03)
    assert Weibull(rate_rps=20, shape=shape).mean_rate_rps == 20


def test_poisson():
    facts = describe(open_workload("poisson://?rate=5&duration=40000"))
    assert facts.rate_rps == pytest.approx(5, rel=0.02)
    assert facts.gap_cv == pytest.approx(1, abs=0.02)
    assert [scale.dispersion for scale in facts.scales] == pytest.approx([1, 1, 1], abs=0.12)


def test_mmpp_dispersion_is_that_of_its_rate():
    """Of two states: 1 + 2 s^2 tau / rate (1 - (1 - e^-x) / x), x = t / tau (Heffes and Lucantoni, 1986)."""
    low, high, stay_low, stay_high = 2.0, 10.0, 40.0, 20.0
    process = MMPP(rates_rps=(low, high), dwells_s=(stay_low, stay_high))
    facts = describe(
        open_workload(f"mmpp://?rates={low},{high}&dwells={stay_low},{stay_high}&duration=200000")
    )
    share = stay_high / (stay_low + stay_high)
    variance = share * (1 - share) * (high - low) ** 2
    tau = 1 / (1 / stay_low + 1 / stay_high)
    assert facts.rate_rps == pytest.approx(process.mean_rate_rps, rel=0.03)
    for scale in facts.scales:
        x = scale.window_s / tau
        expected = 1 + 2 * variance * tau / process.mean_rate_rps * (1 - (1 - np.exp(-x)) / x)
        assert scale.dispersion == pytest.approx(expected, rel=0.08)


def test_a_state_may_be_silent():
    workload = open_workload("mmpp://?rates=0,20&dwells=30,30&duration=5000")
    counts = np.bincount(workload.arrival_s.astype(int))
    assert 0.35 < (counts == 0).mean() < 0.65
    assert describe(workload).rate_rps == pytest.approx(10, rel=0.15)


@pytest.mark.parametrize("scheme", ["mmpp", "onoff"])
def test_rate_scales_all_states(scheme):
    facts = describe(open_workload(f"{scheme}://?rate=3&duration=300000"))
    assert facts.rate_rps == pytest.approx(3, rel=0.05)


def test_onoff_mean_rate():
    process = OnOff(off_s=20, on_min_s=10, on_max_s=30, burst_min_rps=4, burst_max_rps=8)
    assert process.mean_rate_rps == 3
    workload = open_workload("onoff://?off=20&on_min=10&on_max=30&burst_min=4&burst_max=8&duration=40000")
    assert describe(workload).rate_rps == pytest.approx(3, rel=0.05)


def test_diurnal_hours_run_as_burstgpt_reports():
    workload = open_workload("diurnal://?preset=burstgpt")
    hours = np.histogram(workload.arrival_s, np.arange(0, 86401, 3600))[0] / 3600
    assert hours.mean() == pytest.approx(1, rel=0.02)
    assert hours.min() == pytest.approx(0.16, abs=0.04)
    assert hours.max() == pytest.approx(1.84, rel=0.05)
    assert hours.argmin() in (0, 23)


@pytest.mark.parametrize(
    ("preset", "clients", "top_ten"), [("servegen-m-large", 162, 0.63), ("servegen-m-small", 43, 0.93)]
)
def test_clients_are_skewed_as_in_servegen(preset, clients, top_ten):
    workload = open_workload(f"clients://?preset={preset}&rate=5&duration=120000")
    assert len(workload) / 120000 == pytest.approx(5, rel=0.05)
    entry = presets("generators")["clients"][preset]
    share = np.arange(1, entry["clients"] + 1) ** -entry["skew"]
    assert len(share) == clients
    assert share[:10].sum() / share.sum() == pytest.approx(top_ten, abs=0.01)


def test_clients_are_burstier_than_poisson_at_every_scale():
    facts = describe(open_workload("clients://?preset=servegen-m-large&duration=7200"))
    assert all(scale.dispersion > 1.5 for scale in facts.scales)
    assert Clients().mean_rate_rps == 8


def test_azure_mmpp_preset():
    """Against the trace: rate 5.53, CV 1.09, dispersion 1.4 / 3.9 / 16, peak/mean 2.9 / 1.8 / 1.5.

    Two states hold no slow drift, so at 60 s the law's dispersion is 11; hence the wide tolerance there.
    """
    facts = [
        describe(open_workload("mmpp://?preset=azure-conv&duration=3500", seed=seed)) for seed in range(20)
    ]

    assert np.mean([fact.rate_rps for fact in facts]) == pytest.approx(5.53, rel=0.03)
    assert np.mean([fact.gap_cv for fact in facts]) == pytest.approx(1.09, abs=0.03)
    by_scale = zip(*(fact.scales for fact in facts), strict=True)
    published = [(1.4, 2.9, 0.1), (3.9, 1.8, 0.2), (16, 1.5, 0.4)]
    for scales, (dispersion, peak, within) in zip(by_scale, published, strict=True):
        assert np.mean([scale.dispersion for scale in scales]) == pytest.approx(dispersion, rel=within)
        assert np.mean([scale.peak_to_mean for scale in scales]) == pytest.approx(peak, rel=0.15)
    assert {fact.traffic for fact in facts} == {"steady"}


def test_azure_gamma_preset():
    facts = describe(open_workload("gamma://?preset=azure-conv&duration=3500"))
    assert facts.rate_rps == pytest.approx(5.53, rel=0.03)
    assert facts.gap_cv == pytest.approx(1.09, abs=0.03)


def test_code_completion_preset():
    """Published: CV above 10, peak/mean at 1 s above 20, most of the time silent."""
    facts = [
        describe(open_workload("onoff://?preset=code-completion&duration=3600", seed=seed))
        for seed in range(12)
    ]
    assert min(fact.gap_cv for fact in facts) > 10
    assert np.median([fact.scales[0].peak_to_mean for fact in facts]) > 20
    assert {fact.traffic for fact in facts} == {"sparse"}


def test_sessions_extend_the_context():
    workload = open_workload("sessions://?requests=2000&system=64&block=16")
    assert workload.prompt_tokens.min() > 64
    turns: dict[int, list[int]] = {}
    for i in range(len(workload)):
        ids = workload.prefix_ids[workload.prefix_offsets[i] : workload.prefix_offsets[i + 1]]
        assert len(ids) == workload.prompt_tokens[i] // 16
        assert ids[:4].tolist() == [0, 1, 2, 3], "the system prompt is shared"
        if len(ids) > 4:
            turns.setdefault(int(ids[4]), []).append(i)
    assert any(len(turn) > 3 for turn in turns.values())
    for turn in turns.values():
        for before, after in pairwise(turn):
            context = workload.prompt_tokens[before] + workload.output_tokens[before]
            assert workload.prompt_tokens[after] > context
            gap_s = workload.arrival_s[after] - workload.arrival_s[before]
            assert gap_s >= 0.03 * workload.output_tokens[before] - 1e-9


def test_sessions_keep_the_rate_from_the_start():
    workload = open_workload("sessions://?rate=8&duration=4000")
    quarters = np.histogram(workload.arrival_s, np.linspace(0, 4000, 5))[0] / 1000
    np.testing.assert_allclose(quarters, 8, rtol=0.08)


def test_sessions_end_at_the_context_limit():
    assert open_workload("sessions://?context=1200&duration=2000").prompt_tokens.max() <= 1200


def test_mooncake_sessions_preset():
    """Against the trace: rate 3.40, prompts 12035/6909/27367/85400, 37% of blocks hit, 29% mostly."""
    facts = describe(open_workload("sessions://?preset=mooncake-conversation&duration=20000"))
    assert facts.rate_rps == pytest.approx(3.40, rel=0.03)
    assert facts.prompt.mean == pytest.approx(12035, rel=0.05)
    assert facts.prompt.p50 == pytest.approx(6909, rel=0.05)
    assert facts.prompt.p90 == pytest.approx(27367, rel=0.05)
    assert facts.prompt.p99 == pytest.approx(85400, rel=0.10)
    assert facts.output.p50 == pytest.approx(350, rel=0.05)
    assert facts.prefix_reuse.block_tokens == 512
    assert facts.prefix_reuse.hit_share == pytest.approx(0.37, abs=0.02)
    assert facts.prefix_reuse.mostly_hit_share == pytest.approx(0.29, abs=0.04)


def test_servegen_windows_keep_rates_and_clients_keep_lengths(tmp_path):
    clients, quantiles = tmp_path / "clients.csv", tmp_path / "quantiles.csv"
    clients.write_text(trace_samples.SERVEGEN)
    quantiles.write_text(trace_samples.QUANTILES)
    workload = open_workload(f"servegen://{clients}?duration=1200&quantiles={quantiles}")
    first = workload.arrival_s < 600
    assert first.sum() == 1800, "3 requests/s for 600 s, as the table says"
    assert (~first).sum() == 2400
    # Client 1 has ten times client 0's lengths, sends a third of the first window and nothing in the second.
    assert (workload.prompt_tokens[first] > 400).mean() == pytest.approx(1 / 3, abs=0.03)
    assert (workload.prompt_tokens[~first] <= 300).all()
    later = open_workload(f"servegen://{clients}?start=600&lengths=fixed:5,6")
    assert len(later) == 2400
    assert set(later.prompt_tokens) == {5}


def test_servegen_gaps_have_their_shape(tmp_path):
    path = tmp_path / "clients.csv"
    rows = [
        f"0,{600 * window},50,1,{law},{shape},1" for window in range(20) for law, shape in [("Gamma", 0.25)]
    ]
    path.write_text(trace_samples.SERVEGEN.split("\n")[0] + "\n" + "\n".join(rows))
    facts = describe(open_workload(f"servegen://{path}?duration=12000"))
    assert facts.rate_rps == pytest.approx(50, rel=0.001)
    assert facts.gap_cv == pytest.approx(2, rel=0.03)


@pytest.mark.parametrize(
    ("query", "field"),
    [("start=1200", "start"), ("duration=1300", "duration"), ("requests=99999", "requests")],
)
def test_servegen_ends_with_its_table(address, query, field):
    with pytest.raises(InputError) as caught:
        open_workload(f"{address('servegen')}{query}")
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ("1e30,0,1,1,Gamma,1,1", "client"),
        ("0,0,-1,1,Gamma,1,1", "rate_rps"),
        ("0,0,1,1,Pareto,1,1", "pattern"),
        ("0,0,1,1,Gamma,0,1", "shape"),
    ],
)
def test_a_bad_client_row_is_named(tmp_path, row, field):
    path = tmp_path / "clients.csv"
    path.write_text(f"{trace_samples.SERVEGEN}{row}\n")
    with pytest.raises(InputError) as caught:
        open_workload(f"servegen://{path}")
    assert (caught.value.line, caught.value.field) == (5, field)
    assert len(open_workload(f"servegen://{path}", skip_bad_rows=True)) == 1800


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ("m,2,1,input_tokens,1,5,4,6,7,8", "p10"),
        ("m,2,1,input_tokens,1,5,5,6,7,1e12", "max"),
        ("m,2,1,input_tokens,1,x,5,6,7,8", "p10"),
        ("n,0,1,input_tokens,1,5,5,6,7,8", "model"),
    ],
)
def test_a_bad_table_of_lengths_is_named(address, tmp_path, row, field):
    path = tmp_path / "quantiles.csv"
    path.write_text(f"{trace_samples.QUANTILES}{row}\n")
    with pytest.raises(InputError) as caught:
        open_workload(f"{address('servegen')}quantiles={path}")
    assert caught.value.field == field


def test_lengths_and_quantiles_exclude_each_other(address, tmp_path):
    with pytest.raises(InputError, match="not both"):
        open_workload(f"{address('servegen')}quantiles=any.csv&lengths=azure-conv")
