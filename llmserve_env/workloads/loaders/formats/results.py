"""What load generators saved of a run, as the traffic that they sent.

Sources: https://github.com/vllm-project/vllm, vllm/benchmarks/serve.py (`--save-result --save-detailed`);
https://github.com/ai-dynamo/aiperf (`profile_export.jsonl`);
https://github.com/vllm-project/guidellm (its reports).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llmserve_env.workloads.loaders.parsed import Parsed
from llmserve_env.workloads.loaders.records import Records
from llmserve_env.workloads.loaders.times import seconds

VLLM_FIELDS = ("start_times", "input_lens", "output_lens")

AIPERF_FIELDS = ("metadata.request_start_ns", "metrics.input_sequence_length.value")

GUIDELLM_FIELDS = ("request_start_time", "prompt_tokens", "output_tokens")
GUIDELLM_OLD_FIELDS = ("start_time", "prompt_tokens", "output_tokens")


def parse_vllm(records: Records) -> Parsed:
    """Start times on the client's clock (s), two lists of lengths, errors by request."""
    errors = records.values("errors")
    output_tokens = records.tokens("output_lens", at_least=0)
    failed = np.array([bool(error) for error in errors], bool) | (output_tokens == 0)
    return Parsed(
        arrival_s=seconds(records, "start_times"),
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
