"""The formats that `load` knows, and how it tells them apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmserve_env.errors import InputError
from llmserve_env.workloads.loaders import azure, burstgpt, llmservingsim, measured, mooncake, plain
from llmserve_env.workloads.loaders.parsed import Parsed
from llmserve_env.workloads.loaders.records import Records


@dataclass(frozen=True)
class Format:
    """A file format, known by its columns or keys.

    Attributes:
        name: what it is called in messages.
        fields: columns or keys that it must have; others are allowed.
        parse: reads its columns.
        jitter_s: width of the spread that its coarse times need (s).
    """

    name: str
    fields: tuple[str, ...]
    parse: Callable[[Records], Parsed]
    jitter_s: float = 0.0


FORMATS = (
    Format("Azure LLM inference CSV", azure.FIELDS, azure.parse),
    Format("BurstGPT CSV", burstgpt.FIELDS, burstgpt.parse),
    Format("Mooncake JSONL", mooncake.FIELDS, mooncake.parse, mooncake.JITTER_S),
    Format("vLLM run JSONL", measured.FIELDS, measured.parse),
    Format("LLMServingSim TSV or JSONL", llmservingsim.FIELDS, llmservingsim.parse),
    Format("LLMServingSim sessions JSONL", llmservingsim.SESSION_FIELDS, llmservingsim.parse_sessions),
    Format("plain CSV", plain.FIELDS, plain.parser(*plain.FIELDS)),
    Format("plain CSV, short names", plain.SHORT_FIELDS, plain.parser(*plain.SHORT_FIELDS)),
    Format("Vidur CSV", plain.VIDUR_FIELDS, plain.parser(*plain.VIDUR_FIELDS)),
)

LENGTH_FIELDS = (("num_prefill_tokens", "num_decode_tokens"), ("prompt_tokens", "output_tokens"))
"""Tables of lengths without arrivals: Vidur's processed traces, and the plain CSV without its times."""

SERVEGEN_FIELDS = ("client", "window_start_s", "rate_rps", "cv", "pattern", "shape", "scale")


def recognise(records: Records) -> Format:
    """The format of a file, from its columns or keys.

    Raises:
        InputError: no known format has them; the message says what would help.
    """
    for known in FORMATS:
        if records.names.issuperset(known.fields):
            return known
    if records.names.issuperset(SERVEGEN_FIELDS):
        raise InputError(f"a ServeGen client table: open it as servegen://{records.file}", file=records.file)
    if any(records.names.issuperset(fields) for fields in LENGTH_FIELDS):
        raise InputError(
            f"has lengths but no arrival times: use it with a generator, as in poisson://?lengths={records.file}",
            file=records.file,
        )
    known_fields = "; ".join(f"{known.name} ({', '.join(known.fields)})" for known in FORMATS)
    found = ", ".join(sorted(records.names))
    found = found if len(found) <= 120 else f"{found[:117]}..."
    raise InputError(
        f"unknown format with the fields {found!r}. Known formats: {known_fields}", file=records.file
    )
