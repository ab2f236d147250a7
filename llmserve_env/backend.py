"""What serves: the interface between the worlds below (simulated, live) and everything above."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from llmserve_env.schema import ServeAction


@dataclass(frozen=True)
class WindowRecord:
    """What happened in one window. Counts are of this window, gauges of its end.

    A batch counts in the window in which it was scheduled. At every window's end, over all windows so far:
    arrived = completed + failed + cancelled + in flight.

    Attributes:
        start_s: start of the window (s).
        end_s: its end (s).
        arrived: requests that clients sent.
        completed: requests that got their last token.
        failed: requests that their client gave up before the first token.
        cancelled: requests refused on arrival, too long for the KV cache.
        in_flight: requests that have arrived and are not over; one is over when the batch with its last
            token is scheduled (gauge).
        waiting: requests in a queue or in transfer (gauge).
        running: requests in an engine's batch, until the batch with their last token has ended (gauge).
        kv_occupancy: share of all KV blocks that running requests hold (gauge).
        preemptions: running requests thrown back to the queue.
        prefill_tokens: tokens of prefill computed, recomputation included.
        cached_tokens: tokens of prefill spared by the prefix cache.
        output_tokens: tokens emitted; what speculation ran past a request's end is taken off when it ends.
        iterations: batches run, all engines.
        busy_s: time that batches took, all engines (s).
        mean_running: running requests averaged over busy time.
        mean_kv_occupancy: share of KV blocks held over busy time; blocks taken in a stretch count half.
        evictions: cached blocks that were overwritten.
        drafted_tokens: draft tokens proposed.
        accepted_tokens: draft tokens accepted.
        transfers: KV caches sent from prefill to decode engines.
        mean_ttft_s: of first tokens in this window (s; nan without any).
        ttft_histogram: int64[bins], first tokens by TTFT; edges in sim.state.histogram_edges_s.
        gap_histogram: int64[bins], steps of sequences by the time since the last; a step yields one token,
            under speculation several.
        tenant_arrived: int64[tenant].
        tenant_completed: int64[tenant].
        tenant_failed: int64[tenant].
        tenant_in_slo: int64[tenant], completed with TTFT and TPOT within the tenant's SLO.
        tenant_output_tokens: int64[tenant], tokens of completed requests.
        not_applied: fields of the action that had no effect, with the reason.
    """

    start_s: float
    end_s: float
    arrived: int
    completed: int
    failed: int
    cancelled: int
    in_flight: int
    waiting: int
    running: int
    kv_occupancy: float
    preemptions: int
    prefill_tokens: int
    cached_tokens: int
    output_tokens: int
    iterations: int
    busy_s: float
    mean_running: float
    mean_kv_occupancy: float
    evictions: int
    drafted_tokens: int
    accepted_tokens: int
    transfers: int
    mean_ttft_s: float
    ttft_histogram: NDArray[np.int64]
    gap_histogram: NDArray[np.int64]
    tenant_arrived: NDArray[np.int64]
    tenant_completed: NDArray[np.int64]
    tenant_failed: NDArray[np.int64]
    tenant_in_slo: NDArray[np.int64]
    tenant_output_tokens: NDArray[np.int64]
    not_applied: dict[str, str]


class Backend(Protocol):
    """Serves a workload window by window under the action of the moment."""

    def serve(self, action: ServeAction, window_s: float) -> WindowRecord:
        """Apply an action, serve for `window_s` seconds and tell what happened."""
        ...
