"""A run in figures, and the figures in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llmserve_env.commands.shared.report import STATISTICS, number, percent, statistics
from llmserve_env.controls import SPECS

if TYPE_CHECKING:
    from llmserve_env.commands.shared.serving import Served


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
            "max_num_seqs": cell.sequences,
            "max_num_batched_tokens": cell.max_num_batched_tokens,
            "kv_tokens": cell.kv_blocks * cell.profile.engine.block_tokens,
            **action.model_dump(mode="json", exclude={"batch_cap"}),
            "prefix_cache": cell.prefix_cache,
            "max_model_len": cell.context,
        },
        "requests": {
            "total": len(workload),
            **{name: int((status == name).sum()) for name in ("completed", "failed", "cancelled")},
            **_beyond(served),
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


def _beyond(served: Served) -> dict[str, int]:
    """Requests that the model's context is too short for: prompts that fill it, answers that end at it."""
    prompt, longest = served.workload.prompt_tokens.astype(np.int64), served.cell.context
    if longest is None:
        return {"beyond_context": 0, "cut_at_context": 0}
    fills = prompt >= longest
    cut = ~fills & (prompt + served.workload.output_tokens > longest)
    return {"beyond_context": int(fills.sum()), "cut_at_context": int(cut.sum())}


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
    lost = [f"{requests['failed']:,} failed (given up or never fitted)"] if requests["failed"] else []
    beyond, context = requests["beyond_context"], cell["max_model_len"]
    if beyond:
        lost.append(f"{beyond:,} cancelled (prompt beyond the context of {context:,} tokens)")
    if requests["cancelled"] > beyond:
        lost.append(f"{requests['cancelled'] - beyond:,} cancelled (longer than the KV cache)")
    if requests["cut_at_context"]:
        lost.append(f"{requests['cut_at_context']:,} answers end at the context of {context:,} tokens")
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


_IN_ROWS = ("batch_cap", "quantization_tier")
"""Controls that rows of their own tell."""


def _extras(cell: dict[str, Any]) -> str:
    """The settings that are not as they come."""
    words = []
    for name, spec in SPECS.items():
        if name in _IN_ROWS or cell[name] == spec.default:
            continue
        number = "" if spec.options else f" {cell[name]:g} ({spec.declared.unit})"
        words.append(f"{spec.label_in_text}{number}")
    if not cell["prefix_cache"]:
        words.append("no prefix cache")
    return ", ".join(words)


def _latencies(found: dict[str, float | None], factor: float, digits: int, unit: str) -> str:
    values = [found[name] for name in STATISTICS]
    return " / ".join(number(None if v is None else factor * v, digits) for v in values) + f" {unit}"
