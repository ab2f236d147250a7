"""A window's record, computed again from what became of every request."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from sim.cells import random_episode

from llmserve_env.backend import MAX_TENANTS, WINDOW, WindowRecord
from llmserve_env.episode import EpisodeBatch
from llmserve_env.sim.state import (
    COMPLETED,
    PS_PER_S,
    RETRYING,
    RUNNING,
    TRANSFER,
    WAITING,
    histogram_edges_s,
)
from llmserve_env.tasks import list_tasks, load_task

from .episodes import anything, short, sticky

EDGES_S = histogram_edges_s()


class Recount:
    """Sees an episode's outcomes window after window and counts what is new."""

    def __init__(self, batch, tenants):
        self.batch = batch
        self.tenants = tenants
        self.before = self.outcomes()

    def outcomes(self):
        low = self.batch._first[0]
        part = slice(low, low + int(self.batch.cells["requests"][0]))
        self.requests = self.batch.requests[part]
        return self.batch.outcomes[part].copy()

    def check(self, window, sums):
        """Compare the record of the window that was just served."""
        out, req, tenants = self.outcomes(), self.requests, self.tenants
        of = req["tenant"]
        count = len(tenants)

        def by_tenant(chosen, weights=None):
            weights = None if weights is None else weights[chosen]
            return np.bincount(of[chosen], weights, minlength=count)

        done = (out["status"] == COMPLETED) & (self.before["status"] != COMPLETED)
        ttft_ps = out["first_ps"] - req["arrival_ps"]
        gaps = np.maximum(req["output_tokens"] - 1, 1)
        tpot_ps = -(-(out["finish_ps"] - out["first_ps"]) // gaps)
        ttft_slo = np.array([round(t.ttft_slo_s * PS_PER_S) for t in tenants])[of]
        tpot_slo = np.array([round(t.tpot_slo_s * PS_PER_S) for t in tenants])[of]
        met = done & (ttft_ps <= ttft_slo) & (tpot_ps <= tpot_slo)
        headroom = 1 - np.maximum(ttft_ps / ttft_slo, tpot_ps / tpot_slo)
        first = (out["first_ps"] > 0) & (self.before["first_ps"] == 0)
        alive = np.isin(out["status"], (WAITING, RUNNING, TRANSFER, RETRYING))
        expected = {
            "tenant_completed": by_tenant(done),
            "tenant_in_slo": by_tenant(met),
            "tenant_output_tokens": by_tenant(done, req["output_tokens"].astype(float)),
            "tenant_first_tokens": by_tenant(first),
            "tenant_in_flight": by_tenant(alive),
        }
        for name, values in expected.items():
            assert window[name][:count].tolist() == values.tolist(), name
        assert window["tier_in_slo"].sum(axis=0)[:count].tolist() == by_tenant(met).tolist()
        for name, values in (
            ("tenant_headroom", by_tenant(met, headroom)),
            ("tenant_ttft_s", by_tenant(first, ttft_ps / PS_PER_S)),
        ):
            np.testing.assert_allclose(window[name][:count], values, rtol=1e-9, atol=1e-9)
        for name in WINDOW.names:  # nothing stands in the places of tenants that are not there
            if window[name].shape[-1:] == (MAX_TENANTS,):
                assert not window[name][..., count:].any(), name
        ttft_s = np.sort(ttft_ps[first] / PS_PER_S)
        if len(ttft_s):
            assert window["mean_ttft_s"] == pytest.approx(ttft_s.mean())
        self._percentile(window["p50_ttft_s"], ttft_s, 0.5)
        self._percentile(window["p99_ttft_s"], ttft_s, 0.99)
        self._gaps(window, sums["gap_histogram"])
        assert np.histogram(ttft_s, EDGES_S)[0].tolist() == sums["ttft_histogram"].tolist()
        fresh = (out["status"] == WAITING) & (out["preemptions"] == 0)
        end_ps = round(float(window["end_s"]) * PS_PER_S)
        oldest_ps = (end_ps - out["sent_ps"][fresh]).max() if fresh.any() else 0
        assert window["oldest_wait_s"] == pytest.approx(oldest_ps / PS_PER_S)
        assert window["in_flight"] == alive.sum()
        inside = (req["arrival_ps"] >= round(float(window["start_s"]) * PS_PER_S)) & (
            req["arrival_ps"] < end_ps
        )
        assert window["arrived"] == inside.sum()
        assert window["tenant_arrived"][:count].tolist() == by_tenant(inside).tolist()
        assert window["arrived_prompt_tokens"] == req["prompt_tokens"][inside].sum()
        self.before = out

    def _percentile(self, found, values, q):
        """Within the bin of the value at that rank."""
        if len(values) == 0:
            assert np.isnan(found)
            return
        exact = values[max(int(np.ceil(q * len(values))) - 1, 0)]
        index = np.clip(np.searchsorted(EDGES_S, exact, side="right") - 1, 0, len(EDGES_S) - 2)
        assert EDGES_S[index] <= found <= EDGES_S[index + 1]

    def _gaps(self, window, histogram):
        total = histogram.sum()
        for name, q in (("p50_gap_s", 0.5), ("p99_gap_s", 0.99)):
            if total == 0:
                assert np.isnan(window[name])
                continue
            index = int(np.searchsorted(np.cumsum(histogram), q * total))
            assert EDGES_S[index] <= window[name] <= EDGES_S[index + 1]


def test_records_of_random_cells():
    for seed in range(80):
        batch, windows = random_episode(7000 + seed)
        recount = Recount(batch, batch.workloads[0].tenants)
        for action, window_s in windows[:-1]:
            batch.serve_each([action], window_s)
            recount.check(batch.windows[0], batch.sums[0])


# Where clients ask again, a try that began and ended within a window leaves no trace in the outcomes: those
# windows are held to the plain twin in tests/alignment.
@pytest.mark.parametrize(
    "task_id", [name for name in list_tasks() if not any(t.retries for t in load_task(name).tenants)]
)
def test_records_of_the_tasks(task_id):
    for seed, draw in ((5, sticky), (6, lambda task, rng, count: anything(rng, count))):
        task = short(task_id, 16)
        batch = EpisodeBatch(task)
        batch.reset([seed])
        recount = Recount(batch.backend, task.tenants)
        for action in draw(task, np.random.default_rng(seed), 16):
            batch.step(np.array([action]))
            recount.check(batch.windows[0], batch.backend.sums[0])


def test_a_window_record_holds_the_fields_of_its_row():
    batch, windows = random_episode(7003)
    action, window_s = windows[0]
    record = batch.serve_each([action], window_s)[0]
    row = batch.windows[0]
    count = len(batch.workloads[0].tenants)
    assert {field.name for field in fields(WindowRecord)} >= set(WINDOW.names)
    for name in WINDOW.names:
        value = getattr(record, name)
        expected = row[name]
        if name.startswith(("tenant_", "tier_")):
            expected = expected[..., :count]
        np.testing.assert_array_equal(value, expected)
    assert record.ttft_histogram.tolist() == batch.sums["ttft_histogram"][0].tolist()
    before = record.tenant_arrived.copy()
    batch.serve_each([action], window_s)
    assert batch.windows[0]["tenant_arrived"][:count].tolist() != before.tolist()
    assert record.tenant_arrived.tolist() == before.tolist(), "a record lasts"
