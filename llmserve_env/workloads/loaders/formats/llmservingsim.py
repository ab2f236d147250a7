"""LLMServingSim workloads: its TSV files (2024) and its flat JSON Lines (2025 on).

Source: https://github.com/casys-kaist/LLMServingSim, dataset/ and workloads/README.md.
"""

from __future__ import annotations

import numpy as np

from llmserve_env.workloads.loaders.parsed import Parsed
from llmserve_env.workloads.loaders.prefixes import token_blocks
from llmserve_env.workloads.loaders.records import Records
from llmserve_env.workloads.loaders.times import seconds

FIELDS = ("input_toks", "output_toks", "arrival_time_ns")

SESSION_FIELDS = ("session_id", "sub_requests")


def parse(records: Records) -> Parsed:
    """Nanoseconds since the start, two lengths, and token ids where the file has them."""
    _refuse_sessions(records)
    prompt_tokens = records.tokens("input_toks")
    return Parsed(
        arrival_s=seconds(records, "arrival_time_ns", "ns"),
        prompt_tokens=prompt_tokens,
        output_tokens=records.tokens("output_toks"),
        prefixes=token_blocks(records, "input_tok_ids", prompt_tokens),
    )


def parse_sessions(records: Records) -> Parsed:
    """Refuse a file of agentic sessions."""
    _refuse_sessions(records)
    records.mark(
        np.ones(len(records), bool), "a session without calls: expected flat requests", "sub_requests"
    )
    nothing = np.zeros(len(records), np.int64)
    return Parsed(arrival_s=nothing.astype(np.float64), prompt_tokens=nothing, output_tokens=nothing)


def _refuse_sessions(records: Records) -> None:
    records.mark(
        np.array([value is not None for value in records.values("sub_requests")], bool),
        "an agentic session: its calls start when earlier ones end, so their arrivals depend on the server; "
        "expected flat requests",
        "sub_requests",
    )
