"""The formats that `load` knows, and how it tells them apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmserve_env.errors import InputError
from llmserve_env.workloads.loaders.columns import shown_names
from llmserve_env.workloads.loaders.formats import (
    azure,
    burstgpt,
    llmservingsim,
    measured,
    mooncake,
    plain,
    results,
    sharegpt,
)
from llmserve_env.workloads.loaders.parsed import Parsed
from llmserve_env.workloads.loaders.records import Records


@dataclass(frozen=True)
class Format:
    """A file format, known by its columns or keys.

    Attributes:
        name: what it is called in messages.
        fields: columns or keys that it must have; others are allowed.
        parse: reads its columns.
    """

    name: str
    fields: tuple[str, ...]
    parse: Callable[[Records], Parsed]


FORMATS = (
    Format("Azure LLM inference CSV", azure.FIELDS, azure.parse),
    Format("BurstGPT CSV", burstgpt.FIELDS, burstgpt.parse),
    Format("Bailian JSONL", mooncake.BAILIAN_FIELDS, mooncake.parse_bailian),
    Format("Mooncake JSONL", mooncake.FIELDS, mooncake.parse),
    Format("vLLM run JSONL", measured.FIELDS, measured.parse),
    Format("LLMServingSim TSV or JSONL", llmservingsim.FIELDS, llmservingsim.parse),
    Format("LLMServingSim sessions JSONL", llmservingsim.SESSION_FIELDS, llmservingsim.parse_sessions),
    Format("plain CSV", plain.FIELDS, plain.parser(*plain.FIELDS)),
    Format("plain CSV, short names", plain.SHORT_FIELDS, plain.parser(*plain.SHORT_FIELDS)),
    Format("Vidur CSV", plain.VIDUR_FIELDS, plain.parser(*plain.VIDUR_FIELDS)),
    Format("Vidur CSV", plain.VIDUR_DELAY_FIELDS, plain.parse_vidur_delays),
    Format("Vidur trace CSV", plain.VIDUR_TRACE_FIELDS, plain.parser(*plain.VIDUR_TRACE_FIELDS)),
    Format("splitwise-sim CSV", plain.SPLITWISE_FIELDS, plain.parser(*plain.SPLITWISE_FIELDS)),
    Format("AIBrix JSONL", plain.AIBRIX_FIELDS, plain.parser(*plain.AIBRIX_FIELDS, unit="ms")),
    Format("AIBrix JSONL", plain.AIBRIX_KEY_FIELDS, plain.parser(*plain.AIBRIX_KEY_FIELDS, unit="ms")),
    Format("vLLM benchmark result", results.VLLM_FIELDS, results.parse_vllm),
    Format("AIPerf records JSONL", results.AIPERF_FIELDS, results.parse_aiperf),
    Format("GuideLLM report", results.GUIDELLM_FIELDS, results.parser_guidellm("request_start_time")),
    Format(
        "GuideLLM report",
        results.GUIDELLM_TIMED_FIELDS,
        results.parser_guidellm("info.timings.request_start"),
    ),
    Format(
        "GuideLLM report",
        results.GUIDELLM_OLD_FIELDS,
        results.parser_guidellm("start_time", sure=False),
    ),
    Format("GenAI-Perf export", results.GENAI_PERF_FIELDS, results.parse_genai_perf),
    Format("timed lengths", plain.BENCH_FIELDS, plain.parser(*plain.BENCH_FIELDS, sure=False)),
)

LENGTH_FIELDS = (
    ("num_prefill_tokens", "num_decode_tokens"),
    ("prompt_tokens", "output_tokens"),
    ("input_lens", "output_lens"),
    ("number_input_tokens", "number_output_tokens"),
    ("input_length", "output_length"),
)
"""Lengths without arrivals: Vidur's processed traces, the plain CSV without its times, detailed results of
`vllm bench serve` (older ones) and of SGLang's benchmark, LLMPerf's responses, ServeGen's offline traces."""

WITH_FAILED = frozenset({"output_lens", "number_output_tokens"})
"""Lengths of answers in results, where a failed request has 0."""

_SUMMARY = ("completed", "total_input_tokens", "total_output_tokens")

SERVEGEN_FIELDS = ("client", "window_start_s", "rate_rps", "cv", "pattern", "shape", "scale")


def recognise(records: Records) -> Format:
    """The format of a file, from its columns or keys.

    Raises:
        InputError: no known format has them; the message says what would help.
    """
    if not records.names and records.faults:
        raise records.faults[0][1]
    if not records.names:
        raise InputError("holds no rows", file=records.file)
    for known in FORMATS:
        if records.names.issuperset(known.fields):
            return known
    if records.names.issuperset(SERVEGEN_FIELDS):
        raise InputError(f"a ServeGen client table: open it as servegen://{records.file}", file=records.file)
    if any(records.names.issuperset(fields) for fields in LENGTH_FIELDS):
        raise InputError(
            "has lengths but no arrival times: use it with a generator, as in "
            f"poisson://?lengths={records.file}. Where it has times under another name, trace://FILE?columns=arrival_s:COLUMN,"
            "prompt_tokens:COLUMN,output_tokens:COLUMN says so",
            file=records.file,
        )
    if records.names.issuperset(_SUMMARY):
        raise InputError(
            "a benchmark's summary without its requests: `vllm bench serve` saves them with --save-detailed, "
            "SGLang's with --output-details",
            file=records.file,
        )
    if sharegpt.FIELD in records.names:
        raise InputError(
            f"ShareGPT conversations, which have no arrival times: use them with a generator, as in "
            f"poisson://?lengths={records.file}",
            file=records.file,
        )
    raise InputError(f"{_nearest(records)}{_HOW}", file=records.file)


_HOW = (
    "trace://FILE?columns=arrival_s:COLUMN,prompt_tokens:COLUMN,output_tokens:COLUMN reads any names; "
    "`llmserve workload --help` and docs/workloads.md list the formats"
)


def _nearest(records: Records) -> str:
    """What an unknown file has, and which format it nearly is."""
    found = shown_names(records.names)
    lacks = {
        known.name: [name for name in known.fields if name not in records.names]
        for known in FORMATS
        if records.names.intersection(known.fields)
    }
    near = min(lacks, key=lambda name: len(lacks[name]), default=None)
    text = f"unknown format with the fields {found}. "
    if near is not None and len(lacks[near]) == 1:
        text += f"It would be {near} with {lacks[near][0]!r}. "
    return text
