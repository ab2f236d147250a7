"""Mooncake traces.

Source: https://github.com/kvcache-ai/Mooncake, FAST25-release/traces; Qin et al., "Mooncake", FAST 2025.
"""

from __future__ import annotations

from llmserve_env.workloads.loaders.parsed import Parsed
from llmserve_env.workloads.loaders.prefixes import hashed_blocks
from llmserve_env.workloads.loaders.records import Records

FIELDS = ("timestamp", "input_length", "output_length")

BLOCK_TOKENS = 512

JITTER_S = 3.0
"""The published times are multiples of 3 s."""


def parse(records: Records) -> Parsed:
    """Milliseconds since the start, two lengths, one hash id for each started block of 512 prompt tokens."""
    prompt_tokens = records.tokens("input_length")
    return Parsed(
        arrival_s=records.numbers("timestamp", "milliseconds >= 0") / 1e3,
        prompt_tokens=prompt_tokens,
        output_tokens=records.tokens("output_length"),
        prefixes=hashed_blocks(records, "hash_ids", BLOCK_TOKENS, prompt_tokens),
    )
