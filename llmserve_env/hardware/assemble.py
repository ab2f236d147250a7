"""A profile from a fitted latency model and what is known of the GPU, the model and the engine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmserve_env.errors import InputError, as_input_error
from llmserve_env.hardware.calibrate import Calibration
from llmserve_env.hardware.gpus import gpu_facts
from llmserve_env.hardware.profile import Engine, Gpu, Link, Model, Profile
from llmserve_env.hardware.tiers import tiers_for

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def assemble(
    name: str,
    calibration: Calibration,
    model: Model,
    gpu: Gpu,
    *,
    link: Link | None = None,
    kv_blocks: int | None = None,
) -> Profile:
    """Put a profile together.

    Args:
        name: name of the profile.
        calibration: its latency model.
        model: the model.
        gpu: the GPUs.
        link: between them, where there are several.
        kv_blocks: `num_gpu_blocks` that a real engine reported.

    Raises:
        InputError: the GPUs need a link, or a figure cannot be.
    """
    if gpu.count > 1 and link is None:
        raise InputError(
            f"{gpu.count} GPUs exchange two all-reduces a layer: give the latency (us) and the "
            "bandwidth (GB/s) of their link",
            field="link",
        )
    try:
        return Profile(
            name=name,
            notes=calibration.notes,
            gpu=gpu,
            model=model,
            engine=default_engine(kv_blocks),
            link=link,
            tiers=tiers_for(gpu.name, model, "bf16, as measured"),
            latency=calibration.latency,
        )
    except ValidationError as error:
        raise as_input_error(error) from error


def default_engine(kv_blocks: int | None = None) -> Engine:
    """The engine settings of `data/engine.toml`, with a real engine's block count where one is known."""
    path = Path(__file__).parent / "data" / "engine.toml"
    settings: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    if kv_blocks is not None:
        settings["source"] += "; kv_blocks: num_gpu_blocks of a real engine"
    try:
        return Engine(**settings, kv_blocks=kv_blocks)
    except ValidationError as error:
        raise as_input_error(error) from error


def gpus_named(name: str | None, count: int, memory_gb: float | None) -> Gpu:
    """GPUs of a name, with memory as given or as `data/gpus.toml` knows it.

    Args:
        name: as the driver reports it; None where nothing tells it.
        count: how many share the model.
        memory_gb: memory of one GPU (1e9 bytes); None: looked up.

    Raises:
        InputError: neither the memory nor a known name is given.
    """
    if memory_gb is not None:
        memory = round(memory_gb * 1e9)
        try:
            return Gpu(name=name or "unknown", count=count, memory_bytes=memory, source="as given")
        except ValidationError as error:
            raise as_input_error(error) from error
    if name is None:
        raise InputError("meta.yaml names no gpu: give the memory of one GPU", field="gpu-memory-gb")
    try:
        facts = gpu_facts(name)
    except InputError as error:
        raise InputError(
            f"{error.reason}; for another, give the memory of one", field="gpu-memory-gb"
        ) from error
    return Gpu(name=name, count=count, memory_bytes=facts.memory_bytes, source=facts.source)
