"""Plain tables: the project's own CSV, and others of the same content under other names."""

from __future__ import annotations

from collections.abc import Callable

from llmserve_env.workloads.loaders.parsed import Parsed
from llmserve_env.workloads.loaders.records import Records
from llmserve_env.workloads.loaders.times import seconds

FIELDS = ("arrival_s", "prompt_tokens", "output_tokens")

SHORT_FIELDS = ("arrival_s", "prompt", "output")

VIDUR_FIELDS = ("arrived_at", "request_num_prefill_tokens", "request_num_decode_tokens")
"""The results that Vidur writes (https://github.com/microsoft/vidur)."""

VIDUR_TRACE_FIELDS = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")
"""Its processed traces, where they have arrivals."""

SPLITWISE_FIELDS = ("arrival_timestamp", "prompt_size", "token_size")
"""splitwise-sim's traces (https://github.com/Mutinifni/splitwise-sim)."""

BENCH_FIELDS = ("timestamp", "input_tokens", "output_tokens")
"""Timed requests as load generators take them."""

AIBRIX_FIELDS = ("timestamp", "requests.Prompt Length", "requests.Output Length")
"""AIBrix's workload files: milliseconds, and all requests of a time in a list
(https://github.com/vllm-project/aibrix, benchmarks/generator)."""


def parser(
    arrival: str, prompt: str, output: str, unit: str = "s", *, sure: bool = True
) -> Callable[[Records], Parsed]:
    """A parser for times and two lengths in the named columns, with optional `tenant` and `request_id`."""

    def parse(records: Records) -> Parsed:
        return Parsed(
            arrival_s=seconds(records, arrival, unit, sure=sure),
            prompt_tokens=records.tokens(prompt),
            output_tokens=records.tokens(output),
            tenants=records.texts("tenant") if "tenant" in records.names else None,
            request_ids=records.texts("request_id") if "request_id" in records.names else None,
        )

    return parse
