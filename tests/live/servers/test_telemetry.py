"""Windows of what vLLM servers tell."""

from __future__ import annotations

import asyncio
import time
from math import isnan

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve_env.errors import InputError
from llmserve_env.live.gateway.several.metrics import merge_metrics
from llmserve_env.live.servers.metrics import METRICS, read_metrics
from llmserve_env.live.servers.telemetry import MAX_BYTES, Replica, Telemetry, TelemetryWindow, merge, scrape

from ..endpoint_server import Reply, closed_url, serving
from ..vllm_server import RecordedServer, metrics

STALE_AFTER_S = 5.0
COUNTS = [name for name, metric in METRICS.items() if metric.kind == "counter" and metric.by is None]


def replica(*scrapes, every_s=1.0):
    """One that answered from 0 s on."""
    one = Replica("http://vllm:8000", STALE_AFTER_S)
    for index, text in enumerate(scrapes):
        one.took(read_metrics(text, index * every_s))
    return one


def text(tokens, first=(1, 2, 3), started=None, engine="0"):
    labels = f'engine="{engine}"'
    lines = [
        f"vllm:num_requests_running{{{labels}}} 3",
        f"vllm:generation_tokens_total{{{labels}}} {tokens}",
        f'vllm:request_success_total{{{labels},finished_reason="stop"}} {tokens}',
        *(
            f'vllm:time_to_first_token_seconds_bucket{{{labels},le="{bound}"}} {count}'
            for bound, count in zip(("0.1", "1.0", "+Inf"), first, strict=True)
        ),
        f"vllm:time_to_first_token_seconds_sum{{{labels}}} 1",
    ]
    if started is not None:
        lines.append(f"process_start_time_seconds {started}")
    return "\n".join(lines) + "\n"


def test_a_window_of_a_real_server_under_load():
    window = replica(metrics("0.32-busy-1"), metrics("0.32-busy-2")).window(1.0)
    figures = window.figures()
    assert window.rests_on == dict.fromkeys(("kv_tokens", *METRICS), 1)
    assert window.span_s == 1.0
    assert window.restarts == 0
    assert figures["preemptions"] > 0
    assert figures["output_tokens"] > figures["accepted_tokens"] > 0
    assert set(window.finished) >= {"stop", "length", "abort"}
    assert window.finished["length"] > 0
    assert figures["first_tokens"] > 0
    assert 0 < figures["p50_ttft_s"] <= figures["p90_ttft_s"] <= figures["p99_ttft_s"]
    assert 0 < figures["p50_gap_s"] < figures["p50_e2e_s"]
    assert 0 < figures["kv_occupancy"] <= 1


def test_windows_add_up_to_what_the_server_counted():
    names = ("idle", "busy-1", "busy-2", "after")
    one = Replica("http://vllm:8000", STALE_AFTER_S)
    windows = []
    for at_s, name in enumerate(names):
        one.took(read_metrics(metrics(f"0.32-{name}"), at_s))
        windows.append(one.window(at_s))
    total = read_metrics(metrics("0.32-after"))
    for name in COUNTS:
        counted = sum(total.counters[name].values())
        assert sum(getattr(window, name) for window in windows[1:]) == counted
    for name in ("ttft_s", "gap_s", "e2e_s"):
        (all_,) = total.histograms[name].values()
        assert sum(getattr(window, name).count for window in windows[1:]) == all_.count
    assert windows[0].output_tokens is None  # of one scrape nothing is known but its gauges
    assert windows[0].running == 0
    assert windows[0].rests_on["running"] == 1
    assert "output_tokens" not in windows[0].rests_on


def test_a_restarted_server_begins_anew():
    window = replica(metrics("0.32-after"), metrics("0.32-restarted")).window(1.0)
    new = read_metrics(metrics("0.32-restarted"))
    assert window.restarts == 1
    for name in COUNTS:
        assert getattr(window, name) == sum(new.counters[name].values())
    assert window.ttft_s == next(iter(new.histograms["ttft_s"].values()))


def test_a_restart_shows_where_no_counter_fell():
    window = replica(text(5, started=100), text(7, (2, 3, 4), started=200)).window(1.0)
    assert window.restarts == 1
    assert window.output_tokens == 7
    assert window.ttft_s.cumulative == (2, 3, 4)
    same = replica(text(5, started=100), text(7, (2, 3, 4), started=100)).window(1.0)
    assert same.restarts == 0
    assert same.output_tokens == 2
    assert same.ttft_s.cumulative == (1, 1, 1)


def test_without_a_time_of_start_one_fallen_counter_tells_of_all():
    window = replica(text(500, (1, 2, 3)), text(7, (9, 9, 9))).window(1.0)
    assert window.restarts == 1
    assert window.output_tokens == 7
    assert window.ttft_s.cumulative == (9, 9, 9)


def test_scrapes_between_windows_keep_a_restart_from_losing_more_than_one():
    window = replica(text(0), text(100), text(130), text(4), text(6)).window(4.0)
    assert window.output_tokens == 100 + 30 + 4 + 2
    assert window.restarts == 1
    assert window.span_s == 4.0


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 1000), st.lists(st.integers(0, 50), min_size=3, max_size=3))))
def test_no_sequence_of_scrapes_gives_negative_counts(seen):
    one = replica(*(text(tokens, (a, a + b, a + b + c)) for tokens, (a, b, c) in seen))
    window = one.window(len(seen) - 1.0)
    assert (window.output_tokens is None) == (len(seen) < 2)
    if window.ttft_s is not None:
        assert window.output_tokens >= 0
        assert min(window.finished.values()) >= 0
        assert list(window.ttft_s.cumulative) == sorted(window.ttft_s.cumulative)
        assert window.ttft_s.cumulative[0] >= 0


def test_a_lost_scrape_is_no_zero():
    one = replica(text(10), text(30))
    one.lost("HTTP 500")
    assert one.window(3.0).output_tokens == 20  # not stale yet: its last answer counts, once
    nothing_new = one.window(4.0)
    assert nothing_new.stale == 0
    assert nothing_new.running == 3
    assert nothing_new.output_tokens is None
    assert nothing_new.span_s is None
    stale = one.window(1.0 + STALE_AFTER_S + 0.01)
    assert stale == TelemetryWindow(stale=1)
    assert set(stale.figures().values()) == {None}
    assert one.error == "HTTP 500"


def test_what_a_server_did_while_it_was_lost_is_in_no_window():
    one = replica(text(10), text(30))
    assert one.window(1.0).output_tokens == 20
    assert one.window(50.0).stale == 1
    one.took(read_metrics(text(1000), 60.0))
    back = one.window(60.5)
    assert back.stale == 0
    assert back.running == 3
    assert back.output_tokens is None
    one.took(read_metrics(text(1001), 61.0))
    assert one.window(61.0).output_tokens == 1


def test_a_restart_shows_also_after_a_long_absence():
    one = replica(text(50, started=100))
    assert one.window(60.0).stale == 1
    one.took(read_metrics(text(7, started=200), 60.0))
    one.took(read_metrics(text(9, started=200), 61.0))
    window = one.window(61.0)
    assert (window.restarts, window.output_tokens, window.span_s) == (1, 2, 1.0)


def test_a_server_that_never_answered_is_stale():
    one = Replica("http://vllm:8000/v1/", STALE_AFTER_S)
    assert one.url == "http://vllm:8000"
    assert one.window(0.0) == TelemetryWindow(stale=1)


def test_an_older_and_a_newer_server_together():
    old = replica(metrics("0.6"), metrics("0.6").replace("4000.0", "5000.0")).window(1.0)
    new = replica(metrics("0.32-busy-1"), metrics("0.32-busy-2")).window(1.0)
    both = merge([old, new, TelemetryWindow(stale=1)])
    assert (both.replicas, both.stale) == (3, 1)
    assert both.rests_on["running"] == 2
    assert both.rests_on["cached_tokens"] == 1
    assert both.running == 7 + new.running
    assert both.output_tokens == 1000 + new.output_tokens
    assert both.cached_tokens == new.cached_tokens
    assert both.kv_tokens == old.kv_tokens + new.kv_tokens
    weighted = old.kv_occupancy * old.kv_tokens + new.kv_occupancy * new.kv_tokens
    assert both.kv_occupancy == pytest.approx(weighted / both.kv_tokens)
    assert both.ttft_s.count == old.ttft_s.count + new.ttft_s.count
    assert both.ttft_s.bounds == tuple(sorted(set(old.ttft_s.bounds) & set(new.ttft_s.bounds)))
    assert both.figures()["p99_ttft_s"] > 0


def test_shares_are_averaged_alike_where_a_capacity_is_unknown():
    windows = [TelemetryWindow(kv_occupancy=0.2, kv_tokens=1.0), TelemetryWindow(kv_occupancy=0.6)]
    assert merge(windows).kv_occupancy == pytest.approx(0.4)


@settings(max_examples=30)
@given(st.integers(1, 5))
def test_like_servers_together_are_as_one(n):
    one = replica(metrics("0.32-busy-1"), metrics("0.32-busy-2")).window(1.0)
    all_ = merge([one] * n)
    assert all_.kv_occupancy == pytest.approx(one.kv_occupancy)
    assert all_.span_s == one.span_s
    figures, single = all_.figures(), one.figures()
    for name in figures:
        if name.startswith(("p50", "p90", "p99", "mean")):
            assert figures[name] == pytest.approx(single[name])
        elif name != "kv_occupancy":
            assert figures[name] == pytest.approx(n * single[name])
    assert all_.finished == {reason: n * count for reason, count in one.finished.items()}


def test_nobody_told_anything():
    nothing = merge([TelemetryWindow(stale=1)] * 2)
    assert (nothing.replicas, nothing.stale) == (2, 2)
    assert set(nothing.figures().values()) == {None}
    assert merge([]).replicas == 0


def test_a_window_without_requests_has_no_latencies():
    figures = replica(text(5), text(5)).window(1.0).figures()
    assert figures["output_tokens"] == 0
    assert isnan(figures["p50_ttft_s"])
    assert figures["p50_e2e_s"] is None  # nobody tells it


async def until(holds):
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


def test_servers_are_scraped_in_the_background_and_one_that_hangs_holds_nobody():
    good, bad = RecordedServer({"/metrics": Reply(text(10))}), RecordedServer({"/metrics": Reply(None)})

    async def watch(urls):
        async with Telemetry(
            urls, api_key="k", interval_s=0.01, timeout_s=1.0, stale_after_s=60.0
        ) as telemetry:
            first, second, third = telemetry.replicas
            await until(lambda: first.last and second.error and third.error)
            good.answers["/metrics"] = Reply(text(25))
            await until(lambda: telemetry.windows()[0].output_tokens == 15)
            assert second.error == "no answer within 1 s"
            assert "Connect" in third.error
            bad.answers["/metrics"] = Reply("not found", 404)
            await until(lambda: second.error != "no answer within 1 s")
            assert second.error == "field '/metrics': expected HTTP 200, found 404"
            both = merge(telemetry.windows())
            assert (both.replicas, both.stale, both.running) == (3, 2, 3)
            bad.answers["/metrics"] = Reply(text(1))
            await until(lambda: second.last)
            assert second.error is None

    with serving(good) as good_url, serving(bad) as bad_url:
        asyncio.run(watch([good_url, bad_url.removesuffix("/v1"), closed_url()]))
    assert good.asked[0][:3] == ("GET", "/metrics", "Bearer k")


UNREADABLE = [
    "vllm:num_requests_running " + "8" * 400 + "\n",
    'vllm:time_to_first_token_seconds_bucket{le="soon"} 1\nvllm:time_to_first_token_seconds_sum 1\n',
    "vllm:num_requests_running{",
]


@pytest.mark.parametrize("bad", UNREADABLE)
def test_a_scrape_that_cannot_be_read_is_not_the_last(bad, caplog):
    server = RecordedServer({"/metrics": Reply(text(10))})

    async def watch(url):
        async with Telemetry([url], interval_s=0.01, stale_after_s=60.0) as telemetry:
            (one,) = telemetry.replicas
            await until(lambda: one.last)
            server.answers["/metrics"] = Reply(bad)
            await until(lambda: one.error)
            server.answers["/metrics"] = Reply(text(25))
            await until(lambda: one.error is None)
            assert telemetry.windows()[0].output_tokens == 15

    with serving(server) as url:
        asyncio.run(watch(url.removesuffix("/v1")))
    said = [record.getMessage() for record in caplog.records]
    assert ["failed" in each for each in said] == [True, False]
    assert "works again" in said[1]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply("<html>", 200), "expected metrics of vLLM"),
        (Reply("vllm:num_requests_running{", 200), "text format"),
        (Reply("", 307, {"location": "/elsewhere"}), "found 404"),
        (Reply("", 307, {"location": "/metrics"}), "found 307"),
        (Reply("", 307, {"location": "http://elsewhere/metrics"}), "found 307"),
        (Reply("", 307, {"location": "http://[/"}), "found 307"),
        (Reply("", 307), "found 307"),
        (Reply('vllm:time_to_first_token_seconds_bucket{le="few"} 1\n', 200), "bound of a bucket"),
        (Reply(f"vllm:num_requests_running {'9' * 400}\n", 200), "out of range"),
        (Reply("x" * (MAX_BYTES + 1)), "longer than"),
    ],
)
def test_what_cannot_be_read_is_told(reply, message):
    async def ask(url):
        async with aiohttp.ClientSession() as client:
            await scrape(client, url)

    with (
        serving(RecordedServer({"/metrics": reply})) as url,
        pytest.raises(InputError, match=message),
    ):
        asyncio.run(ask(url.removesuffix("/v1")))


@pytest.mark.parametrize(
    ("given_", "field"),
    [
        ({"urls": []}, "urls"),
        ({"urls": ["vllm:8000"]}, "url"),
        ({"urls": ["http://"]}, "url"),
        ({"urls": ["http://vllm:99999"]}, "url"),
        ({"interval_s": 0.0}, "interval_s"),
        ({"timeout_s": -1.0}, "timeout_s"),
        ({"stale_after_s": 1.0}, "stale_after_s"),
        ({"stale_after_s": float("nan")}, "stale_after_s"),
    ],
)
def test_bad_arguments_are_refused(given_, field):
    with pytest.raises(InputError, match=f"'{field}'"):
        Telemetry(**{"urls": ["http://vllm:8000"]} | given_)


@pytest.mark.parametrize(
    "location", ["/metrics/", "metrics/", "http://{host}/metrics/", "//{host}/metrics/?a=b", "/metrics/#here"]
)
def test_a_redirect_within_the_server_is_followed(location):
    class Mounted(RecordedServer):
        async def __call__(self, scope, receive, send):
            host = dict(scope["headers"])[b"host"].decode()
            self.answers["/metrics"] = Reply("", 307, {"location": location.format(host=host)})
            await super().__call__(scope, receive, send)

    async def ask(url):
        async with aiohttp.ClientSession() as client:
            return await scrape(client, url, "sesame")

    server = Mounted({"/metrics/": Reply(text(3))})
    with serving(server) as url:
        assert asyncio.run(ask(url.removesuffix("/v1"))).gauges["running"] == 3
    assert [each[2] for each in server.asked] == ["Bearer sesame"] * 2


def of_upstreams(**tokens):
    """The text of several servers, as a gateway before them shows it."""
    return merge_metrics({name: text(count, started=started) for name, (count, started) in tokens.items()})[0]


def test_one_of_several_servers_in_a_text_may_begin_anew_or_come_back():
    one = replica(
        of_upstreams(a=(100, 1), b=(1000, 1)),
        of_upstreams(a=(110, 1), b=(7, 2)),  # b was restarted
        of_upstreams(a=(120, 1)),  # and is not there
        of_upstreams(a=(130, 1), b=(500, 2)),  # what it counted meanwhile is of no window
        of_upstreams(a=(130, 1), b=(501, 2)),
    )
    window = one.window(4.0)
    assert (window.output_tokens, window.restarts) == (30 + 7 + 1, 1)
    assert window.finished == {"stop": 38}
    assert window.ttft_s.count == 3  # b's since its restart; a's never grew
