"""Trace files of the public formats, recognised by their content."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path

import numpy as np

from llmserve_env.errors import InputError
from llmserve_env.workloads.lengths.empirical import EmpiricalLengths
from llmserve_env.workloads.loaders import columns
from llmserve_env.workloads.loaders.formats import (
    FORMATS,
    LENGTH_FIELDS,
    WITH_FAILED,
    Format,
    recognise,
    sharegpt,
)
from llmserve_env.workloads.loaders.hints import Hints
from llmserve_env.workloads.loaders.parsed import to_workload
from llmserve_env.workloads.loaders.report import LoadReport
from llmserve_env.workloads.loaders.rows import read_records
from llmserve_env.workloads.workload import Workload

_TIMES = {"arrival_s", "arrived_at", "start_times", "request_start_time"}

__all__ = ["FORMATS", "Format", "Hints", "LoadReport", "load", "load_lengths"]


def load(
    path: Path | str,
    *,
    skip_bad_rows: bool = False,
    jitter_s: float | None = None,
    seed: int = 0,
    hints: Hints = Hints(),  # noqa: B008 - immutable
) -> tuple[Workload, LoadReport]:
    """Read a trace file: CSV, TSV, JSON Lines, a JSON array or document, packed or not.

    What is guessed of its units is told on stderr, once for each file, unless `hints` say it.

    Args:
        path: the file; its format is recognised by its columns or keys, see `FORMATS`.
        skip_bad_rows: skip and count rows that cannot be read; otherwise the first one refuses the file.
        jitter_s: spread each arrival uniformly over this time (s); None: over the step of the file's times,
            where that is a second or more (Mooncake's: 3 s).
        seed: seed of the spread.
        hints: units, blocks and columns, where the file does not say them.

    Returns:
        The requests in order of arrival, and what became of the rows.

    Raises:
        InputError: names the file, line and field, and what was expected.
    """
    if jitter_s is not None and not (np.isfinite(jitter_s) and jitter_s >= 0):
        raise InputError(f"expected seconds >= 0, found {jitter_s}", field="jitter")
    records = read_records(str(path), hints)
    known = Format("named columns", (), columns.parse) if hints.columns else recognise(records)
    workload, report = to_workload(
        known.parse(records),
        records,
        LoadReport(format=known.name, rows=0, requests=0),
        skip_bad_rows=skip_bad_rows,
        jitter_s=jitter_s,
        seed=seed,
    )
    for guess in report.guesses:
        _tell(f"{path}: {guess}")
    return workload, report


@lru_cache(maxsize=1024)
def _tell(text: str) -> None:
    """Say it on stderr, once."""
    print(text, file=sys.stderr)


def load_lengths(path: Path | str, *, skip_bad_rows: bool = False) -> EmpiricalLengths:
    """Read the pairs of lengths in a trace or in a table without arrival times.

    Raises:
        InputError: as `load`.
    """
    records = read_records(str(path))
    if sharegpt.FIELD in records.names:
        found = sharegpt.lengths(records)
        for guess in records.guesses:
            _tell(f"{path}: {guess}")
        return found
    for prompt, output in LENGTH_FIELDS:
        if records.names.issuperset((prompt, output)) and not records.names & _TIMES:
            prompt_tokens = records.tokens(prompt)
            output_tokens = records.tokens(output, at_least=0 if output in WITH_FAILED else 1)
            keep = records.usable(skip_bad_rows) & (output_tokens > 0)
            if not keep.any():
                raise InputError("holds no usable row", file=records.file)
            return EmpiricalLengths(prompt_tokens[keep], output_tokens[keep])
    workload, _ = load(path, skip_bad_rows=skip_bad_rows)
    return EmpiricalLengths(workload.prompt_tokens.astype(np.int64), workload.output_tokens.astype(np.int64))
