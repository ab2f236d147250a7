"""BurstGPT traces.

Source: https://github.com/HPMLL/BurstGPT; Wang et al., "BurstGPT", arXiv 2401.17644. Times are whole seconds;
files with further columns (session, elapsed time) are read alike.
"""

from __future__ import annotations

from llmserve_env.workloads.loaders.parsed import Parsed
from llmserve_env.workloads.loaders.records import Records
from llmserve_env.workloads.loaders.times import seconds

FIELDS = ("Timestamp", "Request tokens", "Response tokens")


def parse(records: Records) -> Parsed:
    """Seconds and two lengths; the log type, if given, is the tenant; no response token: it failed."""
    prompt_tokens = records.tokens("Request tokens", at_least=0)
    output_tokens = records.tokens("Response tokens", at_least=0)
    failed = output_tokens == 0
    records.mark(
        (prompt_tokens == 0) & ~failed,
        "expected a whole number of tokens >= 1 in an answered request, found 0",
        "Request tokens",
    )
    return Parsed(
        arrival_s=seconds(records, "Timestamp"),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        tenants=records.texts("Log Type") if "Log Type" in records.names else None,
        failed=failed,
    )
