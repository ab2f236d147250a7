"""Azure LLM inference traces (2023 and 2024).

Source: https://github.com/Azure/AzurePublicDataset, AzureLLMInferenceDataset2023.md and 2024.md.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from llmserve_env.workloads.loaders.parsed import Parsed
from llmserve_env.workloads.loaders.records import Records

FIELDS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")

_STAMP = re.compile(
    r"((?:19[7-9]|20\d|21\d)\d-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:\.\d{1,9})?)(?:Z|([+-])(\d\d):?(\d\d))?"
)
_EXPECTED = "expected a time such as '2023-11-16 18:15:46.6805900' or '2024-05-10 00:00:00.009930+00:00'"


def parse(records: Records) -> Parsed:
    """Time of day with 7 fraction digits (2023) or 6 and a UTC offset (2024), prompt and output tokens."""
    return Parsed(
        arrival_s=_seconds(records, "TIMESTAMP"),
        prompt_tokens=records.tokens("ContextTokens"),
        output_tokens=records.tokens("GeneratedTokens"),
        starts_at_first=True,
    )


def _seconds(records: Records, name: str) -> NDArray[np.float64]:
    """float64[n], seconds since the earliest row; in ns until then, which float64 could not hold."""
    raw = records.values(name)
    bodies: list[str] = []
    offsets_ns = np.zeros(len(raw), np.int64)
    wrong = np.zeros(len(raw), bool)
    for row, value in enumerate(raw):
        match = _STAMP.fullmatch(str(value).strip())
        if match is None or not _is_time(match[1]):
            wrong[row] = True
            bodies.append("1970-01-01 00:00:00")
            continue
        bodies.append(match[1])
        if match[2]:
            minutes = int(match[3]) * 60 + int(match[4])
            offsets_ns[row] = (minutes if match[2] == "+" else -minutes) * 60_000_000_000
    records.mark(wrong, lambda row: f"{_EXPECTED}, found {raw[row]!r}", name)
    ns = np.array(bodies, dtype="datetime64[ns]").astype(np.int64) - offsets_ns
    start = ns[~wrong].min() if not wrong.all() else 0
    return np.where(wrong, 0.0, (ns - start) / 1e9)


def _is_time(text: str) -> bool:
    """Whether a well-formed time exists; most days and hours do without asking numpy."""
    if text[8:10] <= "28" and text[8:10] != "00" and "01" <= text[5:7] <= "12":
        return text[11:13] <= "23" and text[14:16] <= "59" and text[17:19] <= "59"
    try:
        np.datetime64(text)
    except ValueError:
        return False
    return True
