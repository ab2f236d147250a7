"""What a client sees of its requests, gathered window by window into WINDOW records."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from llmserve_env.backend import WINDOW
from llmserve_env.live.gateway.totals import Outcome, Totals
from llmserve_env.sim.state import HISTOGRAM_BINS, histogram_edges_s

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from llmserve_env.workloads.workload import Tenant

UNMEASURED = {
    "kv_cache_occupancy": "only engines know it: 0, and nothing is earned for memory",
    "gpu_memory_used_gb": "nobody tells it: 0",
    "prefix_hit_rate": "only engines know it: None",
    "spec_acceptance_rate": "only engines know it: None",
    "eviction_events": "nobody tells them: 0",
    "preemptions": "only engines know them: 0",
    "retries": "what is sent again is a request like others: 0",
    "retrying_requests": "what is sent again is a request like others: 0",
    "engines_up": "those whose servers get requests",
    "engines_by_tier": "what is stated of the servers, else 0",
    "engines_split": "nobody tells it: 0",
    "active_requests": "requests at the servers, whether they run them or have them wait",
    "gpu_busy_share": "share of time with a request at a server: an upper bound",
    "estimated_cost_per_1k": "at the price of the task's GPUs, whatever serves",
}
"""Fields of an observation that are not, or not quite, what they are in the simulator, where clients alone
measure: what they hold.
"""


_BY_TENANT = (
    "tenant_arrived",
    "tenant_completed",
    "tenant_failed",
    "tenant_first_tokens",
    "tenant_headroom",
    "tenant_in_slo",
    "tenant_output_tokens",
    "tenant_ttft_s",
)
"""Figures of a window that are counted for each tenant."""


@dataclass(eq=False, slots=True)
class LiveRequest:
    """A request on its way. Times are of the event loop's clock (s).

    Attributes:
        index: index in order of arrival.
        tenant: index of who sent it.
        priority: lower is more urgent.
        arrival_s: when it was due.
        sequences: sequences that an engine runs for it.
        first_s: when its first token came; nan before.
        begun_s: when the last of its sequences to begin had its first token; nan before.
        last_s: when its last piece came; nan before.
        last_of: when the last piece of each sequence came.
        steps: pieces that came.
        at_endpoint: whether it was sent.
        over: whether it is completed or has failed.
        tier: index of the precision that serves it; None where nobody says.
        prompt_tokens: about.
        excused: whether it was there while an upstream was silent: that it is late is the silence's doing.
    """

    index: int
    tenant: int
    priority: int
    arrival_s: float
    sequences: int = 1
    first_s: float = float("nan")
    begun_s: float = float("nan")
    last_s: float = float("nan")
    last_of: dict[int, float] = field(default_factory=dict)
    steps: int = 0
    at_endpoint: bool = False
    over: bool = False
    tier: int | None = None
    prompt_tokens: int = 0
    excused: bool = False


class Ledger:
    """Counts what happens to requests.

    A request counts once for each of its sequences, in all counts: that many single requests would have asked
    the same of the engines.

    Between two windows time stands still: what happens then counts in the next window, but for busy time.

    Args:
        tenants: who sends them.
        engines: engines that serve.

    Attributes:
        failures: requests without a complete answer by reason, over all windows; also those whose clients
            were mistaken.
        excused: requests that ended in the last window outside of their SLO while, or after, an upstream was
            silent. They are in the record; who judges by it what to do next should leave them out.
        totals: totals of each tenant, over all windows.
    """

    def __init__(self, tenants: tuple[Tenant, ...], engines: int) -> None:
        self._tenants = tenants
        self._engines = engines
        self.failures: Counter[str] = Counter()
        self.excused = self._excused = 0
        self.totals = tuple(Totals() for _ in tenants)
        self._running = 0
        self._marked_s: float | None = None
        self._busy_s = self._running_s = 0.0
        self._steps = 0
        self._ttft_s: list[float] = []
        self._gaps_s: list[float] = []
        self._mistaken = [0] * len(tenants)  # to be taken out of what arrived, and their prompts
        self._mistaken_tokens = 0
        self._window: Any = self.blank()
        # Plain numbers until the window ends: every request adds to several of them.
        self._counts: Counter[str] = Counter()
        self._by_tenant = {name: [0.0] * len(tenants) for name in _BY_TENANT}

    def blank(self) -> NDArray[np.void]:
        """WINDOW of a cell that has done nothing."""
        window = np.zeros((), WINDOW)
        for name in ("mean_ttft_s", "p50_ttft_s", "p99_ttft_s", "p50_gap_s", "p99_gap_s"):
            window[name] = np.nan
        window["engines_up"] = self._engines
        return window

    def open(self, now_s: float) -> None:
        """Begin a window."""
        self._marked_s = now_s

    def arrived(self, request: LiveRequest, prompt_tokens: int) -> None:
        """A client sent a request."""
        request.prompt_tokens = prompt_tokens
        totals, count = self.totals[request.tenant], request.sequences
        self._counts["arrived"] += count
        self._counts["arrived_prompt_tokens"] += prompt_tokens
        self._by_tenant["tenant_arrived"][request.tenant] += count
        totals.arrived += count
        totals.prompt_tokens += prompt_tokens

    def sent(self, request: LiveRequest, now_s: float) -> None:
        """It went to the endpoint."""
        self._mark(now_s)
        request.at_endpoint = True
        self._running += request.sequences

    def returned(self, request: LiveRequest, now_s: float) -> None:
        """It could not be handed over, and waits again."""
        self._mark(now_s)
        request.at_endpoint = False
        self._running -= request.sequences

    def step(self, request: LiveRequest, now_s: float, sequence: int = 0, count: int = 1) -> None:
        """A piece of its answer came, or several at once.

        Args:
            request: which.
            now_s: time of the loop's clock (s).
            sequence: index of the sequence that it belongs to; one that it has not is taken for the first.
            count: pieces.
        """
        totals = self.totals[request.tenant]
        totals.output_tokens += count
        if not 0 <= sequence < request.sequences:
            sequence = 0
        last_s = request.last_of.get(sequence)
        if request.steps == 0:
            request.first_s = now_s
        if last_s is None:
            request.begun_s = now_s
            self._first_tokens(request, now_s, 1)
        else:
            gap_s = now_s - last_s
            self._gaps_s.append(gap_s)
            totals.itl_s.add(gap_s)
        if count > 1:  # the others come with it
            self._gaps_s += [0.0] * (count - 1)
            totals.itl_s.add(0.0, count - 1)
        request.last_s = request.last_of[sequence] = now_s
        request.steps += count
        self._steps += count

    def _first_tokens(self, request: LiveRequest, now_s: float, count: int) -> None:
        """So many of its sequences had their first token."""
        totals, ttft_s = self.totals[request.tenant], now_s - request.arrival_s
        self._ttft_s.extend([ttft_s] * count)
        self._by_tenant["tenant_first_tokens"][request.tenant] += count
        self._by_tenant["tenant_ttft_s"][request.tenant] += ttft_s * count
        totals.ttft_s.add(ttft_s, count)
        totals.recent_ttft_s.extend([ttft_s] * count)

    def completed(self, request: LiveRequest, now_s: float, tokens: int | None) -> None:
        """Its answer is complete. One without a piece ended with its first token, and began with its end.

        Args:
            request: which.
            now_s: time of the loop's clock (s).
            tokens: tokens of the answer, as the endpoint counts them; None where it does not.
        """
        self._end(request, now_s)
        if not request.steps:
            request.first_s = request.begun_s = request.last_s = now_s
        # Of answers that are not streamed, all sequences come at once, and count as one piece.
        if missing := request.sequences - len(request.last_of):
            self._first_tokens(request, request.first_s, missing)
        tokens = max(tokens or 0, request.steps)
        tenant, count = self._tenants[request.tenant], request.sequences
        self._counts["completed"] += count
        self._counts["output_tokens"] += tokens - request.steps
        self._by_tenant["tenant_completed"][request.tenant] += count
        self._by_tenant["tenant_output_tokens"][request.tenant] += tokens
        tpot_s = (request.last_s - request.first_s) / max(tokens / count - 1, 1)
        totals = self.totals[request.tenant]
        totals.outcomes["completed"] += count
        totals.output_tokens += tokens - request.steps
        totals.e2e_s.add(request.last_s - request.arrival_s, count)
        if tokens > count:
            totals.tpot_s.add(tpot_s, count)
            totals.recent_tpot_s.extend([tpot_s] * count)
        ttft = (request.begun_s - request.arrival_s) / tenant.ttft_slo_s  # of all its sequences
        tpot = tpot_s / tenant.tpot_slo_s
        if max(ttft, tpot) <= 1:
            totals.in_slo += count
            self._by_tenant["tenant_in_slo"][request.tenant] += count
            self._by_tenant["tenant_headroom"][request.tenant] += count * (1 - max(ttft, tpot))
            if request.tier is not None:
                self._window["tier_in_slo"][request.tier, request.tenant] += count
        elif request.excused:
            self._excused += count

    def failed(self, request: LiveRequest, now_s: float, reason: str, outcome: Outcome = "failed") -> None:
        """It has no complete answer, and will have none."""
        self._end(request, now_s)
        count = request.sequences
        self.totals[request.tenant].outcomes[outcome] += count
        self.failures[reason] += count
        self._counts["failed"] += count
        self._by_tenant["tenant_failed"][request.tenant] += count
        self._excused += count * request.excused

    def refused(self, request: LiveRequest, now_s: float, reason: str) -> None:
        """It was not let in."""
        self._counts["refused"] += request.sequences
        self.failed(request, now_s, reason, "refused")

    def rejected(self, request: LiveRequest, now_s: float, reason: str) -> None:
        """It cannot be served, by a mistake of its client: it counts as if it had not been sent.

        Where it arrived in an earlier window, one that arrives later is left out for it.
        """
        self._end(request, now_s)
        self.totals[request.tenant].outcomes["rejected"] += request.sequences
        self.failures[reason] += request.sequences
        self._mistaken[request.tenant] += request.sequences
        self._mistaken_tokens += request.prompt_tokens

    def given_up(self, request: LiveRequest, now_s: float, reason: str) -> None:
        """Its client went away."""
        self._counts["timeouts"] += request.sequences
        self.failed(request, now_s, reason, "given_up")

    def close(
        self, now_s: float, start_s: float, end_s: float, in_flight: Iterable[LiveRequest]
    ) -> tuple[NDArray[np.void], NDArray[np.int64], NDArray[np.int64]]:
        """End the window.

        Args:
            now_s: time of the loop's clock (s).
            start_s: start of the window in the episode's time (s).
            end_s: its end (s).
            in_flight: requests that have arrived and are not over.

        Returns:
            Its WINDOW record, and the histograms of times to first token and of gaps as in `WindowRecord`.
        """
        self._mark(now_s)
        self._marked_s = None
        window = self._filled()
        self.excused, self._excused = self._excused, 0
        self._leave_out(window)
        window["start_s"], window["end_s"] = start_s, end_s
        window["output_tokens"] += self._steps
        for request in in_flight:
            count = request.sequences
            window["in_flight"] += count
            window["tenant_in_flight"][request.tenant] += count
            window["running" if request.at_endpoint else "waiting"] += count
            if not request.at_endpoint:
                window["oldest_wait_s"] = max(window["oldest_wait_s"], now_s - request.arrival_s)
        window["first_tokens"] = len(self._ttft_s)
        if self._ttft_s:
            window["mean_ttft_s"] = np.mean(self._ttft_s)
            window["p50_ttft_s"], window["p99_ttft_s"] = np.percentile(self._ttft_s, (50, 99))
        if self._gaps_s:
            window["p50_gap_s"], window["p99_gap_s"] = np.percentile(self._gaps_s, (50, 99))
        window["busy_s"] = self._busy_s * self._engines
        window["mean_running"] = self._running_s / window["busy_s"] if self._busy_s else 0.0
        edges = histogram_edges_s()[1:-1]  # the first and the last bin are open
        ttft, gaps = (
            np.bincount(np.searchsorted(edges, values, side="right"), minlength=HISTOGRAM_BINS)
            for values in (self._ttft_s, self._gaps_s)
        )
        self._busy_s = self._running_s = 0.0
        self._steps = 0
        self._ttft_s, self._gaps_s = [], []
        return window, ttft, gaps

    def _filled(self) -> Any:
        """The window with what has been counted; counts begin anew."""
        window, self._window = self._window, self.blank()
        for name, count in self._counts.items():
            window[name] = count
        self._counts.clear()
        for name, counts in self._by_tenant.items():
            window[name][: len(counts)] = counts
            counts[:] = [0.0] * len(counts)
        return window

    def _leave_out(self, window: Any) -> None:
        """Take requests with their clients' mistakes out of those that arrived."""
        for tenant, mistaken in enumerate(self._mistaken):
            left_out = min(mistaken, int(window["tenant_arrived"][tenant]))
            self._mistaken[tenant] -= left_out
            window["tenant_arrived"][tenant] -= left_out
            window["arrived"] -= left_out
        tokens = min(self._mistaken_tokens, int(window["arrived_prompt_tokens"]))
        self._mistaken_tokens -= tokens
        window["arrived_prompt_tokens"] -= tokens

    def _end(self, request: LiveRequest, now_s: float) -> None:
        self._mark(now_s)
        request.over = True
        self._running -= request.sequences * request.at_endpoint

    def _mark(self, now_s: float) -> None:
        """Account for the time since something last changed at the endpoint."""
        if self._marked_s is None:
            return
        passed_s = now_s - self._marked_s
        self._busy_s += passed_s * (self._running > 0)
        self._running_s += passed_s * self._running
        self._marked_s = now_s
