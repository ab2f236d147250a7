"""A measured run of vLLM: its requests and its engine's settings, as LLMServingSim's bench records them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmserve_env.errors import InputError
from llmserve_env.workloads.loaders import LoadReport
from llmserve_env.workloads.loaders.formats import measured
from llmserve_env.workloads.loaders.parsed import to_workload
from llmserve_env.workloads.loaders.reading import read_text
from llmserve_env.workloads.loaders.rows import read_records

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmserve_env.workloads import Workload


@dataclass(frozen=True)
class Latencies:
    """A run's requests, in order of arrival (s; nan where undefined).

    Attributes:
        arrival_s: float64[n], when the engine queued them, the first at 0.
        ttft_s: float64[n], from there to the first token.
        tpot_s: float64[n], mean time between output tokens.
        e2e_s: float64[n], from arrival to the last token.
    """

    arrival_s: NDArray[np.float64]
    ttft_s: NDArray[np.float64]
    tpot_s: NDArray[np.float64]
    e2e_s: NDArray[np.float64]

    @property
    def makespan_s(self) -> float:
        """From the first arrival to the last token (s)."""
        ended_s = self.arrival_s + self.e2e_s
        return float(max(ended_s[~np.isnan(ended_s)], default=self.arrival_s[-1]) - self.arrival_s[0])


@dataclass(frozen=True)
class Measured:
    """What a run folder holds.

    Attributes:
        workload: requests of the run, under their own names.
        latencies: latencies by the engine's clock.
        preemptions: preemptions of all requests; None where they were not recorded.
    """

    workload: Workload
    latencies: Latencies
    preemptions: int | None


def read_run(path: Path) -> Measured:
    """Read a run's requests.

    Args:
        path: one JSON object a line with request_id, input_toks, output_toks and, in seconds of the engine's
            clock, queued_ts, first_token_ts and last_token_ts; num_preemptions where it was recorded.

    Raises:
        InputError: names the file, line and field.
    """
    records = read_records(str(path))
    parsed = measured.parse(records)
    queued_s = parsed.arrival_s
    first_s = records.numbers("first_token_ts", "seconds >= 0")
    last_s = records.numbers("last_token_ts", "seconds >= 0")
    records.mark(first_s < queued_s, "expected a time at or after queued_ts", "first_token_ts")
    records.mark(last_s < first_s, "expected a time at or after first_token_ts", "last_token_ts")
    preemptions = (
        records.whole("num_preemptions", "a whole number >= 0")
        if "num_preemptions" in records.names
        else None
    )
    names = parsed.request_ids or []
    _, known = np.unique(names, return_index=True)
    again = np.ones(len(names), bool)
    again[known] = False
    records.mark(again, lambda row: f"expected each name once, found {names[row]!r} again", "request_id")
    report = LoadReport(format="vLLM run JSONL", rows=0, requests=0)
    workload, _ = to_workload(parsed, records, report, skip_bad_rows=False, jitter_s=0.0, seed=0)
    row_of = {name: row for row, name in enumerate(names)}
    rows = np.array([row_of[name] for name in workload.request_ids])
    gaps = workload.output_tokens - 1
    decoding_s = (last_s - first_s)[rows]
    return Measured(
        workload,
        Latencies(
            arrival_s=workload.arrival_s,
            ttft_s=(first_s - queued_s)[rows],
            tpot_s=np.where(gaps > 0, decoding_s / np.maximum(gaps, 1), np.nan),
            e2e_s=(last_s - queued_s)[rows],
        ),
        None if preemptions is None else int(preemptions.sum()),
    )


class Meta:
    """A run's meta.json, read by dotted names.

    What is absent or null is None, and so is everything where there is no such file.

    Args:
        path: path of the file.

    Raises:
        InputError: names the file and the line or field; so do the methods.
    """

    def __init__(self, path: Path) -> None:
        self._file = str(path)
        self._content: Any = {}
        if not path.exists():
            return
        text = read_text(path)
        try:
            self._content = json.loads(text)
        except json.JSONDecodeError as error:
            reason = f"not JSON: {error.msg} at column {error.colno}"
            raise InputError(reason, file=self._file, line=error.lineno) from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"not usable JSON: {error}", file=self._file) from error
        if not isinstance(self._content, dict):
            raise InputError("expected a JSON object", file=self._file)

    def _get(self, name: str) -> Any:
        value, path = self._content, ""
        for key in name.split("."):
            if value is None:
                return None
            if not isinstance(value, dict):
                raise InputError(f"expected an object, found {value!r}", file=self._file, field=path)
            value, path = value.get(key), f"{path}.{key}".lstrip(".")
        return value

    def _typed(self, name: str, kind: type, expected: str) -> Any:
        value = self._get(name)
        if value is not None and type(value) is not kind:
            raise InputError(f"expected {expected}, found {value!r}", file=self._file, field=name)
        return value

    def count(self, name: str, *, at_least: int = 1) -> int | None:
        """A whole number."""
        expected = f"a whole number >= {at_least}"
        value: int | None = self._typed(name, int, expected)
        if value is not None and value < at_least:
            raise InputError(f"expected {expected}, found {value}", file=self._file, field=name)
        return value

    def text(self, name: str) -> str | None:
        """A text."""
        value: str | None = self._typed(name, str, "a text")
        return value

    def flag(self, name: str) -> bool | None:
        """True or false."""
        value: bool | None = self._typed(name, bool, "true or false")
        return value
