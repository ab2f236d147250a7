"""Traces in Mooncake's keys: Mooncake's own, Alibaba's Bailian, AIPerf's and Dynamo's.

Sources: https://github.com/kvcache-ai/Mooncake, FAST25-release/traces; Qin et al., "Mooncake", FAST 2025.
https://github.com/alibaba-edu/qwen-bailian-usagetraces-anon. https://github.com/ai-dynamo/aiperf, docs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmserve_env.workloads.loaders.formats.plain import tenants_of
from llmserve_env.workloads.loaders.parsed import Parsed
from llmserve_env.workloads.loaders.prefixes import hashed_blocks
from llmserve_env.workloads.loaders.records import Records
from llmserve_env.workloads.loaders.times import seconds

FIELDS = ("timestamp", "input_length", "output_length")

BAILIAN_FIELDS = (*FIELDS, "chat_id", "parent_chat_id")

BLOCK_TOKENS = 512
BAILIAN_BLOCK_TOKENS = 16

STEPS_S = (3.0, 2.0, 1.0)
"""Steps of coarse times. Mooncake's conversation trace has multiples of 3 s, give or take a few ms."""
_OFF_MS = 10.0


def parse(records: Records) -> Parsed:
    """Milliseconds since the start, two lengths, one hash id for each started block of 512 prompt tokens."""
    _refuse_later_turns(records)
    arrival_s = seconds(records, "timestamp", "ms", sure=False)
    prompt_tokens = records.tokens("input_length")
    return Parsed(
        arrival_s=arrival_s,
        prompt_tokens=prompt_tokens,
        output_tokens=records.tokens("output_length"),
        prefixes=hashed_blocks(records, "hash_ids", BLOCK_TOKENS, prompt_tokens),
        resolution_s=_resolution_s(arrival_s[~records.bad]),
    )


def parse_bailian(records: Records) -> Parsed:
    """Seconds since the start with fractions, blocks of 16 tokens; the kind of request is the tenant."""
    prompt_tokens = records.tokens("input_length")
    return Parsed(
        arrival_s=seconds(records, "timestamp", "s"),
        prompt_tokens=prompt_tokens,
        output_tokens=records.tokens("output_length"),
        tenants=tenants_of(records, "type"),
        prefixes=hashed_blocks(records, "hash_ids", BAILIAN_BLOCK_TOKENS, prompt_tokens),
    )


def _refuse_later_turns(records: Records) -> None:
    """Turns that wait for the answer before them have no time of their own."""
    delays, times = records.values("delay"), records.values("timestamp")
    records.mark(
        np.array(
            [time is None and delay is not None for delay, time in zip(delays, times, strict=True)], bool
        ),
        "a later turn of a session, due some time after the answer before it: when it comes depends on the "
        "server, so an open-loop trace cannot hold it. Expected a timestamp; skipping bad rows keeps the "
        "first turns",
        "timestamp",
    )


def _resolution_s(arrival_s: NDArray[np.float64]) -> float:
    """The step that all times are multiples of (s); 0 where they are finer than seconds."""
    ms = arrival_s * 1e3
    for step_s in STEPS_S:
        step = step_s * 1e3
        if (np.abs(ms - np.round(ms / step) * step) <= _OFF_MS).all():
            return step_s if step_s == STEPS_S[0] or len(np.unique(ms)) < len(ms) else 0.0
    return 0.0
