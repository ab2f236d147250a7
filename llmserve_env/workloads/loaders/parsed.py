"""What every loader hands on: columns of rows, some of them unusable."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llmserve_env.errors import InputError
from llmserve_env.workloads.loaders.prefixes import Prefixes
from llmserve_env.workloads.loaders.records import Records
from llmserve_env.workloads.loaders.report import LoadReport
from llmserve_env.workloads.workload import LATEST_S, Tenant, Workload

_MAX_TENANTS = 2**15 - 1  # the workload's index is int16


@dataclass(frozen=True)
class Parsed:
    """Columns of n rows in file order.

    Attributes:
        arrival_s: float64[n], seconds, in any order.
        prompt_tokens: int64[n].
        output_tokens: int64[n].
        tenants: n names, or None: one tenant.
        request_ids: n names, or None.
        prefixes: their prefix blocks, or None.
        failed: bool[n], requests that failed at the source, or None.
        starts_at_first: whether times are absolute: the first usable arrival becomes 0.
        resolution_s: step of times so coarse that arrivals are to be spread over it (s; 0: they are not).
    """

    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    tenants: list[str] | None = None
    request_ids: list[str] | None = None
    prefixes: Prefixes | None = None
    failed: NDArray[np.bool_] | None = None
    starts_at_first: bool = False
    resolution_s: float = 0.0


def to_workload(
    parsed: Parsed,
    records: Records,
    report: LoadReport,
    *,
    skip_bad_rows: bool,
    jitter_s: float | None,
    seed: int,
) -> tuple[Workload, LoadReport]:
    """Drop unusable and failed rows, spread and sort the arrivals, and count what was done.

    Args:
        parsed: the columns.
        records: the rows they came from, with their faults.
        report: names the format.
        skip_bad_rows: whether a bad row is skipped and counted, or refuses the file.
        jitter_s: width of the uniform spread added to every arrival (s); None: the times' own resolution,
            where that is coarse. Arrivals that shared a time keep the file's order.
        seed: seed of that spread.
    """
    keep = records.usable(skip_bad_rows)
    failed = np.zeros(len(records), bool) if parsed.failed is None else parsed.failed & keep
    rows = np.flatnonzero(keep & ~failed)
    if len(rows) == 0:
        raise InputError("holds no usable request", file=records.file)
    arrival_s = parsed.arrival_s[rows]
    if parsed.starts_at_first or records.absolute:
        arrival_s = arrival_s - arrival_s.min()
    notes, guesses = list(records.notes), list(records.guesses)
    if records.hints.block_tokens is not None and parsed.prefixes is None:
        notes.append("block_tokens= is of no use: no prompt has blocks")
    told = jitter_s is not None
    jitter_s = parsed.resolution_s if jitter_s is None else jitter_s
    if jitter_s > 0:
        arrival_s = _spread(arrival_s, jitter_s, seed)
        text = f"arrivals spread uniformly over {jitter_s:g} s"
        if told:
            notes.append(f"{text}, seed {seed}")
        else:
            guesses.append(f"{text}, their step: jitter=0 leaves them")
    elif (np.diff(arrival_s) < 0).any():
        notes.append("arrivals were out of order and have been sorted")
    if arrival_s.max() > LATEST_S:
        raise InputError(
            f"the last request arrives at {arrival_s.max():g} s: time_unit=ms|us|ns says another unit",
            file=records.file,
        )
    order = np.argsort(arrival_s, kind="stable")
    tenant, tenants = _tenant_index(parsed.tenants, rows, records.file)
    prefixes = Prefixes(0, [])
    if parsed.prefixes is not None:
        blocks = parsed.prefixes.blocks
        prefixes = replace(parsed.prefixes, blocks=[blocks[row] for row in rows[order]])
    offsets, ids = prefixes.arrays()
    names = parsed.request_ids
    workload = Workload(
        arrival_s=arrival_s[order],
        prompt_tokens=parsed.prompt_tokens[rows[order]].astype(np.int32),
        output_tokens=parsed.output_tokens[rows[order]].astype(np.int32),
        tenant=tenant[order].astype(np.int16),
        tenants=tenants,
        prefix_block_tokens=prefixes.block_tokens,
        prefix_offsets=offsets,
        prefix_ids=ids,
        request_ids=tuple(names[row] for row in rows[order]) if names else (),
        source=records.file,
    )
    return workload, replace(
        report,
        rows=len(records),
        requests=len(rows),
        clock=records.clock,
        block_tokens=prefixes.block_tokens,
        span_s=float(np.ptp(arrival_s)),
        failed_requests=int(failed.sum()),
        bad_rows=int((~keep).sum()),
        faults=tuple(str(fault) for _, fault in records.faults[:5]),
        notes=tuple(notes),
        guesses=tuple(guesses),
    )


def _spread(arrival_s: NDArray[np.float64], jitter_s: float, seed: int) -> NDArray[np.float64]:
    """Arrivals spread uniformly; those that shared a time stay in order."""
    drawn = np.random.default_rng(seed).uniform(0.0, jitter_s, len(arrival_s))
    in_file = np.lexsort((np.arange(len(arrival_s)), arrival_s))
    by_draw = np.lexsort((drawn, arrival_s))
    found = np.empty_like(drawn)
    found[in_file] = drawn[by_draw]
    return arrival_s + found


def _tenant_index(
    names: list[str] | None, rows: NDArray[np.int64], file: str
) -> tuple[NDArray[np.int64], tuple[Tenant, ...]]:
    """int64[k] and the tenants, in the order of their names."""
    if names is None:
        return np.zeros(len(rows), np.int64), (Tenant(),)
    used = [names[row] for row in rows.tolist()]
    known = {name: index for index, name in enumerate(sorted(set(used)))}
    index = np.fromiter(map(known.__getitem__, used), np.int64, len(used))
    if len(known) > _MAX_TENANTS:
        raise InputError(f"{len(known)} tenants, at most {_MAX_TENANTS} are possible", file=file)
    return index, tuple(Tenant(name=name) for name in known)
