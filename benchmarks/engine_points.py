"""Compare the datacentre profiles with TPOT that others measured on real engines.

    python benchmarks/engine_points.py FOLDER [--json FILE]

FOLDER holds silicon_sample.csv.gz (ai-dynamo/aiconfigurator's published comparisons, Apache-2.0) and
A100_H100_quant_all_results.csv (argonne-lcf/LLM-Inference-Bench, BSD-3). Nothing was fitted to these points.

- Closed loop: a fixed number of clients, each with one request at a time. While a request decodes, each other
  one is replaced once, on average, and its prefill delays a step:
  TPOT = decode + (clients - 1) / output * (mixed - decode). The column `alone` leaves the second term out.
- Static batch: all requests start at once; the figure is latency / output tokens, prefill included, on both
  sides.
"""

from __future__ import annotations

import csv
import gzip
import json as json_format
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

from llmserve_env.errors import InputError
from llmserve_env.files import write_atomic
from llmserve_env.hardware.latency import LatencyArrays, compile_latency, iteration_time
from llmserve_env.hardware.memory import kv_blocks
from llmserve_env.hardware.profile import TIERS, Profile, TierName, load_profile
from llmserve_env.report.provenance import made_by

SILICON = {
    ("meta-llama/Llama-3.1-8B-Instruct", "h100_sxm", "trtllm", "", "1"): ("h100-llama-3.1-8b", "FP16"),
    ("nvidia/Llama-3.1-8B-Instruct-FP8", "h200_sxm", "vllm", "fp8", "1"): ("h200-llama-3.1-8b", "INT8"),
    ("meta-llama/Llama-3.1-8B-Instruct", "h200_sxm", "sglang", "fp8", "1"): ("h200-llama-3.1-8b", "INT8"),
    ("meta-llama/Llama-3.1-70B", "h100_sxm", "vllm", "fp8", "4"): ("h100x4-llama-3.1-70b", "INT8"),
}
"""Closed loop: model, system, engine, precision, GPUs; the profile and tier that stand for them."""

STATIC = {
    ("Nvidia H100 GPU", "vLLM", "Weight = fp16, KV Cache = fp16"): ("h100-llama-3.1-8b", "FP16"),
    ("Nvidia H100 GPU", "vLLM", "Weight = fp8, KV Cache = fp8"): ("h100-llama-3.1-8b", "INT8"),
    ("Nvidia A100 GPU", "vLLM", "Weight = fp16, KV Cache = fp16"): ("a100-llama-3.1-8b", "FP16"),
    ("Nvidia A100 GPU", "TensorRT-LLM", "Weight = int8, KV Cache = int8"): ("a100-llama-3.1-8b", "INT8"),
}
"""Static: hardware, framework, precision (Llama-3-8B, the same shape); what stands for them."""


class Point(NamedTuple):
    """A measurement: who made it, what stands for it, the load, milliseconds a token."""

    engine: str
    profile: str
    tier: TierName
    closed_loop: bool
    prompt: int
    output: int
    concurrency: int
    measured_ms: float


class Row(NamedTuple):
    """How a profile compares with the points of one engine."""

    profile: str
    tier: TierName
    engine: str
    points: int
    skipped: int
    median_abs_percent: float
    p90_abs_percent: float
    bias_percent: float
    alone_bias_percent: float | None


_HEADER = (
    f"{'profile':<21} {'tier':<5} {'engine':<38} {'points':>6} {'skipped':>7} "
    f"{'median':>7} {'p90':>6} {'bias':>7} {'alone':>7}"
)


def engine_points(folder: tyro.conf.Positional[Path], /, *, json: Path | None = None) -> None:
    """Compare the datacentre profiles with TPOT that others measured on real engines.

    Args:
        folder: folder of silicon_sample.csv.gz and A100_H100_quant_all_results.csv.
        json: file for the table.
    """
    rows = compare(
        [
            *read_silicon(folder / "silicon_sample.csv.gz"),
            *read_static(folder / "A100_H100_quant_all_results.csv"),
        ]
    )
    print(_HEADER)
    for row in rows:
        alone = "" if row.alone_bias_percent is None else f"{row.alone_bias_percent:+.1f}%"
        print(
            f"{row.profile:<21} {row.tier:<5} {row.engine:<38} {row.points:>6} {row.skipped:>7} "
            f"{row.median_abs_percent:>6.1f}% {row.p90_abs_percent:>5.1f}% "
            f"{row.bias_percent:>+6.1f}% {alone:>7}"
        )
    print(
        "median, p90: of the absolute error; bias: median error, + where the profile is slower; skipped: the"
    )
    print("profile has too few KV blocks for the load; alone: bias if no prefill delayed the decodes")
    if json is not None:
        content = {"made_by": made_by(), "rows": [row._asdict() for row in rows]}
        write_atomic(json, json_format.dumps(content, indent=2) + "\n")


def read_silicon(path: Path) -> Iterator[Point]:
    """Closed-loop points of the models and systems in `SILICON`."""
    try:
        text = gzip.decompress(path.read_bytes()).decode()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {error}", file=str(path)) from error
    for row in csv.DictReader(text.splitlines()):
        key = (row["model_path"], row["system"], row["backend"], row["precision"], row["tp_size"])
        if key in SILICON:
            profile, tier = SILICON[key]
            engine = f"{row['backend']} {row['backend_version']} {row['gemm_quant_mode'] or 'bf16'}"
            load = (int(row["isl"]), int(row["osl"]), int(row["batch_size"]))
            yield Point(" ".join(engine.split()), profile, tier, True, *load, float(row["silicon_tpot_ms"]))


def read_static(path: Path) -> Iterator[Point]:
    """Static batches of the hardware and precisions in `STATIC`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {error}", file=str(path)) from error
    for row in csv.DictReader(line for line in text.splitlines() if line.strip()):
        key = (row["Hardware"], row["Framework"], row["kv_cache_dtype"])
        if key in STATIC:
            profile, tier = STATIC[key]
            length, batch = int(row["Input Output Length"]), int(row["Batch Size"])
            precision = row["kv_cache_dtype"].replace("Weight = ", "").replace(" KV Cache = ", " KV ")
            engine = f"{row['Framework']} 2024 static {precision}"
            ms = 1e3 * float(row["latency"]) / length
            yield Point(engine, profile, tier, False, length, length, batch, ms)


def compare(points: list[Point]) -> list[Row]:
    """Errors of the profiles, a row for each engine and precision."""
    groups: dict[tuple[str, TierName, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point.profile, point.tier, point.engine), []).append(point)
    rows = []
    for (name, tier, engine), members in sorted(groups.items()):
        profile = load_profile(name)
        room = kv_blocks(profile, tier) * profile.engine.block_tokens
        served = [point for point in members if point.concurrency * (point.prompt + point.output) <= room]
        errors = 100 * np.array([predict_ms(profile, point) / point.measured_ms - 1 for point in served])
        alone = [100 * (predict_ms(profile, p, prefills=False) / p.measured_ms - 1) for p in served]
        rows.append(
            Row(
                name,
                tier,
                engine,
                len(served),
                len(members) - len(served),
                round(float(np.median(np.abs(errors))), 2),
                round(float(np.quantile(np.abs(errors), 0.9)), 2),
                round(float(np.median(errors)), 2),
                round(float(np.median(alone)), 2) if members[0].closed_loop else None,
            )
        )
    return rows


def predict_ms(profile: Profile, point: Point, *, prefills: bool = True) -> float:
    """Milliseconds a token that the profile predicts for a point's load."""
    arrays, tier = compile_latency(profile), TIERS.index(point.tier)
    count, budget = point.concurrency, profile.engine.max_num_batched_tokens
    context = point.prompt + point.output / 2
    decode = iteration_time(arrays, tier, [], count, count * context, context, count)
    if not point.closed_loop:
        prefill = _together(arrays, tier, budget, point.prompt, count)
        return 1e3 * (prefill + (point.output - 1) * decode) / point.output
    if not prefills:
        return 1e3 * decode
    others, extra, cached = count - 1, 0.0, 0
    while cached < point.prompt:
        tokens = min(point.prompt - cached, budget - others)
        sampled = others + (cached + tokens == point.prompt)
        chunk = [(tokens, cached)]
        extra += iteration_time(arrays, tier, chunk, others, others * context, context, sampled) - decode
        cached += tokens
    return 1e3 * (decode + others / point.output * extra)


def _together(arrays: LatencyArrays, tier: int, budget: int, prompt: int, count: int) -> float:
    """Seconds of the prefills of `count` prompts with nothing beside them, as many at once as fit."""
    time, left = 0.0, count
    while left:
        together = max(1, min(left, budget // prompt))
        time += iteration_time(arrays, tier, [(prompt, 0)] * together, 0, 0.0, 0.0, together)
        left -= together
    return time


if __name__ == "__main__":
    tyro.cli(engine_points)
