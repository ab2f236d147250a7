"""A task in tables: everything that its file says and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, isinf
from pathlib import Path
from typing import Any

import numpy as np

from llmserve_env.files import read_toml
from llmserve_env.hardware.constants import constants
from llmserve_env.hardware.memory import kv_blocks
from llmserve_env.hardware.profile import TIERS
from llmserve_env.tasks.seeds import TRAINING_SEEDS
from llmserve_env.tasks.task import Task
from llmserve_env.workloads.lengths import DEFAULT_LENGTHS
from llmserve_env.workloads.presets import preset, presets
from llmserve_env.workloads.scenario import Regime
from llmserve_env.workloads.uri import parse_uri
from llmserve_env.workloads.workload import Tenant

_SEEDS = TRAINING_SEEDS[:8]  # enough for two digits
_EARNED = {
    "goodput": "meeting the SLO",
    "latency": "times the headroom under the SLO",
    "memory": "times the KV headroom of the cell",
    "cost": "times the share of GPU time left idle",
    "quality": "times the quality of the weights' precision, see there",
}


@dataclass(frozen=True)
class Table:
    """One side of a task.

    Attributes:
        title: a word or two.
        header: a name for each column; empty ones for pairs of a label and a value.
        rows: texts, as many in each as in the header.
        left: how many columns, from the first, are words rather than numbers.
        note: a sentence on how to read it.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    note: str = ""


def overview(tasks: Sequence[Task]) -> Table:
    """Tasks, a line each."""
    rows = [
        [
            task.id,
            task.difficulty,
            f"{task.cell.engines} x {task.profile.name}",
            task.title,
            f"{task.window_s:g}",
            f"{task.horizon_s:,g}",
            _about(_traffic(task)[:, 0].sum()),
        ]
        for task in tasks
    ]
    header = ("task", "difficulty", "cell", "title", "window (s)", "episode (s)", "requests")
    return Table("Tasks", header, rows, left=4, note=f"requests: of an episode, mean of {_of_seeds()}")


def describe_task(task: Task) -> list[Table]:
    """Everything about a task, side by side."""
    traffic = _traffic(task)
    tables = [_episode(task, traffic), _cell(task), _precisions(task), _tenants(task)]
    tables.append(_requests(task, traffic))
    if task.scenario is not None:
        tables.append(_regimes(task, traffic))
    return [*tables, _controls(task), _reward(task)]


def _traffic(task: Task) -> np.ndarray[Any, np.dtype[np.float64]]:
    """float64[tenant, 3], requests of an episode, mean prompt and mean output (tokens), over some seeds."""
    sums = np.zeros((3, len(task.tenants)))
    for seed in _SEEDS:
        requests = task.requests(seed)
        for row, weights in zip(sums, (None, requests.prompt_tokens, requests.output_tokens), strict=True):
            row += np.bincount(requests.tenant, weights, len(task.tenants))
    count, prompt, output = sums
    some = np.maximum(count, 1)
    return np.stack([count / len(_SEEDS), prompt / some, output / some], axis=1)


def _episode(task: Task, traffic: np.ndarray[Any, Any]) -> Table:
    end = f"{task.horizon_s:,g} s, {task.windows} windows"
    if task.max_in_flight is not None:
        end += f", or more than {task.max_in_flight:,} requests in flight at a window's end"
    counts = " x ".join(map(str, task.grid.nvec))
    rows = [
        ("task", task.title),
        ("difficulty", task.difficulty),
        ("window", f"{task.window_s:g} s between two actions"),
        ("ends after", end),
        ("requests", f"about {_about(traffic[:, 0].sum())} (mean of {_of_seeds()})"),
        ("configurations", f"{counts} = {task.grid.size:,}"),
    ]
    return Table("Episode", ("", ""), rows, left=2)


def _cell(task: Task) -> Table:
    cell, profile = task.cell, task.profile
    prefill = cell.engines // 2 if cell.prefill_engines is None else cell.prefill_engines
    split = f"{prefill} prefill, {cell.engines - prefill} decode" if cell.engines > 1 else "not possible"
    budget = cell.max_num_batched_tokens or profile.engine.max_num_batched_tokens
    gpus = f"{profile.gpu.count} x {profile.gpu.name}" if profile.gpu.count > 1 else profile.gpu.name
    rows = [
        ("engines", f"{cell.engines}{' behind one router' if cell.engines > 1 else ''}"),
        ("profile of each", profile.name),
        ("GPU of each", gpus),
        ("model", profile.model.name),
        ("when split", split),
        ("token budget", f"{budget:,} an iteration"),
        ("prefix cache", "on" if cell.prefix_cache else "off"),
    ]
    return Table("Cell", ("", ""), rows, left=2)


def _precisions(task: Task) -> Table:
    profile, switching = task.profile, constants().switching
    rows = []
    for name, earned in zip(TIERS, task.quality, strict=True):
        tier = profile.tier(name)
        if tier is not None:
            rows.append(
                [
                    name,
                    f"{tier.weight_bytes / 1e9:.1f}",
                    f"{kv_blocks(profile, name) * profile.engine.block_tokens:,}",
                    f"{switching.duration_s(tier.weight_bytes):.1f}",
                    f"{tier.quality:g}",
                    f"{task.reward.quality * earned:.3g}",
                ]
            )
    header = (
        "precision",
        "weights (GB)",
        "KV cache of an engine (tokens)",
        "away for the change (s)",
        "quality",
        f"earns, of {task.reward.quality:g}",
    )
    note = (
        f"Engines change one after the other, after they have served what runs; a change between joint and "
        f"split keeps an engine away for {switching.restart_s:g} s. Quality is relative to bf16; what is "
        f"at or below {task.reward.acceptable_quality:g} earns nothing for it."
    )
    return Table("Precision", header, rows, note=note)


def _tenants(task: Task) -> Table:
    declared = _declared(task)
    limits = any(isfinite(tenant.deadline_s) or tenant.retries for tenant in task.tenants)
    rows = [
        [
            tenant.name,
            _slo_name(declared.get(tenant.name, {})),
            tenant.speculation_class,
            f"{tenant.ttft_slo_s:g}",
            f"{1e3 * tenant.tpot_slo_s:g}",
            f"{tenant.weight:g}",
            "no limit" if isinf(tenant.patience_s) else f"{tenant.patience_s:g}",
            *(_limits(tenant) if limits else ()),
            str(tenant.priority),
        ]
        for tenant in task.tenants
    ]
    more = ("deadline (s)", "retries", "after (s)") if limits else ()
    header = ("tenant", "SLO", "drafts", "TTFT (s)", "TPOT (ms)", "weight", "patience (s)", *more, "priority")
    note = (
        "An SLO with a name is a published one. Drafts: the class whose acceptance its answers have. A "
        "client gives up when its first token has not come within its patience. Priority: lower goes first, "
        "where priority routing is on."
    )
    if limits:
        note += (
            " It gives up, too, when its last token has not come within its deadline, and sends the request "
            "again, as it does when that was refused: so often at most, after a wait that doubles every time."
        )
    return Table("Tenants", header, rows, left=3, note=note)


def _limits(tenant: Tenant) -> tuple[str, str, str]:
    """How long a client waits for an answer, how often it asks again, and after how long the first time."""
    again = (str(tenant.retries), f"{tenant.retry_after_s:g}") if tenant.retries else ("–", "–")
    return ("no limit" if isinf(tenant.deadline_s) else f"{tenant.deadline_s:g}", *again)


def _requests(task: Task, traffic: np.ndarray[Any, Any]) -> Table:
    declared = _declared(task)
    rows = [
        [
            tenant.name,
            _sends(declared.get(tenant.name, {})) if task.scenario is not None else "as the workload says",
            *map(_about, row),
        ]
        for tenant, row in zip(task.tenants, traffic, strict=True)
    ]
    header = ("tenant", "sends", "requests", "mean prompt (tokens)", "mean output (tokens)")
    note = f"Of an episode, means of {_of_seeds()} to two digits."
    if isinstance(task.workload, str):
        note = f"The workload is {task.workload}. {note}"
    return Table("Requests", header, rows, left=2, note=note)


def _regimes(task: Task, traffic: np.ndarray[Any, Any]) -> Table:
    assert task.scenario is not None
    rows = []
    for regime in task.scenario.regimes:
        rates = np.array(regime.rates_rps)
        shortest, longest = regime.dwell_s
        rows.append(
            [
                regime.name,
                _spikes(regime),
                f"{shortest:g} to {longest:g}",
                *(f"{rate:g}" if rate else "–" for rate in rates),
                _about(rates @ traffic[:, 1]),
                _about(rates @ traffic[:, 2]),
            ]
        )
    header = ("regime", "spikes", "stay (s)", *(f"{tenant.name} /s" for tenant in task.tenants))
    order = "in a random order" if task.scenario.shuffled else "in this order, from a random one on"
    note = f"The traffic visits all regimes {order}, and again. Rates are requests per second between spikes."
    return Table("Regimes", (*header, "prompt tokens /s", "output tokens /s"), rows, left=2, note=note)


def _controls(task: Task) -> Table:
    start = task.start.model_dump(mode="json")
    rows = []
    for name, values in task.grid.values.items():
        granted = ", ".join(map(str, values)) if len(values) > 1 else "not granted"
        rows.append((name, granted, str(start[name])))
    return Table("Controls", ("control", "values", "starts at"), rows, left=3)


def _reward(task: Task) -> Table:
    rows = [(name, words, f"{getattr(task.reward, name):g}") for name, words in _EARNED.items()]
    return Table("Reward", ("part", "earned by", "share"), rows, left=2)


def _declared(task: Task) -> Mapping[str, Mapping[str, Any]]:
    """The tables that declare the tenants, by name; none where a trace names them."""
    if not isinstance(task.workload, str):
        tenants: Mapping[str, Mapping[str, Any]] = task.workload["tenants"]
        return tenants
    mix = parse_uri(task.workload).query.get("tenants")
    if mix is None:
        return {}
    return read_toml(Path(mix)) if mix.endswith(".toml") else preset("tenants", mix, field="tenants")


def _slo_name(entry: Mapping[str, Any]) -> str:
    """The published SLO that a tenant has as it is, or a dash."""
    published = presets("slos").get(entry.get("slo", ""))
    same = published and all(entry.get(key, published[key]) == published[key] for key in published)
    return str(entry["slo"]) if same else "–"


def _sends(entry: Mapping[str, Any]) -> str:
    lengths = entry.get("lengths", DEFAULT_LENGTHS)
    if "sessions" not in entry:
        return f"{lengths}, Gamma gaps of shape {entry.get('shape', 1.0):g}"
    held = ", ".join(f"{name} {value:g}" for name, value in entry["sessions"].items())
    return f"sessions ({held or 'as sessions://'}), outputs {lengths}"


def _spikes(regime: Regime) -> str:
    if regime.spikes is None:
        return "–"
    return f"x {regime.spikes.factor:g} for {regime.spikes.length_s:g} s every {regime.spikes.every_s:g} s"


def _of_seeds() -> str:
    return f"seeds {_SEEDS[0]} to {_SEEDS[-1]}"


def _about(value: float) -> str:
    """Two digits: what other seeds would confirm."""
    return f"{float(f'{value:.2g}'):,.0f}" if value >= 1 else f"{value:.2g}"
