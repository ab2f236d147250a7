"""Records from times that are known exactly."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve_env.live.gateway.ledger import Ledger, LiveRequest
from llmserve_env.schema import QuantizationTier
from llmserve_env.sim.state import histogram_edges_s
from llmserve_env.workloads.workload import Tenant

TENANTS = (Tenant("a", ttft_slo_s=1.0, tpot_slo_s=0.1), Tenant("b", ttft_slo_s=0.4, tpot_slo_s=0.5))


def play(ledger, request, at_s, steps_s, end_s):
    ledger.arrived(request, 10)
    ledger.sent(request, at_s)
    for step_s in steps_s:
        ledger.step(request, step_s)
    ledger.completed(request, end_s, None)


def test_pieces_that_come_together_count_as_each_by_itself():
    together, by_itself = Ledger(TENANTS, 1), Ledger(TENANTS, 1)
    told = []
    for ledger in (together, by_itself):
        ledger.open(0.0)
        request = LiveRequest(0, 1, 0, 0.0)
        ledger.arrived(request, 10)
        ledger.sent(request, 0.0)
        for now_s, count in ((0.5, 3), (0.75, 1), (1.25, 2)):
            if ledger is together:
                ledger.step(request, now_s, count=count)
            else:
                for _ in range(count):
                    ledger.step(request, now_s)
        ledger.completed(request, 1.25, 6)
        window, ttft, gaps = ledger.close(2.0, 0.0, 2.0, [])
        totals = ledger.totals[1]
        told.append((window.tobytes(), ttft.tolist(), gaps.tolist(), totals.itl_s, totals.output_tokens))
    assert told[0] == told[1]


def test_promises_kept_and_headroom():
    ledger = Ledger(TENANTS, 1)
    ledger.open(100.0)
    int8 = list(QuantizationTier).index(QuantizationTier.INT8)
    one, two, three, four = (
        LiveRequest(index, tenant, 0, 100.0 + index, tier=int8) for index, tenant in enumerate((0, 0, 1, 1))
    )
    play(ledger, one, 100.1, [100.5, 100.55, 100.65], 100.65)  # TTFT 0.5, TPOT 0.075
    play(ledger, two, 101.0, [101.1, 101.3, 101.4], 101.4)  # TPOT 0.15: too slow
    play(ledger, three, 102.0, [102.5], 102.5)  # TTFT 0.5: too late
    play(ledger, four, 103.0, [103.1], 103.1)
    window, ttft, gaps = ledger.close(104.0, 0.0, 4.0, [])
    assert window["tenant_in_slo"][:3].tolist() == [1, 1, 0]
    assert window["tenant_headroom"][:2] == pytest.approx([1 - 0.75, 1 - 0.25])
    assert window["tier_in_slo"][:, :2].tolist() == [[0, 0], [1, 1], [0, 0]]
    assert window["tenant_completed"][:2].tolist() == [2, 2]
    assert window["tenant_ttft_s"][:2] == pytest.approx([0.6, 0.6])
    assert window["mean_ttft_s"] == pytest.approx(0.3)
    assert window["p50_gap_s"] == pytest.approx(0.1)
    for counts, values in ((ttft, [0.5, 0.1, 0.5, 0.1]), (gaps, [0.05, 0.1, 0.2, 0.1])):
        assert (counts == np.histogram(values, histogram_edges_s())[0]).all()


def test_without_a_stated_precision_none_is_credited():
    ledger = Ledger(TENANTS, 2)
    ledger.open(0.0)
    play(ledger, LiveRequest(0, 0, 0, 0.0), 0.0, [0.1], 0.1)
    window, _, _ = ledger.close(1.0, 0.0, 1.0, [])
    assert window["tenant_in_slo"][0] == 1
    assert window["tier_in_slo"].sum() == window["engines_tier"].sum() == 0


def test_busy_time_is_time_with_a_request_at_the_endpoint_within_windows():
    ledger = Ledger(TENANTS, 2)
    first, second = LiveRequest(0, 0, 0, 0.0), LiveRequest(1, 0, 0, 0.0)
    ledger.open(10.0)
    for request in (first, second):
        ledger.arrived(request, 10)
    ledger.sent(first, 10.1)
    ledger.sent(second, 10.3)
    ledger.failed(second, 10.5, "http 500")
    window, _, _ = ledger.close(11.0, 0.0, 1.0, [first])
    assert window["busy_s"] == pytest.approx(2 * 0.9)  # both engines: which of them is not known
    assert window["mean_running"] == pytest.approx((0.9 + 0.2) / 2 / 0.9)
    assert (window["in_flight"], window["running"], window["failed"]) == (1, 1, 1)
    ledger.step(first, 15.0)  # while the agent thinks
    ledger.open(20.0)
    ledger.completed(first, 20.25, None)
    window, _, _ = ledger.close(21.0, 1.0, 2.0, [])
    assert window["busy_s"] == pytest.approx(2 * 0.25)
    assert (window["first_tokens"], window["completed"], window["failed"]) == (1, 1, 0)
    assert ledger.failures == {"http 500": 1}


def test_waiting_requests_have_an_age():
    ledger = Ledger(TENANTS, 1)
    ledger.open(0.0)
    waiting = [LiveRequest(0, 1, 0, 0.25), LiveRequest(1, 0, 0, 0.5)]
    for request in waiting:
        ledger.arrived(request, 10)
    window, _, _ = ledger.close(1.0, 0.0, 1.0, waiting)
    assert (window["waiting"], window["running"], window["oldest_wait_s"]) == (2, 0, 0.75)
    assert window["tenant_in_flight"][:2].tolist() == [1, 1]
    assert window["arrived_prompt_tokens"] == 20


def test_totals_count_every_request_once_and_outlive_windows():
    ledger = Ledger(TENANTS, 1)
    ledger.open(0.0)
    play(ledger, LiveRequest(0, 0, 0, 0.0), 0.0, [0.25, 0.25, 0.35], 0.35)
    play(ledger, LiveRequest(1, 0, 0, 0.0), 0.0, [3000.0], 3000.0)
    for index, end in enumerate((ledger.failed, ledger.refused, ledger.given_up)):
        request = LiveRequest(2 + index, 1, 0, 0.0)
        ledger.arrived(request, 10)
        end(request, 1.0, "why")
    ledger.close(3000.0, 0.0, 3000.0, [])
    ledger.open(3000.0)
    ledger.arrived(LiveRequest(5, 1, 0, 3000.0), 7)
    a, b = ledger.totals
    assert (a.arrived, a.in_flight, a.in_slo, a.prompt_tokens, a.output_tokens) == (2, 0, 1, 20, 4)
    assert (b.arrived, b.in_flight, b.in_slo, b.prompt_tokens, b.output_tokens) == (4, 1, 0, 37, 0)
    assert a.outcomes == {"completed": 2, "failed": 0, "refused": 0, "given_up": 0, "rejected": 0}
    assert b.outcomes == {"completed": 0, "failed": 1, "refused": 1, "given_up": 1, "rejected": 0}
    found = {
        bound: count
        for bound, count in zip([*a.ttft_s.bounds, np.inf], a.ttft_s.counts, strict=True)
        if count
    }
    assert found == {0.25: 1, np.inf: 1}  # a bound is its bucket's, as Prometheus has it
    assert a.ttft_s.sum == 3000.25
    assert (sum(a.itl_s.counts), sum(a.tpot_s.counts), sum(a.e2e_s.counts)) == (2, 1, 2)
    assert list(a.recent_tpot_s) == pytest.approx([0.05])
