"""What serves: the interface between the worlds below (simulated, live) and everything above."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from llmserve_env.schema import ServeAction
    from llmserve_env.workloads.workload import Workload

MAX_TENANTS = 32

_TENANT = (MAX_TENANTS,)

WINDOW = np.dtype(
    [
        ("start_s", np.float64),
        ("end_s", np.float64),
        ("arrived", np.int64),
        ("arrived_prompt_tokens", np.int64),
        ("completed", np.int64),
        ("failed", np.int64),
        ("cancelled", np.int64),
        ("refused", np.int64),
        ("timeouts", np.int64),
        ("retries", np.int64),
        ("in_flight", np.int64),
        ("retrying", np.int64),
        ("waiting", np.int64),
        ("running", np.int64),
        ("oldest_wait_s", np.float64),
        ("kv_occupancy", np.float64),
        ("gpu_memory_gb", np.float64),
        ("preemptions", np.int64),
        ("prefill_tokens", np.int64),
        ("cached_tokens", np.int64),
        ("output_tokens", np.int64),
        ("iterations", np.int64),
        ("busy_s", np.float64),
        ("mean_running", np.float64),
        ("mean_kv_occupancy", np.float64),
        ("evictions", np.int64),
        ("drafted_tokens", np.int64),
        ("accepted_tokens", np.int64),
        ("transfers", np.int64),
        ("first_tokens", np.int64),
        ("mean_ttft_s", np.float64),
        ("p50_ttft_s", np.float64),
        ("p99_ttft_s", np.float64),
        ("p50_gap_s", np.float64),
        ("p99_gap_s", np.float64),
        ("engines_up", np.int64),
        ("engines_split", np.int64),
        ("engines_tier", np.int64, (3,)),
        ("tenant_arrived", np.int64, _TENANT),
        ("tenant_completed", np.int64, _TENANT),
        ("tenant_failed", np.int64, _TENANT),
        ("tenant_in_flight", np.int64, _TENANT),
        ("tenant_in_slo", np.int64, _TENANT),
        ("tenant_output_tokens", np.int64, _TENANT),
        ("tenant_first_tokens", np.int64, _TENANT),
        ("tenant_ttft_s", np.float64, _TENANT),
        ("tenant_headroom", np.float64, _TENANT),
        ("tier_in_slo", np.int64, (3, *_TENANT)),
    ],
    align=True,
)
"""One window of one episode as a record; `WindowRecord` says what each field means. Tenants fill the first
places of their fields, the others are 0."""


@dataclass(frozen=True)
class WindowRecord:
    """What happened in one window. Counts are of this window, gauges of its end.

    A batch counts in the window in which it was scheduled. At every window's end, over all windows so far:
    arrived = completed + failed + cancelled + in flight.

    Attributes:
        start_s: start of the window (s).
        end_s: its end (s).
        arrived: requests that clients sent.
        arrived_prompt_tokens: tokens of their prompts.
        completed: requests that got their last token.
        failed: requests whose last try was given up or not let in.
        cancelled: requests refused on arrival, too long for the KV cache.
        refused: tries that `admission_rate` did not let in.
        timeouts: tries that their client gave up, waiting for the first token or for the whole answer.
        retries: tries after a request's first that were sent.
        in_flight: requests that have arrived and are not over; one is over when the batch with its last
            token is scheduled (gauge).
        retrying: of those, requests whose client waits to send them again (gauge).
        waiting: requests in a queue or in transfer (gauge).
        running: requests in an engine's batch, until the batch with their last token has ended (gauge).
        oldest_wait_s: age of the oldest try that waits for its first admission, 0 without one (s, gauge).
        kv_occupancy: share of all KV blocks that running requests hold (gauge).
        gpu_memory_gb: weights and held KV blocks of all engines (GB, gauge).
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
        first_tokens: tries that got their first token.
        mean_ttft_s: of first tokens in this window, from the request's first try on (s; nan without any).
        p50_ttft_s: their median (s; nan without any); percentiles come from histograms with bins 7 to 12%
            wide.
        p99_ttft_s: their 99th percentile (s; nan without any).
        p50_gap_s: median time between a sequence's steps (s; nan without any).
        p99_gap_s: 99th percentile of the same (s; nan without any).
        engines_up: engines that are neither draining nor reloading (gauge).
        engines_split: engines in a prefill or decode pool, or loading for one (gauge).
        engines_tier: int64[3], engines by the precision of their weights FP16, INT8, INT4; of what they load
            while they do (gauge).
        tenant_arrived: int64[tenant].
        tenant_completed: int64[tenant].
        tenant_failed: int64[tenant], given up or refused.
        tenant_in_flight: int64[tenant] (gauge).
        tenant_in_slo: int64[tenant], completed with TTFT and TPOT within the tenant's SLO.
        tenant_output_tokens: int64[tenant], tokens of completed requests.
        tenant_first_tokens: int64[tenant], tries that got their first token.
        tenant_ttft_s: float64[tenant], sum of their TTFT (s).
        tenant_headroom: float64[tenant], over requests within the SLO the sum of 1 - max(TTFT, TPOT), each as
            a share of what was promised.
        tier_in_slo: int64[3, tenant], requests within the SLO by the precision of the engine that ended them.
        ttft_histogram: int64[bins], first tokens by TTFT; edges in sim.state.histogram_edges_s.
        gap_histogram: int64[bins], steps of sequences by the time since the last; a step yields one token,
            under speculation several.
        not_applied: fields of the action that had no effect, with the reason.
    """

    start_s: float
    end_s: float
    arrived: int
    arrived_prompt_tokens: int
    completed: int
    failed: int
    cancelled: int
    refused: int
    timeouts: int
    retries: int
    in_flight: int
    retrying: int
    waiting: int
    running: int
    oldest_wait_s: float
    kv_occupancy: float
    gpu_memory_gb: float
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
    first_tokens: int
    mean_ttft_s: float
    p50_ttft_s: float
    p99_ttft_s: float
    p50_gap_s: float
    p99_gap_s: float
    engines_up: int
    engines_split: int
    engines_tier: NDArray[np.int64]
    tenant_arrived: NDArray[np.int64]
    tenant_completed: NDArray[np.int64]
    tenant_failed: NDArray[np.int64]
    tenant_in_flight: NDArray[np.int64]
    tenant_in_slo: NDArray[np.int64]
    tenant_output_tokens: NDArray[np.int64]
    tenant_first_tokens: NDArray[np.int64]
    tenant_ttft_s: NDArray[np.float64]
    tenant_headroom: NDArray[np.float64]
    tier_in_slo: NDArray[np.int64]
    ttft_histogram: NDArray[np.int64]
    gap_histogram: NDArray[np.int64]
    not_applied: dict[str, str]

    @classmethod
    def of(
        cls,
        window: NDArray[np.void],
        tenants: int,
        ttft_histogram: NDArray[np.int64],
        gap_histogram: NDArray[np.int64],
        not_applied: Mapping[str, str],
    ) -> WindowRecord:
        """The record of one WINDOW row, its tenant fields cut to the number of tenants."""
        values: dict[str, Any] = {}
        for name in WINDOW.names or ():
            value = window_field(window, name, tenants)
            values[name] = value.item() if value.ndim == 0 else value.copy()
        return cls(
            **values,
            ttft_histogram=ttft_histogram.copy(),
            gap_histogram=gap_histogram.copy(),
            not_applied=dict(not_applied),
        )


def window_field(window: NDArray[np.void], name: str, tenants: int) -> Any:
    """A field of one WINDOW record; those of tenants without the places of tenants that are not there."""
    value = window[name]
    return value if value.ndim == 0 or name == "engines_tier" else value[..., :tenants]


class Backend(Protocol):
    """What serves n episodes side by side: the simulator, a live service. Nothing above knows which it is.

    It is made with the first workload of every episode and begun (`episode.OpenBackend`). Then `serve` is
    called once a window, `reset` whenever an episode begins anew, `close` when nothing is to be served for
    the time being. What it says of the last window can be read until the next call of `serve` or `reset`.

    Attributes:
        windows: WINDOW[n], records of the last window of each episode; before an episode's first window, of
            a cell that has done nothing. The next call overwrites it: copy what has to last.
        workloads: what is served of each episode's workload, which can be less than was asked for.
        replayable: whether the same workloads and actions bring the same records again, so that a log can be
            graded by replay.
        unmeasured: fields of a `ServeObservation` that the last window's records do not tell, or not quite,
            with what they hold instead; empty where everything is measured.
        stale: why the last window's records cannot be trusted, None if they can.
    """

    windows: NDArray[np.void]
    workloads: list[Workload]
    replayable: bool
    stale: str | None

    @property
    def unmeasured(self) -> Mapping[str, str]:
        """See the class."""
        ...

    def reset(self, episode: int, workload: Workload, seed: int) -> None:
        """Begin an episode anew at time 0, in the starting configuration; the others stay as they are.

        Args:
            episode: its place, 0 to n-1.
            workload: its requests, with the tenants that all workloads here have.
            seed: of the episode, for what is drawn beside the workload.

        Raises:
            InputError: the workload cannot be served here, or what serves cannot be reached.
        """
        ...

    def serve(
        self, actions: NDArray[np.void], window_s: float, which: NDArray[np.bool_] | None = None
    ) -> NDArray[np.void]:
        """Apply one action to each episode and serve all of them for one window.

        Args:
            actions: ACTION[n].
            window_s: length of the window (s).
            which: bool[n], the episodes to serve (default: all); the others stay as they are.

        Returns:
            WINDOW[n], `windows`.

        Raises:
            InputError: an episode is over or closed, or the window is not positive.
        """
        ...

    def not_applied(self, action: ServeAction) -> dict[str, str]:
        """Fields of an action that would have no effect if it were set now, with the reason.

        Agents ask it before they act: masks of actions and the pilot's log come from it.
        """
        ...

    def ignored(self, episode: int, action: NDArray[np.void]) -> dict[str, str]:
        """Fields of the last action that had no effect in an episode's last window, with the reason.

        Args:
            episode: its place.
            action: ACTION, that of the window, for a backend that keeps none.
        """
        ...

    def capabilities(self) -> dict[str, str]:
        """How each field of an action is applied, in a line each; {} where there is nothing to say of it."""
        ...

    def notes(self) -> dict[str, Any]:
        """What there is to know of the episode beside its records, ready for JSON; goes into its info."""
        ...

    def snapshot(self) -> bytes:
        """The exact state of all episodes, mid-episode too, for `restore` on a backend like this one.

        Raises:
            InputError: what serves has no state that could be kept, as a live service.
        """
        ...

    def restore(self, snapshot: bytes) -> None:
        """Return to a state that `snapshot` of this process gave: never load one from an untrusted source.

        Raises:
            InputError: as `snapshot`.
        """
        ...

    def close(self) -> None:
        """Cancel what is under way and give back what is held; a `reset` begins anew.

        Called when all episodes are over, and when nobody plays on. What was served can still be read.

        Raises:
            InputError: settings that were found cannot be brought back.
        """
        ...
