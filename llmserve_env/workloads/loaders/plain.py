"""Plain tables: the project's own CSV, and two of the same content under other names."""

from __future__ import annotations

from collections.abc import Callable

from llmserve_env.workloads.loaders.parsed import Parsed
from llmserve_env.workloads.loaders.records import Records

FIELDS = ("arrival_s", "prompt_tokens", "output_tokens")

SHORT_FIELDS = ("arrival_s", "prompt", "output")

VIDUR_FIELDS = ("arrived_at", "request_num_prefill_tokens", "request_num_decode_tokens")
"""Vidur's trace files (https://github.com/microsoft/vidur)."""


def parser(arrival: str, prompt: str, output: str) -> Callable[[Records], Parsed]:
    """A parser for seconds and two lengths in the named columns, with optional `tenant` and `request_id`."""

    def parse(records: Records) -> Parsed:
        return Parsed(
            arrival_s=records.numbers(arrival, "seconds >= 0"),
            prompt_tokens=records.tokens(prompt),
            output_tokens=records.tokens(output),
            tenants=records.texts("tenant") if "tenant" in records.names else None,
            request_ids=records.texts("request_id") if "request_id" in records.names else None,
        )

    return parse
