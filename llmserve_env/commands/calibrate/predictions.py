"""`llmserve calibrate predictions`: profiles from a predictor's figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from llmserve_env.errors import InputError
from llmserve_env.schema import bounds

if TYPE_CHECKING:
    from llmserve_env.hardware.gpus import GpuFacts
    from llmserve_env.hardware.profile import Engine, Latency, Link

_LARGE_BYTES = 70 * 2**30
_MOST_SEQUENCES: int = bounds("batch_cap")["le"]
_RESERVED_ALONE = 3275000000
_RESERVED_SHARED = 5197000000
_RESERVED_SMALL = 1237000000


def predictions(
    grid: Annotated[Path, tyro.conf.Positional],
    *,
    system: str,
    model_config: Path,
    name: str,
    gpu: str,
    out: Path,
    points: Path | None = None,
    scale_to: str | None = None,
    base_model_config: Path | None = None,
    tp: int = 1,
    link_latency_us: float | None = None,
    link_bandwidth_gbps: float | None = None,
    link_source: str = "given by the user",
    source: str = "",
) -> None:
    """Fit a profile's latency model to predicted iterations (aiconfigurator) and write the profile.

    Args:
        grid: CSV file with the columns sys, k ("d" decode or "p" prefill), B, ctx, ms.
        system: system whose rows are taken, such as h100_sxm.
        model_config: the model's Hugging Face config.json.
        name: name of the profile.
        gpu: name of the GPU as the driver tells it, such as "NVIDIA H100 80GB HBM3".
        out: the TOML file to write.
        points: CSV file with the columns sys, be, q, kind, n, ms, for --scale-to.
        scale_to: a system that only `points` has, such as h200_sxm: the grid is scaled by the ratio of vLLM's
            bf16 points of the two.
        base_model_config: config.json of the model that the grid is of, where the profile is of another one,
            on `tp` GPUs: its times are derived.
        tp: GPUs that share the model by tensor parallelism.
        link_latency_us: latency of an all-reduce between the GPUs (us).
        link_bandwidth_gbps: bandwidth of each GPU to the others in one direction (GB/s, bytes).
        link_source: source of the link's figures.
        source: place where the predictions were published.

    Raises:
        InputError: a file or an argument cannot be used.
    """
    from llmserve_env.commands.shared.report import check_outputs
    from llmserve_env.hardware.gpus import gpu_facts
    from llmserve_env.hardware.model_config import read_model
    from llmserve_env.hardware.predictions import (
        fit,
        fit_error,
        from_points,
        read_grid,
        read_points,
        scaled,
        tensor_parallel,
    )
    from llmserve_env.hardware.profile import Gpu, Profile, save_profile
    from llmserve_env.hardware.tiers import tiers_for

    link = _link(tp, link_latency_us, link_bandwidth_gbps, link_source)
    if (tp > 1) != (base_model_config is not None):
        raise InputError("--tp above 1 and --base-model-config go together", field="tp")
    configs = {"model_config": model_config, "base_model_config": base_model_config}
    check_outputs({"out": out}, grid=grid, points=points, **configs)
    model, facts = read_model(model_config), gpu_facts(gpu)
    base = model if base_model_config is None else read_model(base_model_config)
    said = f"{source}: " if source else ""
    what = f"{said}{base.name} predicted on {system}, {grid.name}"
    predicted = read_grid(grid, system)
    fitted = fit(predicted, base, f"{what}; taken apart by physics (docs/hardware-datacentre.md)")
    notes = [
        "assumption: decodes beside a prefill chunk add what they cost alone; no mixed batch was predicted"
    ]
    if scale_to is not None:
        if points is None:
            raise InputError("--scale-to needs --points", field="points")
        own = read_points(points, scale_to, "vllm", "bfloat16")
        told = f"{what}; scaled to {scale_to} by the ratio of single points, {points.name}"
        predicted = scaled(predicted, read_points(points, system, "vllm", "bfloat16"), own)
        fitted = fit(predicted, base, told, fitted.attention_tflop_per_s)
        predicted = from_points(own)
        fitted = fitted._replace(
            latency=fitted.latency.model_copy(update={"fit_error": fit_error(fitted.latency, predicted)})
        )
        notes.append(
            f"scaled from {system}: {scale_to} was predicted at {len(predicted.decodes)} batches and "
            f"{len(predicted.prefills)} lengths only; prefill attention keeps {system}'s FLOP rate"
        )
    latency = fitted.latency
    if base_model_config is not None:
        latency = tensor_parallel(
            fitted, base, model, tp, f"derived, not predicted: {what}; one rank's share"
        )
        notes.append(
            f"derived from {base.name} on one GPU by the parameters of a rank; benchmarks/engine_points.py "
            "compares it with measured engines"
        )
    profile = Profile(
        name=name,
        notes=tuple(notes),
        gpu=Gpu(name=gpu, count=tp, memory_bytes=facts.memory_bytes, source=facts.source),
        model=model,
        engine=_engine(facts, tp),
        link=link,
        tiers=tiers_for(gpu, model, "bf16, as predicted" if tp == 1 else "bf16, derived"),
        latency=latency,
    )
    save_profile(profile, out)
    _report(latency)
    print(f"wrote {out}")


def _link(tp: int, latency_us: float | None, bandwidth: float | None, source: str) -> Link | None:
    from llmserve_env.hardware.profile import Link

    if tp == 1:
        if latency_us is not None or bandwidth is not None:
            raise InputError("one GPU has no link: it needs --tp above 1", field="link")
        return None
    if latency_us is None or bandwidth is None:
        raise InputError("several GPUs need --link-latency-us and --link-bandwidth-gbps", field="tp")
    return Link(latency_us=latency_us, bandwidth_gb_per_s=bandwidth, source=source)


def _engine(facts: GpuFacts, tp: int) -> Engine:
    """What vLLM would do by default on the GPU: large ones other than the A100 get large budgets."""
    from llmserve_env.hardware.profile import Engine

    default = "vLLM's EngineArgs.get_batch_defaults for the API server"
    if facts.memory_bytes >= _LARGE_BYTES and "A100" not in facts.name:
        return Engine(
            max_num_seqs=_MOST_SEQUENCES,
            max_num_batched_tokens=8192,
            reserved_bytes_per_gpu=_RESERVED_ALONE if tp == 1 else _RESERVED_SHARED,
            source=f"{default} on GPUs of 70 GiB or more: 8192 tokens and 1024 sequences, of which the "
            "simulator serves 512; reserved: non-torch memory and activation peak of Llama-3-8B on an H100, "
            "1.79 + 1.26 GiB alone, 3.58 + 1.26 GiB a GPU on two (vllm-project/vllm pull request 10511), "
            "assumed for other GPUs, models and counts",
        )
    return Engine(
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        reserved_bytes_per_gpu=_RESERVED_SMALL,
        source=f"{default} on the A100 and on GPUs below 70 GiB: 2048 tokens and 256 sequences; reserved, "
        "an assumption: what LLMServingSim's measured RTX 4090 run with these budgets leaves beside weights "
        "and blocks",
    )


def _report(latency: Latency) -> None:
    for regime in ("decode", "prefill"):
        error = getattr(latency.fit_error, regime)
        if error is not None:
            print(f"{regime}: median error {error.median_percent:.2f}%, p90 {error.p90_percent:.2f}%")
