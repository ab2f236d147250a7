"""Serving a workload from a command: in windows, with a progress bar, to a summary and a row a request."""

from __future__ import annotations

import csv
import io
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmserve_env.commands._report import STATISTICS, number, percent, statistics
from llmserve_env.errors import InputError
from llmserve_env.files import open_atomic

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmserve_env.backend import WindowRecord
    from llmserve_env.hardware import Profile
    from llmserve_env.schema import ServeAction
    from llmserve_env.sim.simulator import Outcomes
    from llmserve_env.workloads import Workload

COLUMNS = (
    "request_id",
    "tenant",
    "arrival_s",
    "prompt_tokens",
    "output_tokens",
    "ttft_s",
    "tpot_s",
    "e2e_s",
    "preemptions",
    "status",
)
"""Of the file that `write_requests` writes."""

FLAGS = {
    "batch_cap": "max_num_seqs",
    "quantization_tier": "quantization_tier",
    "prefill_decode_split": "split",
}
"""What the commands call an action's fields, where a field can be refused."""

_ROWS_A_CHUNK = 50_000
_GROWTH = 1.05  # of the windows after the last arrival: a long queue drains in few of them


@dataclass(frozen=True)
class Cell:
    """The engines that serve, and how they are set.

    Attributes:
        profile: hardware and model of each engine.
        action: the configuration, the same from start to end.
        max_num_batched_tokens: token budget of an iteration.
        kv_blocks: KV blocks that requests can hold, one engine.
        engines: their number.
        prefix_cache: whether freed blocks can be found again.
    """

    profile: Profile
    action: ServeAction
    max_num_batched_tokens: int
    kv_blocks: int
    engines: int = 1
    prefix_cache: bool = True


@dataclass(frozen=True)
class Served:
    """A workload that has been served to its end.

    Attributes:
        workload: what was asked for.
        cell: what served it.
        outcomes: of each request.
        windows: what happened, window by window.
    """

    workload: Workload
    cell: Cell
    outcomes: Outcomes
    windows: tuple[WindowRecord, ...]

    def total(self, name: str) -> float:
        """Sum of a count over all windows."""
        return float(sum(getattr(window, name) for window in self.windows))

    def per_tenant(self, name: str) -> NDArray[np.int64]:
        """Sum of a tenants' count over all windows, int64[tenant]."""
        counts: NDArray[np.int64] = np.sum([getattr(window, name) for window in self.windows], axis=0)
        return counts


def serve(workload: Workload, cell: Cell, *, windows: int = 200, name: str = "serving") -> Served:
    """Serve a workload to its end; the windows are for progress and gauges, outcomes do not depend on them.

    Args:
        workload: at least one request.
        cell: what serves it.
        windows: into how many the time until the last arrival is divided.
        name: what the progress bar says.

    Raises:
        InputError: the cell cannot do what the action asks for.
    """
    from tqdm import tqdm

    from llmserve_env.sim.simulator import Simulator

    if len(workload) == 0:
        raise InputError("holds no request to serve", file=workload.source or None)
    announce_compilation()
    simulator = Simulator(
        cell.profile,
        workload,
        engines=cell.engines,
        max_num_batched_tokens=cell.max_num_batched_tokens,
        kv_blocks=cell.kv_blocks,
        prefix_cache=cell.prefix_cache,
        action=cell.action,
    )
    window_s = max(workload.duration_s / windows, 0.01)
    records: list[WindowRecord] = []
    arrived = over = 0
    with tqdm(
        total=len(workload), desc=name, unit=" requests", unit_scale=True, delay=2, leave=False, disable=None
    ) as bar:
        while over < len(workload):
            record = simulator.serve(cell.action, window_s)
            records.append(record)
            for field, reason in record.not_applied.items():
                raise InputError(reason, field=FLAGS[field])
            arrived += record.arrived
            ended = record.completed + record.failed + record.cancelled
            over += ended
            bar.update(ended)
            if arrived < len(workload):
                continue
            window_s *= _GROWTH
            if ended == 0 and record.iterations == 0:  # the rest never fits the memory that requests may hold
                records.append(simulator.serve(cell.action, float("inf")))
                simulator.batch.fail_unfinished()
                break
    return Served(workload, cell, simulator.outcomes(), tuple(records))


def announce_compilation() -> None:
    """Say on stderr that the simulator is about to be compiled, where it has not been on this machine."""
    from llmserve_env.sim import kernel

    source = Path(kernel.__file__).stat().st_mtime
    compiled = Path(kernel.serve.stats.cache_path).glob("kernel.serve-*.nbi")
    if not kernel.serve.signatures and not any(index.stat().st_mtime >= source for index in compiled):
        print("compiling the simulator for this machine: once, for about half a minute", file=sys.stderr)


def write_requests(path: Path, served: Served) -> None:
    """Write one row a request, in order of arrival; times to the nanosecond, empty where undefined.

    Raises:
        InputError: the file cannot be written.
    """
    workload, outcomes = served.workload, served.outcomes
    names = [tenant.name for tenant in workload.tenants]
    with open_atomic(path) as file:
        file.write((",".join(COLUMNS) + "\n").encode())
        for low in range(0, len(workload), _ROWS_A_CHUNK):
            part = slice(low, low + _ROWS_A_CHUNK)
            high = min(part.stop, len(workload))
            text = io.StringIO(newline="")
            csv.writer(text, lineterminator="\n").writerows(
                zip(
                    workload.request_ids[part] or range(low, high),
                    [names[index] for index in workload.tenant[part].tolist()],
                    _seconds(outcomes.arrival_s[part]),
                    workload.prompt_tokens[part].tolist(),
                    workload.output_tokens[part].tolist(),
                    _seconds(outcomes.ttft_s[part]),
                    _seconds(outcomes.tpot_s[part]),
                    _seconds(outcomes.e2e_s[part]),
                    outcomes.preemptions[part].tolist(),
                    outcomes.status[part].tolist(),
                    strict=True,
                )
            )
            file.write(text.getvalue().encode())


def _seconds(values: NDArray[np.float64]) -> list[str]:
    return ["" if math.isnan(value) else f"{value:.9f}" for value in values.tolist()]


def summarise(served: Served) -> dict[str, Any]:
    """The figures of a run, as they go to JSON: what `rows` says in words.

    Rates are over the time from the first arrival to the last completion. A request is in its SLO if its TTFT
    and its TPOT both are; attainment is the share of all requests, failed ones included.
    """
    workload, cell, outcomes = served.workload, served.cell, served.outcomes
    action, status = cell.action, outcomes.status
    completed = status == "completed"
    start_s = float(outcomes.arrival_s[0])
    duration_s = float(max(outcomes.finish_s[completed], default=workload.duration_s)) - start_s
    busy_s = served.total("busy_s")
    computed, cached = served.total("prefill_tokens"), served.total("cached_tokens")
    drafted = served.total("drafted_tokens")
    in_slo = served.per_tenant("tenant_in_slo")
    return {
        "trace": workload.source,
        "profile": cell.profile.name,
        "cell": {
            "engines": cell.engines,
            "tensor_parallel_size": cell.profile.gpu.count,
            "max_num_seqs": action.batch_cap,
            "max_num_batched_tokens": cell.max_num_batched_tokens,
            "kv_tokens": cell.kv_blocks * cell.profile.engine.block_tokens,
            "kv_budget_fraction": action.kv_budget_fraction,
            "quantization_tier": action.quantization_tier.value,
            "speculation_depth": action.speculation_depth,
            "prefill_decode_split": action.prefill_decode_split,
            "priority_routing": action.priority_routing,
            "prefix_cache": cell.prefix_cache,
        },
        "requests": {
            "total": len(workload),
            **{name: int((status == name).sum()) for name in ("completed", "failed", "cancelled")},
        },
        "duration_s": duration_s,
        "ttft_s": statistics(outcomes.ttft_s),
        "tpot_s": statistics(outcomes.tpot_s),
        "e2e_s": statistics(outcomes.e2e_s),
        "tenants": {
            tenant.name: _tenant(served, index, int(in_slo[index]))
            for index, tenant in enumerate(workload.tenants)
        },
        "requests_per_s": _per(float(completed.sum()), duration_s),
        "output_tokens_per_s": _per(served.total("output_tokens"), duration_s),
        "goodput_per_s": _per(float(in_slo.sum()), duration_s),
        "kv_occupancy": {
            "mean": _per(sum(w.mean_kv_occupancy * w.busy_s for w in served.windows), busy_s),
            "peak": max(window.kv_occupancy for window in served.windows),
        },
        "preemptions": int(served.total("preemptions")),
        "prefix_cache": {
            "cached_tokens": int(cached),
            "prefill_tokens": int(computed),
            "hit_share": _per(cached, cached + computed),
        },
        "speculation": {
            "drafted_tokens": int(drafted),
            "accepted_share": _per(served.total("accepted_tokens"), drafted),
        },
        "busy_share": _per(busy_s, cell.engines * duration_s),
        "mean_running": _per(sum(w.mean_running * w.busy_s for w in served.windows), busy_s),
        "iterations": int(served.total("iterations")),
    }


def _tenant(served: Served, index: int, in_slo: int) -> dict[str, Any]:
    tenant, own = served.workload.tenants[index], served.workload.tenant == index
    requests = int(own.sum())
    return {
        "requests": requests,
        "completed": int((served.outcomes.status[own] == "completed").sum()),
        "in_slo": in_slo,
        "attainment": _per(in_slo, requests),
        "ttft_slo_s": tenant.ttft_slo_s,
        "tpot_slo_s": tenant.tpot_slo_s,
        "ttft_s": statistics(served.outcomes.ttft_s[own]),
        "tpot_s": statistics(served.outcomes.tpot_s[own]),
    }


def _per(amount: float, whole: float) -> float | None:
    return amount / whole if whole > 0 else None


def rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """A summary in words: labels, which depend on the tenants alone, and values."""
    cell, requests, occupancy = summary["cell"], summary["requests"], summary["kv_occupancy"]
    extras = _extras(cell)
    reasons = {"failed": "given up or never fitted", "cancelled": "longer than the KV cache"}
    lost = [f"{requests[name]:,} {name} ({why})" for name, why in reasons.items() if requests[name]]
    return [
        ("engines", f"{cell['engines']} x {summary['profile']}, {cell['quantization_tier']}"),
        ("batch", f"{cell['max_num_seqs']} sequences, {cell['max_num_batched_tokens']:,} tokens"),
        ("KV cache", f"{cell['kv_tokens']:,} tokens"),
        *([("settings", extras)] if extras else []),
        ("requests", ", ".join([f"{requests['completed']:,} of {requests['total']:,} completed", *lost])),
        ("duration", f"{summary['duration_s']:,.1f} s"),
        (f"TTFT {'/'.join(STATISTICS)}", _latencies(summary["ttft_s"], 1, 3, "s")),
        (f"TPOT {'/'.join(STATISTICS)}", _latencies(summary["tpot_s"], 1e3, 1, "ms")),
        (f"E2E {'/'.join(STATISTICS)}", _latencies(summary["e2e_s"], 1, 2, "s")),
        *(
            (
                f"in SLO: {name} ({tenant['ttft_slo_s']:g} s, {1e3 * tenant['tpot_slo_s']:g} ms)",
                f"{percent(tenant['attainment'])} of {tenant['requests']:,}",
            )
            for name, tenant in summary["tenants"].items()
        ),
        (
            "throughput",
            f"{number(summary['requests_per_s'], 2)} requests/s, "
            f"{number(summary['output_tokens_per_s'], 0)} output tokens/s",
        ),
        ("goodput", f"{number(summary['goodput_per_s'], 2)} requests/s in SLO"),
        (
            "KV occupancy",
            f"mean {percent(occupancy['mean'])}, peak {percent(occupancy['peak'])}",
        ),
        ("preemptions", f"{summary['preemptions']:,}"),
        ("prefix cache", f"{percent(summary['prefix_cache']['hit_share'])} of prefill tokens hit"),
        *(
            [("speculation", f"{percent(summary['speculation']['accepted_share'])} of draft tokens accepted")]
            if summary["speculation"]["drafted_tokens"]
            else []
        ),
        (
            "busy",
            f"{percent(summary['busy_share'])} of the time, {number(summary['mean_running'], 1)} running"
            + (" on each" if cell["engines"] > 1 else ""),
        ),
    ]


def _extras(cell: dict[str, Any]) -> str:
    """The settings that are not as they come."""
    fraction, depth = cell["kv_budget_fraction"], cell["speculation_depth"]
    words = {
        f"{fraction:.0%} of the KV cache for running requests": fraction < 1,
        f"speculation depth {depth}": depth > 0,
        "prefill and decode split": cell["prefill_decode_split"],
        "priority routing": cell["priority_routing"],
        "no prefix cache": not cell["prefix_cache"],
    }
    return ", ".join(text for text, said in words.items() if said)


def _latencies(found: dict[str, float | None], factor: float, digits: int, unit: str) -> str:
    values = [found[name] for name in STATISTICS]
    return " / ".join(number(None if v is None else factor * v, digits) for v in values) + f" {unit}"
