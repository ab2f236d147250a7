"""What load generators saved of a run, as the traffic that they sent.

Sources: https://github.com/vllm-project/vllm, vllm/benchmarks/serve.py (`--save-result --save-detailed`);
https://github.com/ai-dynamo/aiperf (`profile_export.jsonl`);
https://github.com/vllm-project/guidellm (its reports).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from llmserve_env.workloads.loaders.parsed import Parsed
from llmserve_env.workloads.loaders.records import Records
from llmserve_env.workloads.loaders.times import seconds

VLLM_FIELDS = ("start_times", "input_lens", "output_lens")

AIPERF_FIELDS = ("metadata.request_start_ns", "metrics.input_sequence_length.value")

GUIDELLM_FIELDS = ("request_start_time", "prompt_tokens", "output_tokens")

GUIDELLM_OLD_FIELDS = ("start_time", "prompt_tokens", "output_tokens")
"""GuideLLM's until 0.3."""

GUIDELLM_TIMED_FIELDS = ("info.timings.request_start", "prompt_tokens", "output_tokens")
"""GuideLLM's, where the computed fields were left out."""

GENAI_PERF_FIELDS = ("timestamp", "request_inputs", "response_timestamps")

CHARACTERS_A_TOKEN = 4.0
"""Of English text; OpenAI, "What are tokens and how to count them?"."""


def parse_vllm(records: Records) -> Parsed:
    """Start times on the client's clock (s), two lists of lengths, errors by request."""
    errors = records.values("errors")
    output_tokens = records.tokens("output_lens", at_least=0)
    failed = np.array([bool(error) for error in errors], bool) | (output_tokens == 0)
    start_s = seconds(records, "start_times")
    records.mark(
        (start_s == 0) & ~failed & (not records.absolute),
        "expected the time at which it was sent, found 0: some of the benchmark's backends note none. As "
        "lengths=FILE of a generator it can be used",
        "start_times",
    )
    return Parsed(
        arrival_s=start_s,
        prompt_tokens=records.tokens("input_lens"),
        output_tokens=output_tokens,
        failed=failed,
        starts_at_first=True,
    )


def parse_aiperf(records: Records) -> Parsed:
    """Start in ns; requests of the warm-up, failed and cancelled ones are left out."""
    phases, cancelled = records.values("metadata.benchmark_phase"), records.values("metadata.was_cancelled")
    errors, outputs = records.values("error"), records.values("metrics.output_sequence_length.value")
    left_out = np.array(
        [
            phase == "warmup" or stopped is True or error is not None or output is None
            for phase, stopped, error, output in zip(phases, cancelled, errors, outputs, strict=True)
        ],
        bool,
    )
    kept = replace(
        records,
        values=lambda name: [
            1 if out else value for out, value in zip(left_out, records.values(name), strict=True)
        ],
    )
    return Parsed(
        arrival_s=seconds(records, "metadata.request_start_ns", "ns"),
        prompt_tokens=kept.tokens("metrics.input_sequence_length.value"),
        output_tokens=kept.tokens("metrics.output_sequence_length.value"),
        failed=left_out,
        starts_at_first=True,
    )


def parser_guidellm(start: str, *, sure: bool = True) -> Callable[[Records], Parsed]:
    """A parser for GuideLLM's successful requests: start (Unix time, s), two lengths."""

    def parse(records: Records) -> Parsed:
        return Parsed(
            arrival_s=seconds(records, start, sure=sure),
            prompt_tokens=records.tokens("prompt_tokens"),
            output_tokens=records.tokens("output_tokens"),
            starts_at_first=True,
        )

    return parse


def parse_genai_perf(records: Records) -> Parsed:
    """Start (ns), the payload's text as the prompt, a token for each piece of the answer: an estimate."""
    records.guesses.append(
        f"prompt tokens are taken as characters of the payload / {CHARACTERS_A_TOKEN:g}, output tokens as "
        "pieces of the answer"
    )
    texts = [_text_of(inputs) for inputs in records.values("request_inputs")]
    pieces = [len(times) if isinstance(times, list) else 0 for times in records.values("response_timestamps")]
    return Parsed(
        arrival_s=seconds(records, "timestamp", "ns"),
        prompt_tokens=np.array([estimated_tokens(text) for text in texts], np.int64),
        output_tokens=np.maximum(pieces, 1).astype(np.int64),
        failed=np.array(pieces) == 0,
        starts_at_first=True,
    )


def estimated_tokens(text: str) -> int:
    """Tokens that a text may have, at least 1."""
    return max(1, round(len(text) / CHARACTERS_A_TOKEN))


def _text_of(inputs: Any) -> str:
    """The prompt in a request's inputs: OpenAI's payload as text, or whatever is there."""
    payload = inputs.get("payload", "") if isinstance(inputs, dict) else ""
    try:
        body = json.loads(payload) if isinstance(payload, str) else payload
    except (ValueError, RecursionError):
        return str(payload)
    if not isinstance(body, dict):
        return str(payload)
    messages = body.get("messages")
    if isinstance(messages, list):
        return " ".join(_content_of(each) for each in messages if isinstance(each, dict))
    return str(body.get("prompt", payload))


def _content_of(message: dict[str, Any]) -> str:
    """A message's text: the content itself, or the texts of its parts."""
    content = message.get("content", "")
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content)
