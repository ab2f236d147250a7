"""Azure LLM inference traces (2023 and 2024).

Source: https://github.com/Azure/AzurePublicDataset, AzureLLMInferenceDataset2023.md and 2024.md.
"""

from __future__ import annotations

from llmserve_env.workloads.loaders.parsed import Parsed
from llmserve_env.workloads.loaders.records import Records
from llmserve_env.workloads.loaders.times import seconds

FIELDS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def parse(records: Records) -> Parsed:
    """Time of day with 7 fraction digits (2023) or 6 and a UTC offset (2024), prompt and output tokens.

    Copies with Unix times, or with seconds since the start, are read, too.
    """
    return Parsed(
        arrival_s=seconds(records, "TIMESTAMP", sure=False),
        prompt_tokens=records.tokens("ContextTokens"),
        output_tokens=records.tokens("GeneratedTokens"),
    )
