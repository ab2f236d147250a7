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
        clock: what its times are, such as "times in ms".
        block_tokens: prompt tokens of one of its prefix blocks (0: it has none).
        span_s: from its first request to its last (s).
        failed_requests: rows of requests that failed at the source (BurstGPT: no response token), dropped.
        bad_rows: rows that could not be read and were skipped as asked.
        faults: the first faults of the skipped rows.
        notes: what else was changed or assumed.
        guesses: what was guessed of units and blocks, and how to overrule it.
    """

    format: str
    rows: int
    requests: int
    clock: str = ""
    block_tokens: int = 0
    span_s: float = 0.0
    failed_requests: int = 0
    bad_rows: int = 0
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    guesses: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.format}: {self.requests:,} requests from {self.rows:,} rows"]
        if self.clock:
            rate_rps = (self.requests - 1) / self.span_s if self.span_s > 0 else 0.0
            parts.append(f"{self.clock}; {self.span_s:,.6g} s, {rate_rps:,.3g} requests/s")
        if self.block_tokens:
            parts.append(f"prefix blocks of {self.block_tokens} tokens")
        if self.failed_requests:
            parts.append(f"{self.failed_requests:,} failed requests dropped")
        if self.bad_rows:
            parts.append(f"{self.bad_rows:,} bad rows skipped")
        return "\n  ".join(["; ".join(parts), *self.faults, *self.notes, *self.guesses])
