"""Requests of real clients, generated from ServeGen's published client windows.

Source: https://github.com/alibaba/ServeGen, data/**/chunk-*-trace.csv, joined into one table; Xiang et al.,
"ServeGen", arXiv 2505.09999.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmserve_env.errors import InputError
from llmserve_env.workloads.generators.generator import Generator
from llmserve_env.workloads.generators.windows import WINDOW_S, fill_window
from llmserve_env.workloads.lengths import LengthLaw
from llmserve_env.workloads.lengths.law import TokenPairs, streams
from llmserve_env.workloads.lengths.quantiles import QuantileCurve
from llmserve_env.workloads.loaders.formats import SERVEGEN_FIELDS
from llmserve_env.workloads.loaders.records import MAX_TOKENS, Records
from llmserve_env.workloads.loaders.rows import read_records
from llmserve_env.workloads.loaders.times import LATE_S
from llmserve_env.workloads.parameters import parameter
from llmserve_env.workloads.workload import Workload

LAWS = ("Gamma", "Weibull")
_QUANTILE_FIELDS = ("model", "client", "field", "p10", "p50", "p90", "p99", "max")
_PROBABILITY = np.array([0.10, 0.50, 0.90, 0.99, 0.9999])  # the maximum is that of some 10^4 requests


@dataclass(frozen=True)
class ServeGenClients(Generator):
    """Each client's windows as measured: its rate, and Gamma or Weibull gaps of its fitted shape.

    Attributes:
        path: table `client,window_start_s,rate_rps,cv,pattern,shape,scale`, gzip'ed or not.
        skip_bad_rows: skip rows that cannot be read.
    """

    path: str = ""
    skip_bad_rows: bool = False
    start_s: float = parameter("start", 0.0, "time in the table at which the workload starts (s)", at_least=0)
    rate_factor: float = parameter("scale", 1.0, "factor on all clients' rates", above=0)
    quantiles: str | None = parameter(
        "quantiles", None, "table of the clients' length quantiles; without it `lengths` holds for all"
    )
    model: str | None = parameter("model", None, "model in that table, such as language/m-large")

    @property
    def mean_rate_rps(self) -> float:
        """Requests per second from `start` to the table's end."""
        return float(self.windows.rate_rps.sum() * WINDOW_S / self.longest_s)

    @property
    def longest_s(self) -> float:
        """Time from `start` to the table's end (s)."""
        return float(self.windows.start_s.max() + WINDOW_S)

    @cached_property
    def windows(self) -> ClientWindows:
        """The table from `start` on.

        Raises:
            InputError: it cannot be read, or ends before `start`.
        """
        windows = _windows(self.path, _changed(self.path), self.skip_bad_rows)
        after = windows.start_s + WINDOW_S > self.start_s
        if not after.any():
            raise InputError(f"the table ends at {windows.start_s.max() + WINDOW_S:g} s", field="start")
        return ClientWindows(
            client=windows.client[after],
            start_s=windows.start_s[after] - self.start_s,
            rate_rps=windows.rate_rps[after] * self.rate_factor,
            weibull=windows.weibull[after],
            shape=windows.shape[after],
        )

    def sample(self, seed: int, duration_s: float, lengths: LengthLaw) -> Workload:
        """The requests that arrive in 0..duration_s; windows that the table does not have are silent."""
        table = self.windows
        if duration_s > self.longest_s:
            raise InputError(f"expected at most {self.longest_s:g} s, the table's end", field="duration")
        starts = np.unique(table.start_s[table.start_s < duration_s])
        times, clients = [np.zeros(0)], [np.zeros(0, np.int64)]
        for start_s, rng in zip(starts, streams(np.random.SeedSequence(seed), len(starts)), strict=True):
            rows = np.flatnonzero(table.start_s == start_s)
            time, row = fill_window(
                rng, float(start_s), table.rate_rps[rows], table.shape[rows], table.weibull[rows]
            )
            times.append(time)
            clients.append(table.client[rows[row]])
        arrival_s, client = np.concatenate(times), np.concatenate(clients)
        if (np.diff(arrival_s) < 0).any():  # clients' windows need not begin at the same times
            order = np.argsort(arrival_s, kind="stable")
            arrival_s, client = arrival_s[order], client[order]
        inside = (arrival_s >= 0) & (arrival_s < duration_s)
        length_seed = np.random.SeedSequence(seed, spawn_key=(2**31,))
        if self.quantiles is None:
            pairs = lengths.sample(length_seed, len(arrival_s))
        else:
            laws = _client_lengths(self.quantiles, _changed(self.quantiles), self.model)
            pairs = laws.sample(length_seed, client)
        prompt_tokens, output_tokens = (tokens[inside].astype(np.int32) for tokens in pairs)
        return Workload(
            arrival_s[inside], prompt_tokens, output_tokens, np.zeros(int(inside.sum()), np.int16)
        )


@dataclass(frozen=True)
class ClientWindows:
    """Rows of a client table.

    Attributes:
        client: int64[n].
        start_s: float64[n], of the window (s).
        rate_rps: float64[n].
        weibull: bool[n], Weibull gaps, otherwise Gamma.
        shape: float64[n], of the gaps' law.
    """

    client: NDArray[np.int64]
    start_s: NDArray[np.float64]
    rate_rps: NDArray[np.float64]
    weibull: NDArray[np.bool_]
    shape: NDArray[np.float64]


def read_windows(path: str, skip_bad_rows: bool = False) -> ClientWindows:
    """Read a client table. The published scales are not used: the rate sets the scale.

    Windows on a clock of their own, as in Unix times, count from the first one.

    Raises:
        InputError: names file, line and field.
    """
    records = _read_with(path, SERVEGEN_FIELDS)
    client = records.whole("client", "a client number >= 0")
    start_s = records.numbers("window_start_s", "seconds >= 0")
    if len(start_s) and start_s[~records.bad].min(initial=np.inf) >= LATE_S:
        start_s = np.maximum(start_s - start_s[~records.bad].min(), 0.0)
    rate_rps = records.numbers("rate_rps", "requests/s >= 0")
    shape = records.numbers("shape", "a number > 0")
    records.mark(shape == 0, "expected a number > 0", "shape")
    law = np.array(records.texts("pattern"), dtype=object)
    records.mark(
        ~np.isin(law, LAWS), lambda row: f"expected {' or '.join(LAWS)}, found {law[row]!r}", "pattern"
    )
    keep = records.usable(skip_bad_rows)
    if not keep.any():
        raise InputError("holds no usable row", file=path)
    return ClientWindows(client[keep], start_s[keep], rate_rps[keep], (law == "Weibull")[keep], shape[keep])


def table_end_s(path: str) -> float:
    """Time at which a client table ends (s).

    Raises:
        InputError: as `read_windows`.
    """
    return float(_windows(path, _changed(path), False).start_s.max() + WINDOW_S)


@dataclass(frozen=True)
class ClientLengths:
    """Length laws of clients.

    Attributes:
        clients: int64[laws], ascending; a client without a law takes one of them by its number.
        prompt: laws of the prompt length.
        output: laws of the output length.
    """

    clients: NDArray[np.int64]
    prompt: QuantileCurve
    output: QuantileCurve

    def sample(self, seed: np.random.SeedSequence, client: NDArray[np.int64]) -> TokenPairs:
        """Draw a pair for each request of int64[n] clients."""
        law = np.minimum(np.searchsorted(self.clients, client), len(self.clients) - 1)
        law = np.where(self.clients[law] == client, law, client % len(self.clients))
        prompt_rng, output_rng = streams(seed, 2)
        return (
            self.prompt.at(prompt_rng.standard_normal(len(client)), law),
            self.output.at(output_rng.standard_normal(len(client)), law),
        )


def read_client_lengths(path: str, model: str | None) -> ClientLengths:
    """Read `model,client,rate,field,mean,p10,p50,p90,p99,max` with fields `input_tokens` and `output_tokens`.

    Args:
        path: the table.
        model: which of its models; may be None if it has one.

    Raises:
        InputError: names file, line and field, or the models to choose from.
    """
    records = _read_with(path, _QUANTILE_FIELDS)
    models = np.array(records.texts("model"), dtype=object)
    fields = np.array(records.texts("field"), dtype=object)
    client = records.whole("client", "a client number >= 0")
    tokens = np.stack([records.numbers(name, "tokens >= 0") for name in _QUANTILE_FIELDS[3:]], axis=1)
    records.mark(np.diff(tokens, axis=1).min(axis=1) < 0, "expected quantiles in ascending order", "p10")
    records.mark(tokens[:, -1] > MAX_TOKENS, f"expected at most {MAX_TOKENS} tokens", "max")
    records.usable(skip_bad_rows=False)
    known = sorted(set(models[np.isin(fields, ("input_tokens", "output_tokens"))]))
    if model is None and len(known) == 1:
        model = known[0]
    if model not in known:
        found = "" if model is None else f", found {model!r}"
        raise InputError(f"expected one of {', '.join(known)}{found}", field="model")
    laws = []
    for name in ("input_tokens", "output_tokens"):
        rows = np.flatnonzero((models == model) & (fields == name))
        rows = rows[np.argsort(client[rows], kind="stable")]
        laws.append((client[rows], QuantileCurve(_PROBABILITY, np.maximum(tokens[rows], 1.0))))
    (clients, prompt), (others, output) = laws
    if not np.array_equal(clients, others) or len(clients) == 0:
        raise InputError(f"expected input_tokens and output_tokens for each client of {model}", file=path)
    return ClientLengths(clients, prompt, output)


@lru_cache(maxsize=4)
def _windows(path: str, changed_ns: int, skip_bad_rows: bool) -> ClientWindows:
    """The table, read once as long as its file (and with it `changed_ns`) stays the same."""
    return read_windows(path, skip_bad_rows)


@lru_cache(maxsize=4)
def _client_lengths(path: str, changed_ns: int, model: str | None) -> ClientLengths:
    """As `_windows`, for the table of lengths."""
    return read_client_lengths(path, model)


def _changed(path: str) -> int:
    """When a file was changed (ns); 0 of what is no file, which the reader refuses."""
    return Path(path).stat().st_mtime_ns if Path(path).is_file() else 0


def _read_with(path: str, fields: tuple[str, ...]) -> Records:
    records = read_records(path)
    missing = [name for name in fields if name not in records.names]
    if missing:
        raise InputError(f"expected the columns {','.join(fields)}; {', '.join(missing)} missing", file=path)
    return records
