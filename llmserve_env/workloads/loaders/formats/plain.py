"""Plain tables: the project's own CSV, and others of the same content under other names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from llmserve_env.workloads.loaders.parsed import Parsed
from llmserve_env.workloads.loaders.records import Records
from llmserve_env.workloads.loaders.times import seconds
from llmserve_env.workloads.workload import Tenant

FIELDS = ("arrival_s", "prompt_tokens", "output_tokens")

SHORT_FIELDS = ("arrival_s", "prompt", "output")

VIDUR_FIELDS = ("arrived_at", "request_num_prefill_tokens", "request_num_decode_tokens")
"""The results that Vidur writes (https://github.com/microsoft/vidur)."""

VIDUR_DELAY_FIELDS = (
    "request_inter_arrival_delay",
    "request_num_prefill_tokens",
    "request_num_decode_tokens",
)
"""Its `request_metrics.csv`: the time since the request before, which the first one does not have."""

VIDUR_TRACE_FIELDS = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")
"""Its processed traces, where they have arrivals."""

SPLITWISE_FIELDS = ("arrival_timestamp", "prompt_size", "token_size")
"""splitwise-sim's traces (https://github.com/Mutinifni/splitwise-sim)."""

BENCH_FIELDS = ("timestamp", "input_tokens", "output_tokens")
"""Timed requests as load generators take them."""

AIBRIX_FIELDS = ("timestamp", "requests.Prompt Length", "requests.Output Length")
"""AIBrix's workload files: milliseconds, and all requests of a time in a list
(https://github.com/vllm-project/aibrix, benchmarks/generator)."""

AIBRIX_KEY_FIELDS = ("timestamp", "requests.prompt_length", "requests.output_length")


def tenants_of(records: Records, name: str) -> list[str] | None:
    """A column of tenants, if there is one; who sent a JSON row without one is the default tenant."""
    return records.texts(name, missing=Tenant().name) if name in records.names else None


def request_ids_of(records: Records, name: str) -> list[str] | None:
    """A column of names of requests, if all rows have one."""
    if name not in records.names or None in records.values(name):
        return None
    return records.texts(name)


def parser(
    arrival: str, prompt: str, output: str, unit: str = "s", *, sure: bool = True
) -> Callable[[Records], Parsed]:
    """A parser for times and two lengths in the named columns, with optional `tenant` and `request_id`."""

    def parse(records: Records) -> Parsed:
        return Parsed(
            arrival_s=seconds(records, arrival, unit, sure=sure),
            prompt_tokens=records.tokens(prompt),
            output_tokens=records.tokens(output),
            tenants=tenants_of(records, "tenant"),
            request_ids=request_ids_of(records, "request_id"),
        )

    return parse


def parse_vidur_delays(records: Records) -> Parsed:
    """Gaps (s), added up in the order of the requests' numbers, or else of the rows."""
    gaps = records.values("request_inter_arrival_delay")
    number = records.whole("Request Id", "a number >= 0") if "Request Id" in records.names else None
    order = np.arange(len(records)) if number is None else np.argsort(number, kind="stable")
    if len(order) and gaps[order[0]] in ("", None):
        gaps = [*gaps]
        gaps[order[0]] = "0"
    gap_s = replace(records, values=lambda _: gaps).numbers("request_inter_arrival_delay", "seconds >= 0")
    arrival_s = np.empty(len(records))
    arrival_s[order] = np.cumsum(gap_s[order])
    records.clock = "gaps in s"
    return Parsed(
        arrival_s=arrival_s,
        prompt_tokens=records.tokens("request_num_prefill_tokens"),
        output_tokens=records.tokens("request_num_decode_tokens"),
    )
