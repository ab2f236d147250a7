"""What a loader did to a file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoadReport:
    """What became of a file's rows.

    Attributes:
        format: the format that was recognised.
        rows: rows in the file, without header and blank lines.
        requests: requests in the workload.
        failed_requests: rows of requests that failed at the source (BurstGPT: no response token), dropped.
        bad_rows: rows that could not be read and were skipped as asked.
        faults: the first faults of the skipped rows.
        notes: what else was changed or assumed.
        guesses: what was guessed of units and blocks, and how to overrule it.
    """

    format: str
    rows: int
    requests: int
    failed_requests: int = 0
    bad_rows: int = 0
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    guesses: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.format}: {self.requests:,} requests from {self.rows:,} rows"]
        if self.failed_requests:
            parts.append(f"{self.failed_requests:,} failed requests dropped")
        if self.bad_rows:
            parts.append(f"{self.bad_rows:,} bad rows skipped")
        return "\n  ".join(["; ".join(parts), *self.faults, *self.notes, *self.guesses])
