"""What serves: the interface between the worlds below (simulated, live) and everything above."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, get_args, get_type_hints

import numpy as np
from numpy.typing import NDArray

from llmserve_env.schema import QuantizationTier

if TYPE_CHECKING:
    from llmserve_env.schema import ServeAction
    from llmserve_env.workloads.workload import Workload

MAX_TENANTS = 32
"""Tenants that a window has places for."""

_AXES = {"tenant": MAX_TENANTS, "tier": len(QuantizationTier)}


@dataclass(frozen=True)
class Figure:
    """What a field of WindowRecord says of itself beside its type and docstring.

    Attributes:
        kind: what its number is: a sum over the window (count), the state at its end (gauge), a mean or a
            percentile over it, or its place in time (time).
        group: group of figures, which a task has or not.
        unit: unit of the number, if it has one.
        axes: axes of an array: "tenant", "tier", or both.
    """

    kind: Literal["count", "gauge", "mean", "percentile", "time"]
    group: str
    unit: str = ""
    axes: tuple[str, ...] = ()


@dataclass(frozen=True)
class WindowRecord:
    """What happened in one window. Each figure is declared here, once; WINDOW follows from it.

    A batch counts in the window in which it was scheduled. At every window's end, over all windows so far:
    arrived = completed + failed + cancelled + in flight.
    """

    start_s: Annotated[float, Figure("time", "time", "s")]
    """Start of the window."""
    end_s: Annotated[float, Figure("time", "time", "s")]
    """End of the window."""
    arrived: Annotated[int, Figure("count", "load", "requests")]
    """Requests that clients sent."""
    arrived_prompt_tokens: Annotated[int, Figure("count", "load", "tokens")]
    """Tokens of their prompts."""
    completed: Annotated[int, Figure("count", "service", "requests")]
    """Requests that got their last token."""
    failed: Annotated[int, Figure("count", "service", "requests")]
    """Requests whose last attempt was given up or not let in."""
    cancelled: Annotated[int, Figure("count", "service", "requests")]
    """Requests refused on arrival, too long for the KV cache."""
    refused: Annotated[int, Figure("count", "load", "attempts")]
    """Attempts that `admission_rate` did not let in."""
    timeouts: Annotated[int, Figure("count", "load", "attempts")]
    """Attempts that their client gave up, waiting for the first token or for the whole answer."""
    retries: Annotated[int, Figure("count", "load", "attempts")]
    """Attempts after a request's first that were sent."""
    in_flight: Annotated[int, Figure("gauge", "load", "requests")]
    """Requests that have arrived and are not over; one is over when the batch with its last token is
    scheduled."""
    retrying: Annotated[int, Figure("gauge", "load", "requests")]
    """Requests in flight whose client waits to send them again."""
    waiting: Annotated[int, Figure("gauge", "load", "requests")]
    """Requests in a queue or in transfer."""
    running: Annotated[int, Figure("gauge", "load", "requests")]
    """Requests in an engine's batch, until the batch with their last token has ended."""
    oldest_wait_s: Annotated[float, Figure("gauge", "load", "s")]
    """Age of the oldest attempt that waits for its first admission, 0 without one."""
    kv_occupancy: Annotated[float, Figure("gauge", "memory", "share")]
    """Share of all KV blocks that running requests hold."""
    gpu_memory_gb: Annotated[float, Figure("gauge", "memory", "GB")]
    """Weights and held KV blocks of all engines."""
    preemptions: Annotated[int, Figure("count", "memory", "requests")]
    """Running requests thrown back to the queue."""
    prefill_tokens: Annotated[int, Figure("count", "service", "tokens")]
    """Tokens of prefill computed, recomputation included."""
    cached_tokens: Annotated[int, Figure("count", "service", "tokens")]
    """Tokens of prefill spared by the prefix cache."""
    output_tokens: Annotated[int, Figure("count", "service", "tokens")]
    """Tokens emitted; what speculation ran past a request's end is taken off when it ends."""
    iterations: Annotated[int, Figure("count", "engines", "batches")]
    """Batches run by all engines."""
    busy_s: Annotated[float, Figure("count", "engines", "s")]
    """Time that batches took on all engines."""
    mean_running: Annotated[float, Figure("mean", "load", "requests")]
    """Running requests averaged over busy time."""
    mean_kv_occupancy: Annotated[float, Figure("mean", "memory", "share")]
    """Share of KV blocks held over busy time; blocks taken in a stretch count half."""
    evictions: Annotated[int, Figure("count", "memory", "blocks")]
    """Cached blocks that were overwritten."""
    drafted_tokens: Annotated[int, Figure("count", "service", "tokens")]
    """Draft tokens proposed."""
    accepted_tokens: Annotated[int, Figure("count", "service", "tokens")]
    """Draft tokens accepted."""
    transfers: Annotated[int, Figure("count", "engines", "caches")]
    """KV caches sent from prefill to decode engines."""
    first_tokens: Annotated[int, Figure("count", "service", "attempts")]
    """Attempts that got their first token."""
    mean_ttft_s: Annotated[float, Figure("mean", "latency", "s")]
    """Mean time to first token, from the request's first attempt on (nan without any)."""
    p50_ttft_s: Annotated[float, Figure("percentile", "latency", "s")]
    """Median time to first token (nan without any); percentiles come from histograms with bins 7 to 12%
    wide."""
    p99_ttft_s: Annotated[float, Figure("percentile", "latency", "s")]
    """99th percentile of time to first token (nan without any)."""
    p50_gap_s: Annotated[float, Figure("percentile", "latency", "s")]
    """Median time between a sequence's steps (nan without any)."""
    p99_gap_s: Annotated[float, Figure("percentile", "latency", "s")]
    """99th percentile of time between a sequence's steps (nan without any)."""
    engines_up: Annotated[int, Figure("gauge", "engines", "engines")]
    """Engines that are neither draining nor reloading."""
    engines_split: Annotated[int, Figure("gauge", "engines", "engines")]
    """Engines in a prefill or decode pool, or loading for one."""
    engines_tier: Annotated[NDArray[np.int64], Figure("gauge", "engines", "engines", ("tier",))]
    """Engines by the precision of their weights, or of what they load while they do."""
    tenant_arrived: Annotated[NDArray[np.int64], Figure("count", "tenants", "requests", ("tenant",))]
    """Requests that the tenant sent."""
    tenant_completed: Annotated[NDArray[np.int64], Figure("count", "tenants", "requests", ("tenant",))]
    """Requests of the tenant that got their last token."""
    tenant_failed: Annotated[NDArray[np.int64], Figure("count", "tenants", "requests", ("tenant",))]
    """Requests of the tenant that were given up or refused."""
    tenant_in_flight: Annotated[NDArray[np.int64], Figure("gauge", "tenants", "requests", ("tenant",))]
    """Requests of the tenant that are not over."""
    tenant_in_slo: Annotated[NDArray[np.int64], Figure("count", "tenants", "requests", ("tenant",))]
    """Requests of the tenant completed with TTFT and TPOT within the tenant's SLO."""
    tenant_output_tokens: Annotated[NDArray[np.int64], Figure("count", "tenants", "tokens", ("tenant",))]
    """Tokens of the tenant's completed requests."""
    tenant_first_tokens: Annotated[NDArray[np.int64], Figure("count", "tenants", "attempts", ("tenant",))]
    """Attempts of the tenant that got their first token."""
    tenant_ttft_s: Annotated[NDArray[np.float64], Figure("count", "tenants", "s", ("tenant",))]
    """Sum of the times to first token of its attempts."""
    tenant_headroom: Annotated[NDArray[np.float64], Figure("count", "tenants", "share", ("tenant",))]
    """Sum over requests within the SLO of 1 - max(TTFT, TPOT), both as shares of what was promised."""
    tier_in_slo: Annotated[NDArray[np.int64], Figure("count", "tenants", "requests", ("tier", "tenant"))]
    """Requests within the SLO by the precision of the engine that ended them."""
    ttft_histogram: NDArray[np.int64]
    """int64[bins], first tokens by TTFT; edges in sim.state.histogram_edges_s."""
    gap_histogram: NDArray[np.int64]
    """int64[bins], steps of sequences by the time since the last; a step yields one token, under speculation
    several."""
    not_applied: dict[str, str]
    """Fields of the action that had no effect, with the reason."""

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


def _figures() -> dict[str, tuple[Figure, type[np.generic]]]:
    """Figures by name with their number's type, in the order of WindowRecord."""
    figures: dict[str, tuple[Figure, type[np.generic]]] = {}
    for name, hint in get_type_hints(WindowRecord, include_extras=True).items():
        kind, *extras = get_args(hint) or (hint,)
        for figure in extras:
            if isinstance(figure, Figure):
                scalar = (
                    get_args(get_args(kind)[1])[0]
                    if figure.axes
                    else {int: np.int64, float: np.float64}[kind]
                )
                figures[name] = figure, scalar
    return figures


_FIGURES = _figures()

FIGURES: dict[str, Figure] = {name: figure for name, (figure, _) in _FIGURES.items()}
"""All window figures by name, in the order of WINDOW."""

WINDOW = np.dtype(
    [
        (name, scalar, tuple(_AXES[axis] for axis in figure.axes))
        for name, (figure, scalar) in _FIGURES.items()
    ],
    align=True,
)
"""One window of one episode as a record of its figures. Tenants fill the first places of their figures, the
others are 0."""


def figure_meanings() -> dict[str, str]:
    """What each figure means, from its docstring in WindowRecord."""
    (record,) = ast.parse(textwrap.dedent(inspect.getsource(WindowRecord))).body
    assert isinstance(record, ast.ClassDef)
    meanings = {}
    for field, text in zip(record.body, record.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(field.target, ast.Name)
            meanings[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return {name: meanings[name] for name in FIGURES}


def window_field(window: NDArray[np.void], name: str, tenants: int) -> Any:
    """A figure of one WINDOW record; those of tenants without the places of tenants that are not there."""
    value = window[name]
    return value[..., :tenants] if "tenant" in FIGURES[name].axes else value


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
        excused: requests of the last window that were late, or failed, because what serves was silent, which
            says nothing of the action in force.
    """

    windows: NDArray[np.void]
    workloads: list[Workload]
    replayable: bool
    stale: str | None
    excused: int

    @property
    def unmeasured(self) -> Mapping[str, str]:
        """See the class."""
        ...

    def reset(self, episode: int, workload: Workload, seed: int) -> None:
        """Begin an episode anew at time 0, in the starting configuration; the others stay as they are.

        Args:
            episode: its place, 0 to n-1.
            workload: its requests, with the tenants that all workloads here have.
            seed: seed of the episode, for what is drawn beside the workload.

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
