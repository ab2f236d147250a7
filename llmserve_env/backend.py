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

MAX_TENANTS = 32
"""Tenants that a window has places for."""

_AXES = {"tenant": MAX_TENANTS, "tier": len(QuantizationTier)}


@dataclass(frozen=True)
class Figure:
    """What a field of WindowRecord says of itself beside its type and docstring.

    Attributes:
        kind: what its number is: a sum over the window (count), the state at its end (gauge), a mean or a
            percentile over it, or its place in time (time).
        group: of figures, with which a task has it or not.
        unit: of the number.
        axes: of an array: "tenant", "tier", or both.
    """

    kind: Literal["count", "gauge", "mean", "percentile", "time"]
    group: str
    unit: str
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
    """Requests that each tenant sent."""
    tenant_completed: Annotated[NDArray[np.int64], Figure("count", "tenants", "requests", ("tenant",))]
    """Requests of each that got their last token."""
    tenant_failed: Annotated[NDArray[np.int64], Figure("count", "tenants", "requests", ("tenant",))]
    """Requests of each that were given up or refused."""
    tenant_in_flight: Annotated[NDArray[np.int64], Figure("gauge", "tenants", "requests", ("tenant",))]
    """Requests of each that are not over."""
    tenant_in_slo: Annotated[NDArray[np.int64], Figure("count", "tenants", "requests", ("tenant",))]
    """Requests of each completed with TTFT and TPOT within the tenant's SLO."""
    tenant_output_tokens: Annotated[NDArray[np.int64], Figure("count", "tenants", "tokens", ("tenant",))]
    """Tokens of completed requests of each."""
    tenant_first_tokens: Annotated[NDArray[np.int64], Figure("count", "tenants", "attempts", ("tenant",))]
    """Attempts of each that got their first token."""
    tenant_ttft_s: Annotated[NDArray[np.float64], Figure("count", "tenants", "s", ("tenant",))]
    """Sum of their times to first token."""
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
    """Serves a workload window by window under the action of the moment."""

    def serve(self, action: ServeAction, window_s: float) -> WindowRecord:
        """Apply an action, serve for `window_s` seconds and tell what happened."""
        ...
