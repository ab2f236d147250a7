"""Serving a workload from a command: in windows, with a progress bar, to a row a request."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmserve_env.commands.shared.controls import flag
from llmserve_env.errors import InputError
from llmserve_env.files import open_atomic

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tqdm import tqdm

    from llmserve_env.backend import WindowRecord
    from llmserve_env.hardware import Profile
    from llmserve_env.schema import ServeAction
    from llmserve_env.sim.outcomes import Outcomes
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
        max_num_seqs: running sequences of an engine, where they are more than an action may ask for.
        max_model_len: longest context (tokens); None: the profile's.
    """

    profile: Profile
    action: ServeAction
    max_num_batched_tokens: int
    kv_blocks: int
    engines: int = 1
    prefix_cache: bool = True
    max_num_seqs: int | None = None
    max_model_len: int | None = None

    @property
    def sequences(self) -> int:
        """Running sequences of an engine."""
        return self.action.batch_cap if self.max_num_seqs is None else self.max_num_seqs

    @property
    def context(self) -> int | None:
        """Longest context (tokens); None: no limit is known."""
        return self.max_model_len or self.profile.model.max_model_len


@dataclass(frozen=True)
class Served:
    """A workload that has been served to its end.

    Attributes:
        workload: requests that were asked for.
        cell: cell that served it.
        outcomes: outcome of each request.
        windows: records of what happened, window by window.
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
        cell: cell that serves it.
        windows: number of windows into which the time until the last arrival is divided.
        name: label of the progress bar.

    Raises:
        InputError: the cell cannot do what the action asks for.
    """
    from llmserve_env.sim.simulator import Simulator

    if len(workload) == 0:
        raise InputError("holds no request to serve", file=workload.source or None)
    simulator = Simulator(
        cell.profile,
        workload,
        engines=cell.engines,
        max_num_batched_tokens=cell.max_num_batched_tokens,
        kv_blocks=cell.kv_blocks,
        max_num_seqs=cell.max_num_seqs,
        max_model_len=cell.max_model_len,
        prefix_cache=cell.prefix_cache,
        action=cell.action,
    )
    window_s = max(workload.duration_s / windows, 0.01)
    records: list[WindowRecord] = []
    arrived = over = 0
    with _progress(name, len(workload)) as bar:
        while over < len(workload):
            record = simulator.serve(cell.action, window_s)
            records.append(record)
            for field, reason in record.not_applied.items():
                raise InputError(reason, field=flag(field))
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


def _progress(name: str, requests: int) -> tqdm[None]:
    """A bar on stderr that shows itself after two seconds, on terminals alone."""
    from tqdm import tqdm

    return tqdm(
        total=requests, desc=name, unit=" requests", unit_scale=True, delay=2, leave=False, disable=None
    )


def write_requests(path: Path, served: Served) -> None:
    """Write one row a request, in order of arrival; times to the nanosecond, empty where undefined.

    Raises:
        InputError: the file cannot be written.
    """
    workload, outcomes = served.workload, served.outcomes
    names = [tenant.name for tenant in workload.tenants]
    with open_atomic(path) as file, _progress(f"writing {path.name}", len(workload)) as bar:
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
            bar.update(high - low)


def _seconds(values: NDArray[np.float64]) -> list[str]:
    return ["" if math.isnan(value) else f"{value:.9f}" for value in values.tolist()]
