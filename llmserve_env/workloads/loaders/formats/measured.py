"""Per-request records of real vLLM runs (`requests.jsonl` of LLMServingSim's bench).

Source: https://github.com/casys-kaist/LLMServingSim, bench/examples.
"""

from __future__ import annotations

from llmserve_env.workloads.loaders.parsed import Parsed
from llmserve_env.workloads.loaders.records import Records

FIELDS = ("request_id", "input_toks", "output_toks", "queued_ts")


def parse(records: Records) -> Parsed:
    """A request arrives when the engine queued it (engine clock, s); the first one at 0."""
    return Parsed(
        arrival_s=records.numbers("queued_ts", "seconds >= 0"),
        prompt_tokens=records.tokens("input_toks"),
        output_tokens=records.tokens("output_toks"),
        request_ids=records.texts("request_id"),
        starts_at_first=True,
    )
