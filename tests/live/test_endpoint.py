"""An endpoint serves requests in real time, and a client measures."""

from __future__ import annotations

import gc
import json
import re
import threading

import numpy as np
import pytest

from llmserve_env.backend import WINDOW
from llmserve_env.controls import to_array
from llmserve_env.errors import InputError
from llmserve_env.live import EndpointBackend, EndpointSettings, sender
from llmserve_env.schema import ServeAction
from llmserve_env.workloads.workload import Tenant, Workload

from .endpoint_server import CompletionEndpoint, closed_url, piece, serving, usage

WINDOW_S = 0.2
CHAT = Tenant("chat", ttft_slo_s=30.0, tpot_slo_s=30.0)


def requests(*arrivals, prompt=5, output=3, tenants=(CHAT,), who=None):
    n = len(arrivals)
    return Workload(
        np.array(arrivals), np.full(n, prompt), np.full(n, output), np.array(who or [0] * n), tenants=tenants
    )


def backend(url, workload, **settings):
    return EndpointBackend(EndpointSettings(url, "m", **settings), workload, window_s=WINDOW_S)


def served(backend, action=None, windows=1):
    records = []
    for _ in range(windows):
        backend.serve(to_array([action or ServeAction()]), WINDOW_S)
        records.append(backend.record)
    return records


def served_out(backend, action=None):
    """Records of all windows until nothing is in flight any more."""
    records = served(backend, action)
    while records[-1].in_flight:
        records += served(backend, action)
        assert len(records) < 100
    return records


def total(records, field):
    return sum(getattr(record, field) for record in records)


@pytest.fixture
def live():
    """Makes backends, and closes them."""
    made = []

    def make(*args, **settings):
        made.append(backend(*args, **settings))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_records_count_what_clients_got(live):
    endpoint = CompletionEndpoint()
    with serving(endpoint) as url:
        here = live(url, requests(0.0, 0.01, 0.02, prompt=7, output=4))
        records = served_out(here)
        assert here.told()["prompt_tokens"] == {"asked": 21, "counted": 21}
    assert [record.arrived for record in records] == [3] + [0] * (len(records) - 1)
    assert records[0].arrived_prompt_tokens == 21
    assert total(records, "completed") == total(records, "first_tokens") == 3
    assert total(records, "output_tokens") == 12
    assert sum(record.tenant_in_slo[0] for record in records) == 3
    assert 2 < sum(record.tenant_headroom[0] for record in records) < 3
    assert sum(record.ttft_histogram.sum() for record in records) == 3
    assert sum(record.gap_histogram.sum() for record in records) == 9
    assert total(records, "busy_s") > 0
    for body in endpoint.requests:
        assert len(body["prompt"].split()) == 7
        assert (body["max_tokens"], body["stream"], body["ignore_eos"]) == (4, True, True)


def test_what_is_unfinished_goes_on_into_the_next_window(live):
    endpoint = CompletionEndpoint(held=True)
    with serving(endpoint) as url:
        here = live(url, requests(0.0, 0.01))
        first, second = served(here, windows=2)
        endpoint.release()
        rest = served_out(here)
    assert (first.arrived, first.completed, first.in_flight, first.running) == (2, 0, 2, 2)
    assert (second.arrived, second.in_flight) == (0, 2)
    assert first.busy_s > WINDOW_S / 2
    assert first.mean_running > 1
    assert total(rest, "completed") == 2
    slowest = max(record.p99_ttft_s for record in rest if record.first_tokens)
    assert slowest > 2 * WINDOW_S - 0.01  # from arrival, in real time
    assert (first.start_s, first.end_s, second.end_s) == (0.0, WINDOW_S, 2 * WINDOW_S)


def test_batch_cap_bounds_requests_at_the_endpoint(live):
    endpoint = CompletionEndpoint(held=True)
    with serving(endpoint) as url:
        here = live(url, requests(*np.arange(6) / 100))
        (record,) = served(here, ServeAction(batch_cap=2))
        assert (record.running, record.waiting, record.in_flight) == (2, 4, 6)
        assert 0 < record.oldest_wait_s < 30
        endpoint.release()
        rest = served_out(here, ServeAction(batch_cap=2))
    assert total(rest, "completed") == 6
    assert endpoint.peak == 2


def test_batch_cap_is_of_each_engine_that_the_endpoint_stands_for():
    endpoint = CompletionEndpoint(held=True)
    with serving(endpoint) as url:
        settings = EndpointSettings(url, "m")
        here = EndpointBackend(settings, requests(*np.arange(8) / 100), window_s=WINDOW_S, engines=3)
        (record,) = served(here, ServeAction(batch_cap=2))
        here.close()
    assert (record.running, record.waiting, record.engines_up) == (6, 2, 3)
    assert 1 < record.mean_running <= 2  # of each engine


@pytest.mark.parametrize(("routing", "order"), [(False, [0, 1, 2, 3]), (True, [0, 3, 2, 1])])
def test_priority_routing_sets_the_order_of_the_queue(live, routing, order):
    tenants = tuple(Tenant(f"t{priority}", priority=priority) for priority in (0, 2, 1))
    endpoint = CompletionEndpoint(held=True)
    workload = requests(0.0, 0.01, 0.02, 0.03, tenants=tenants, who=[0, 1, 2, 0])
    action = ServeAction(batch_cap=1, priority_routing=routing)
    with serving(endpoint) as url:
        here = live(url, workload)
        served(here, action)
        endpoint.release()
        served_out(here, action)
        prompts = [here._sender._prompts.of(index) for index in range(4)]
    assert [prompts.index(body["prompt"]) for body in endpoint.requests] == order


def test_what_nobody_can_apply_is_told(live):
    with serving(CompletionEndpoint()) as url:
        here = live(url, requests())
        (record,) = served(here, ServeAction(speculation_depth=3, kv_budget_fraction=0.5))
        assert set(record.not_applied) == {
            "kv_budget_fraction",
            "speculation_depth",
            "quantization_tier",
            "prefill_decode_split",
        }
        never = {name for name, way in here.capabilities().items() if way.startswith("not applied:")}
        assert never == ServeAction.model_fields.keys() - {"batch_cap", "priority_routing", "admission_rate"}
        assert here.stale is None  # it has no metrics to be stale


class TimeLimits:
    """The limits of time of a backend's clients, which are over when the test says so."""

    def __init__(self, backend):
        self.backend, self.given = backend, []
        later, give_up = backend._loop.call_later, backend._sender._give_up

        def call_later(delay_s, callback, *args, **options):
            if callback != give_up:
                return later(delay_s, callback, *args, **options)
            self.given.append((delay_s, args))
            return None

        backend._loop.call_later = call_later

    def are_over(self):
        for _, args in self.given:
            self.backend._loop.call_soon_threadsafe(self.backend._sender._give_up, *args)


@pytest.mark.parametrize("cap", [1, 2])
def test_clients_without_a_first_token_lose_patience(live, cap):
    endpoint = CompletionEndpoint(held=True)
    impatient = Tenant("impatient", patience_s=1.0)
    with serving(endpoint) as url:
        here = live(url, requests(0.0, 0.0, tenants=(impatient,)))
        limits = TimeLimits(here)
        records = served(here, ServeAction(batch_cap=cap))
        while len(endpoint.requests) < cap:
            records += served(here, ServeAction(batch_cap=cap))
        assert (total(records, "failed"), records[-1].in_flight) == (0, 2)
        assert [args[1] for _, args in limits.given] == ["patience", "patience"]
        assert all(delay_s <= 1.0 for delay_s, _ in limits.given)  # they count from when it was due
        limits.are_over()
        records += served_out(here, ServeAction(batch_cap=cap))
        assert endpoint.hung_up.wait(30)  # the endpoint need not go on
        assert here.told()["failures"] == {"patience": 2}
    assert total(records, "failed") == total(records, "arrived") == 2
    assert len(endpoint.requests) == cap  # with one at the endpoint, the other never gets there


def test_patience_ends_by_itself(live):
    with serving(CompletionEndpoint(held=True)) as url:
        here = live(url, requests(0.0, tenants=(Tenant("impatient", patience_s=0.1),)))
        assert total(served_out(here), "failed") == 1
        assert here.told()["failures"] == {"patience": 1}


def in_two_parts(go_on):
    """An answer whose rest comes when it may."""

    def lines(body):
        yield piece("first")
        go_on.wait(30)
        yield from [piece("last", "length"), "[DONE]"]

    return lines


def test_a_first_token_keeps_the_client(live):
    go_on = threading.Event()
    with serving(CompletionEndpoint(lines=in_two_parts(go_on))) as url:
        here = live(url, requests(0.0, tenants=(Tenant(patience_s=1.0),)))
        limits = TimeLimits(here)
        records = served(here)
        while not total(records, "first_tokens"):
            records += served(here)
        limits.are_over()
        records += served(here)
        assert records[-1].in_flight == 1
        go_on.set()
        records += served_out(here)
    assert (total(records, "completed"), total(records, "failed")) == (1, 0)


def test_a_deadline_is_of_the_whole_answer(live):
    go_on = threading.Event()
    with serving(CompletionEndpoint(lines=in_two_parts(go_on))) as url:
        here = live(url, requests(0.0, tenants=(Tenant(deadline_s=1.0),)))
        limits = TimeLimits(here)
        records = served(here)
        while not total(records, "first_tokens"):
            records += served(here)
        limits.are_over()
        records += served_out(here)
        go_on.set()
        assert here.told()["failures"] == {"deadline": 1}
    assert total(records, "failed") == total(records, "timeouts") == total(records, "first_tokens") == 1
    assert total(records, "completed") == 0


ERROR = json.dumps({"error": {"message": "queue is full", "code": 503}})


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([ERROR], "error in the stream"),
        ([piece("a"), ERROR], "error in the stream"),
        ([json.dumps({"object": "error", "message": "m", "code": 500})], "error in the stream"),
        ([piece("a")], "stream broken off"),
        ([], "stream broken off"),
        (["[DONE]"], "empty answer"),
        ([piece("a"), "{"], "stream without JSON"),
        (["[1]"], "stream without JSON"),
        (['{"choices": [1]}'], "stream broken off"),
        (['{"choices": 1, "usage": [1]}', "[DONE]"], "empty answer"),
    ],
)
def test_errors_in_the_stream_are_failures(live, lines, reason):
    with serving(CompletionEndpoint(lines=lambda body: lines)) as url:
        here = live(url, requests(0.0))
        records = served_out(here)
        assert here.told()["failures"] == {reason: 1}
    assert (total(records, "completed"), total(records, "failed")) == (0, 1)
    assert sum(record.tenant_failed[0] for record in records) == 1


def test_an_answer_may_end_with_its_first_token(live):
    with serving(CompletionEndpoint(lines=lambda body: [piece("", "stop"), "[DONE]"])) as url:
        here = live(url, requests(0.0))
        records = served_out(here)
        assert here.told()["failures"] == {}
    assert (total(records, "completed"), total(records, "failed")) == (1, 0)


def test_what_nobody_foresaw_is_a_failure_too(live, monkeypatch):
    async def fail(*_):
        raise AttributeError("nobody foresaw this")

    monkeypatch.setattr(sender, "stream_completion", fail)
    with serving(CompletionEndpoint()) as url:
        here = live(url, requests(0.0))
        assert total(served_out(here), "failed") == 1
        assert here.told()["failures"] == {"unexpected AttributeError": 1}


def test_refusals_lost_connections_and_time_limits_are_failures(live):
    with serving(CompletionEndpoint(refuse=lambda body: 503)) as url:
        here = live(url, requests(0.0, 0.01))
        assert total(served_out(here), "failed") == 2
        assert here.told()["failures"] == {"http 503": 2}
    here = live(closed_url(), requests(0.0))
    assert total(served_out(here), "failed") == 1
    assert here.told()["failures"] == {"connection": 1}
    with serving(CompletionEndpoint(held=True)) as url:
        here = live(url, requests(0.0), request_timeout_s=0.05)
        assert total(served_out(here), "failed") == 1
        assert here.told()["failures"] == {"timeout": 1}


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_that_does_not_know_the_extras_is_asked_without(live, status):
    endpoint = CompletionEndpoint(refuse=lambda body: status if "ignore_eos" in body else None)
    with serving(endpoint) as url:
        here = live(url, requests(0.0))
        assert total(served_out(here), "completed") == 1
        assert here.told()["ignore_eos"] is False
        assert here.told()["failures"] == {}
    assert ["ignore_eos" in body for body in endpoint.requests] == [True, False]
    assert "stream_options" not in endpoint.requests[1]


def test_a_server_that_refuses_either_way_still_gets_the_extras(live):
    endpoint = CompletionEndpoint(refuse=lambda body: 400)
    with serving(endpoint) as url:
        here = live(url, requests(0.0))
        assert total(served_out(here), "failed") == 1
        assert here.told()["ignore_eos"] is True


def test_tokens_are_counted_as_the_endpoint_counts_them(live):
    lines = [piece("four tokens in one piece", "length"), usage(5, 4), "[DONE]"]
    with serving(CompletionEndpoint(lines=lambda body: lines)) as url:
        records = served_out(live(url, requests(0.0)))
    assert total(records, "output_tokens") == 4
    assert sum(record.tenant_output_tokens[0] for record in records) == 4
    assert total(records, "first_tokens") == 1


def test_the_key_is_sent_and_not_told(live):
    endpoint = CompletionEndpoint()
    with serving(endpoint) as url:
        served_out(live(url, requests(0.0), api_key="sesame"))
        settings = EndpointSettings(url.replace("//", "//user:word@"), "m", api_key="sesame")
        assert settings.shown_url == url
        assert not {"word", "sesame"} & set(re.findall(r"\w+", repr(settings)))
    assert endpoint.authorization == ["Bearer sesame"]


def test_before_the_first_window_nothing_has_happened(live):
    window = live(closed_url(), requests(0.0)).windows[0]
    assert window.dtype == WINDOW
    assert np.isnan(window["p99_ttft_s"])
    assert window["arrived"] == window["in_flight"] == 0


def threads():
    return [each for each in threading.enumerate() if each.name == "live endpoint"]


def test_closing_ends_what_runs_and_so_does_forgetting():
    endpoint = CompletionEndpoint(held=True)
    with serving(endpoint) as url:
        here = backend(url, requests(0.0))
        served(here)
        here.close()
        assert endpoint.hung_up.wait(30)
        assert threads() == []
        here.close()  # again
        with pytest.raises(InputError, match="closed"):
            served(here)
        here = backend(url, requests(0.0))
        served(here)
        assert len(threads()) == 1
        del here
        gc.collect()
        assert threads() == []


def test_closing_ends_a_window_that_is_being_served(live):
    with serving(CompletionEndpoint()) as url:
        here = live(url, requests(0.0))
        timer = threading.Timer(0.05, here.close)
        timer.start()
        with pytest.raises(InputError, match="closed meanwhile"):
            here.serve(to_array([ServeAction()]), 3600.0)
        timer.join()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base_url", "localhost:8000/v1"),
        ("model", ""),
        ("max_requests_per_step", 0),
        ("max_prompt_tokens", 0),
        ("max_completion_tokens", 0),
        ("request_timeout_s", 0.0),
        ("token_ids", (5, 5)),
    ],
)
def test_settings_that_cannot_be_are_refused(field, value):
    with pytest.raises(InputError) as caught:
        EndpointSettings(**{"base_url": "http://127.0.0.1/v1", "model": "m", field: value})
    assert caught.value.field == field
