"""Real traffic in the place of a task's: at the task's mean load, sent by the task's tenants."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from llmserve_env.files import write_atomic
from llmserve_env.tasks import TRAINING_SEEDS, Task
from llmserve_env.workloads import Tenant, Workload, open_workload
from llmserve_env.workloads.generators.servegen import table_end_s
from llmserve_env.workloads.uri import WorkloadURI

SEEDS = TRAINING_SEEDS[:16]
"""Episodes whose generated traffic says what the task's load and its tenants' lengths are."""

KEPT = 5000
"""Requests of generated traffic that tell tenants apart."""

SAMPLED = 5e-4
"""Share of all requests of a ServeGen table that is drawn to measure it: of two weeks, some 100,000."""


@dataclass(frozen=True)
class Fit:
    """A trace fitted to a task.

    Attributes:
        workload: its URI.
        stretches: of the trace, played at once.
        pace: how many times as fast the trace is played; for ServeGen's clients the factor on their rates.
        tokens_per_s: prompt and output tokens that arrive, of the task as of the trace.
        requests_per_s: that arrive, of the trace as it was fitted.
    """

    workload: str
    stretches: int
    pace: float
    tokens_per_s: float
    requests_per_s: float


def tokens(workload: Workload) -> float:
    """Prompt and output tokens of all requests."""
    return float(workload.prompt_tokens.sum(dtype=np.int64) + workload.output_tokens.sum(dtype=np.int64))


def mean_load(task: Task) -> float:
    """Prompt and output tokens per second that arrive in a task, over `SEEDS`."""
    return sum(tokens(task.requests(seed)) for seed in SEEDS) / (len(SEEDS) * task.horizon_s)


def fit_trace(task: Task, path: Path, mix: Path) -> Fit:
    """A recorded trace at the task's tokens per second.

    As many stretches at once, to the nearest whole number and at least one, as give its load; the rest is
    made up by the pace. So a trace of an hour is not played in twenty minutes.

    Args:
        task: gives the load.
        path: of the trace.
        mix: of the task's tenants, from `write_tenants`.

    Raises:
        InputError: the trace cannot be read.
    """
    trace = open_workload(str(WorkloadURI("trace", str(path), {"jitter": "0"})))
    load = mean_load(task)
    recorded = tokens(trace) / trace.duration_s
    stretches = max(round(load / recorded), 1)
    pace = float(f"{load / recorded / stretches:.4g}")
    query = {"scale": repr(pace), "overlay": str(stretches), "tenants": str(mix), "assign": "lengths"}
    return Fit(
        workload=str(WorkloadURI("trace", str(path), query)),
        stretches=stretches,
        pace=pace,
        tokens_per_s=load,
        requests_per_s=len(trace) / trace.duration_s * pace * stretches,
    )


def fit_servegen(task: Task, path: Path, lengths: Path, model: str, mix: Path) -> Fit:
    """ServeGen's clients at the task's tokens per second, on the mean of the table: one factor on all rates.

    Args:
        task: gives the load.
        path: of the client table.
        lengths: table of the clients' length quantiles.
        model: in it.
        mix: of the task's tenants, from `write_tenants`.

    Raises:
        InputError: a table cannot be read.
    """
    query = {"quantiles": str(lengths), "model": model}
    end_s = table_end_s(str(path))
    drawn = {**query, "scale": repr(SAMPLED), "duration": repr(end_s)}
    sample = open_workload(str(WorkloadURI("servegen", str(path), drawn)), seed=SEEDS[0])
    load = mean_load(task)
    factor = float(f"{load * SAMPLED * end_s / tokens(sample):.4g}")
    query |= {"scale": repr(factor), "tenants": str(mix), "assign": "lengths"}
    return Fit(
        workload=str(WorkloadURI("servegen", str(path), query)),
        stretches=1,
        pace=factor,
        tokens_per_s=load,
        requests_per_s=len(sample) / SAMPLED / end_s * factor,
    )


def write_tenants(task: Task, folder: Path) -> Path:
    """A mix of the task's tenants, with the lengths of the requests that they send in generated traffic.

    Args:
        task: whose traffic is generated.
        folder: of the files, TASK.toml and TASK-TENANT.csv.

    Returns:
        The mix's file.
    """
    drawn = [task.requests(seed) for seed in SEEDS]
    tenant, prompts, outputs = (
        np.concatenate([getattr(each, name) for each in drawn])
        for name in ("tenant", "prompt_tokens", "output_tokens")
    )
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, sender in enumerate(task.tenants):
        rows = np.flatnonzero(tenant == index)
        if not len(rows):
            continue
        kept = rows[np.linspace(0, len(rows) - 1, min(KEPT, len(rows))).astype(np.int64)]
        path = folder / f"{task.id}-{sender.name}.csv"
        pairs = [f"{prompts[row]},{outputs[row]}" for row in kept]
        _write(path, "\n".join(["prompt_tokens,output_tokens", *pairs, ""]))
        lines += [
            f"[{sender.name}]",
            f"share = {len(rows) / len(tenant):.6f}",
            f"lengths = {json.dumps(str(path))}",
        ]
        lines += [f"{name} = {json.dumps(value)}" for name, value in _promises(sender).items()]
    mix = folder / f"{task.id}.toml"
    _write(mix, "\n".join([*lines, ""]))
    return mix


def _promises(tenant: Tenant) -> dict[str, object]:
    """A tenant's fields, without what it does not limit."""
    values = {name: value for name, value in asdict(tenant).items() if name != "name"}
    return {name: value for name, value in values.items() if value != math.inf}


def _write(path: Path, text: str) -> None:
    """Write what is not there yet: a trace is read again when a file that it needs was changed."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomic(path, text)
