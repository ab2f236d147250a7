"""The text of vLLM servers of several versions."""

from __future__ import annotations

from math import inf, isnan, nan
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve_env.errors import InputError
from llmserve_env.live.gateway.several.metrics import merge_metrics
from llmserve_env.live.servers.metrics import METRICS, Histogram, add_histograms, read_metrics
from llmserve_env.live.servers.telemetry import Replica, merge

SCRAPES = Path(__file__).parents[1] / "scrapes"


def scrape_text(name):
    return (SCRAPES / f"vllm-{name}.txt").read_text()


def scrape(name):
    return read_metrics(scrape_text(name))


REAL = [line for line in scrape_text("0.32-busy-2").splitlines() if not line.startswith("#")]


@st.composite
def histograms(draw, bounds=None, least=0):
    """With at least one finite bound."""
    if bounds is None:
        finite = draw(st.sets(st.floats(0.001, 1000, allow_subnormal=False), min_size=1, max_size=8))
        bounds = (*sorted(finite), inf)
    counts = draw(st.lists(st.integers(0, 10**6), min_size=len(bounds), max_size=len(bounds)))
    cumulative = [float(sum(counts[: index + 1])) for index in range(len(counts))]
    if cumulative[-1] < least:
        cumulative[-1] = float(least)
    return Histogram(tuple(bounds), tuple(cumulative), draw(st.floats(0, 1e6)))


def test_all_that_0_32_shows_is_found():
    busy = scrape("0.32-busy-2")
    assert busy.names.keys() == METRICS.keys()
    assert busy.names["kv_occupancy"] == "vllm:kv_cache_usage_perc"
    assert busy.names["gap_s"] == "vllm:inter_token_latency_seconds"
    assert busy.engines == ("0",)
    assert busy.models == ("tiny",)
    assert busy.kv_tokens == 160 * 32
    assert busy.gauges["running"] + busy.gauges["waiting"] > 1
    assert 0 < busy.gauges["kv_occupancy"] <= 1
    assert sum(busy.counters["preemptions"].values()) > 0
    tried = sum(busy.counters["drafted_tokens"].values())
    assert 0 < sum(busy.counters["accepted_tokens"].values()) <= tried
    assert busy.config["enable_prefix_caching"] == "True"


def test_the_whole_text_and_what_was_kept_of_it_read_alike():
    """Nothing of the many other metrics is taken for one of ours: prompt_tokens_by_source, say."""
    text = (SCRAPES / "vllm-0.32-idle.txt").read_text()
    assert "vllm:prompt_tokens_by_source_total" in text
    assert all(sum(series.values()) == 0 for series in read_metrics(text).counters.values())
    assert [len(series) for series in read_metrics(text).counters.values()].count(1) >= 5


def test_engine_v0_is_read_by_its_own_names():
    old = scrape("0.6")
    assert old.gauges == {"waiting": 2, "running": 7, "kv_occupancy": 0.25}
    assert old.names["gap_s"] == "vllm:time_per_output_token_seconds"
    assert sum(old.counters["preemptions"].values()) == 3
    assert sum(old.counters["finished"].values()) == 40
    assert "prefix_queried_tokens" not in old.counters
    assert "queue_s" not in old.histograms
    assert old.kv_tokens == 27900 * 16
    assert old.engines == ()


def test_old_names_beside_new_ones_count_once():
    both = scrape("0.10")
    assert sum(both.counters["prefix_queried_tokens"].values()) == 300
    assert sum(both.counters["cached_tokens"].values()) == 30
    assert both.names["kv_occupancy"] == "vllm:kv_cache_usage_perc"


def test_engines_of_a_server_are_weighted_by_their_caches():
    both = scrape("0.10")
    assert both.engines == ("0", "1")
    assert both.gauges["running"] == 10
    assert both.gauges["kv_occupancy"] == pytest.approx((300 * 0.1 + 100 * 0.5) / 400)
    assert both.kv_tokens == 400 * 16
    alike = (SCRAPES / "vllm-0.10.txt").read_text().replace('num_gpu_blocks="300"', 'num_gpu_blocks="None"')
    assert read_metrics(alike).gauges["kv_occupancy"] == pytest.approx(0.3)
    assert read_metrics(alike).kv_tokens is None


def test_counters_without_total():
    text = 'vllm:num_preemptions 4\nvllm:generation_tokens{model_name="a"} 5\n'
    assert read_metrics(text).counters == {
        "preemptions": {(): 4.0},
        "output_tokens": {(("model_name", "a"),): 5.0},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<html>hello</html>", "metrics of vLLM"),
        ("", "metrics of vLLM"),
        ("process_start_time_seconds 1.0\n", "metrics of vLLM"),
        ("# TYPE vllm:num_requests_running gauge\n", "metrics of vLLM"),
        ('vllm:num_requests_running{engine="0', "text format"),
        ('vllm:num_requests_running{engine="0"} many\n', "text format"),
    ],
)
def test_what_is_no_metrics_of_vllm_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        read_metrics(text)


def test_gauges_that_are_no_numbers_are_missing():
    text = "vllm:num_requests_running NaN\nvllm:num_requests_waiting 2\n"
    assert read_metrics(text).gauges == {"waiting": 2.0}


def test_a_histogram_without_infinity_is_missing():
    text = 'vllm:time_to_first_token_seconds_bucket{le="1.0"} 3\nvllm:num_requests_waiting 0\n'
    assert read_metrics(text).histograms == {}


def test_quantiles_as_prometheus_has_them():
    # From the unit tests of Prometheus, promql/promqltest/testdata/histograms.test: testhistogram, positive.
    histogram = Histogram((0.1, 0.2, 1.0, inf), (50.0, 70.0, 110.0, 120.0), nan)
    assert histogram.quantile(0.2) == pytest.approx(0.048)
    assert histogram.quantile(0.5) == pytest.approx(0.15)
    assert histogram.quantile(0.8) == pytest.approx(0.72)
    assert histogram.quantile(1.0) == 1.0  # in the last bucket: its lower bound
    assert isnan(Histogram((inf,), (3.0,), 1.0).quantile(0.5))
    assert isnan(Histogram((1.0, inf), (0.0, 0.0), 0.0).quantile(0.5))
    assert Histogram((-1.0, 0.0, inf), (4.0, 4.0, 4.0), -9.0).quantile(0.5) == -1.0
    with pytest.raises(ValueError, match="0 < q"):
        histogram.quantile(0.0)


@given(histograms(least=1), st.floats(0.001, 1))
def test_a_quantile_lies_in_the_bucket_of_its_rank(histogram, q):
    value, rank = histogram.quantile(q), q * histogram.count
    bucket = next(i for i, below in enumerate(histogram.cumulative) if below >= rank)
    if histogram.bounds[bucket] == inf:
        assert value == histogram.bounds[-2]
    else:
        lower = histogram.bounds[bucket - 1] if bucket else 0.0
        assert lower <= value <= histogram.bounds[bucket]


@given(histograms(least=1), st.lists(st.floats(0.001, 1), min_size=2, max_size=6))
def test_quantiles_grow_with_q(histogram, qs):
    values = [histogram.quantile(q) for q in sorted(qs)]
    assert values == sorted(values)


@given(histograms(least=1), st.integers(1, 5), st.floats(0.001, 1))
def test_like_histograms_together_have_the_same_quantiles(histogram, n, q):
    together = add_histograms([histogram] * n)
    assert together.quantile(q) == pytest.approx(histogram.quantile(q), rel=1e-6)
    assert together.count == n * histogram.count


@given(st.data())
def test_what_came_since_is_never_negative(data):
    bounds = (0.1, 1.0, 10.0, inf)
    before, after = (data.draw(histograms(bounds=bounds)) for _ in range(2))
    since = after.since(before)
    assert list(since.cumulative) == sorted(since.cumulative)
    assert min(since.cumulative) >= 0
    assert since.total >= 0


@given(st.data())
def test_adding_what_came_since_to_what_was_gives_what_is(data):
    bounds = (0.1, 1.0, 10.0, inf)
    before, grown = (data.draw(histograms(bounds=bounds)) for _ in range(2))
    assert add_histograms([before, grown]).since(before).cumulative == grown.cumulative


def test_histograms_of_other_buckets_meet_at_common_bounds():
    old = Histogram((0.1, 0.5, 1.0, inf), (1.0, 2.0, 3.0, 4.0), 2.0)
    new = Histogram((0.1, 0.25, 1.0, inf), (10.0, 20.0, 30.0, 40.0), 20.0)
    assert add_histograms([old, new]) == Histogram((0.1, 1.0, inf), (11.0, 33.0, 44.0), 22.0)
    apart = add_histograms([old, Histogram((0.3, inf), (1.0, 2.0), 1.0)])
    assert apart.count == 6
    assert isnan(apart.quantile(0.5))
    assert apart.mean == 0.5


def taken(texts):
    """What windows, and all that is drawn from them, make of texts one after the other."""
    one = Replica("http://vllm:8000", stale_after_s=5.0)
    for at_s, text in enumerate(texts):
        try:
            one.took(read_metrics(text, float(at_s)))
        except InputError as error:
            one.lost(str(error))
    window = one.window(len(texts) - 1.0)
    return merge([window, window]).figures()


@st.composite
def mutated(draw):
    """A real server's text with some of it cut, doubled, moved or replaced."""
    lines = REAL[:]
    for _ in range(draw(st.integers(1, 3))):
        at, other = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(lines) - 1))
        line = lines[at]
        start = draw(st.integers(0, len(line)))
        end = draw(st.integers(start, min(len(line), start + 12)))
        put = draw(
            st.sampled_from(
                ["", '"', "{", "}", ",", "\\", " ", "\t", "\r", "#", "nan", "-1", "1e400", "9" * 400]
            )
        )
        lines[at] = draw(
            st.sampled_from([line[:start] + put + line[end:], line + "\n" + line, lines[other], ""])
        )
    return "\n".join(lines)


@settings(max_examples=30)
@given(mutated())
def test_any_mutation_of_a_text_gives_a_scrape_or_a_lost_one(text):
    figures = taken(["\n".join(REAL), text, text])
    assert all(value is None or isnan(value) or value >= 0 for value in figures.values())


@settings(max_examples=30)
@given(st.lists(st.one_of(st.sampled_from(REAL), st.text(max_size=20)), max_size=20))
def test_any_text_gives_a_scrape_or_a_lost_one(lines):
    taken(["\n".join(lines)] * 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('vllm:time_to_first_token_seconds_bucket{le="abc"} 1', "bound of a bucket"),
        ('vllm:time_to_first_token_seconds_bucket{le="NaN"} 1', "bound of a bucket"),
        (f"vllm:generation_tokens_total {'9' * 400}", "out of range: vllm:generation_tokens_total"),
        ("vllm:generation_tokens_total 1e17", "out of range"),
        ("vllm:num_requests_running 1\nvllm:num_requests_running 2", "twice"),
        ("vllm:num_requests_running{a=" + '"' + "b" * 9000 + '"} 1', "8192 characters"),
    ],
)
def test_numbers_that_cannot_be_lose_the_scrape(line, message):
    with pytest.raises(InputError, match=message):
        read_metrics(f"vllm:num_requests_waiting 0\n{line}\n")


def test_numbers_that_are_none_are_missing():
    text = "vllm:num_requests_waiting -1\nvllm:generation_tokens_total -2\nvllm:prompt_tokens_total +Inf\n"
    text += f"vllm:num_preemptions_total {'9' * 5000}\n"
    found = read_metrics(
        text + 'vllm:cache_config_info{num_gpu_blocks="' + "9" * 400 + '",block_size="16"} 1\n'
    )
    assert (found.gauges, found.counters, found.kv_tokens) == ({}, {}, None)


def test_several_servers_in_one_text_are_told_apart_by_the_label_that_was_added():
    texts = {"http://a": scrape_text("0.32-busy-1"), "http://b": scrape_text("0.10")}
    both, a, b = read_metrics(merge_metrics(texts)[0]), *map(read_metrics, texts.values())
    assert both.servers == {(("upstream", "http://a"),), (("upstream", "http://b"),)}
    assert both.kv_tokens == a.kv_tokens + b.kv_tokens
    assert both.gauges["running"] == a.gauges["running"] + b.gauges["running"]
    held = [each.gauges["kv_occupancy"] * each.kv_tokens for each in (a, b)]
    assert both.gauges["kv_occupancy"] == pytest.approx(sum(held) / both.kv_tokens)
    assert sum(both.counters["output_tokens"].values()) == sum(
        sum(each.counters["output_tokens"].values()) for each in (a, b)
    )
    # Before a gateway that stands before another, nothing is lost either.
    assert (
        read_metrics(merge_metrics({"http://outer": merge_metrics(texts)[0]})[0]).kv_tokens == both.kv_tokens
    )
