"""`llmserve calibrate kernels`: a profile from measured kernel times."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from llmserve_env.errors import InputError

if TYPE_CHECKING:
    from llmserve_env.hardware.calibrate import Regime
    from llmserve_env.hardware.profile import Link


def kernels(
    tables: Annotated[Path, tyro.conf.Positional],
    *,
    model_config: Path,
    name: str,
    out: Path,
    tp: int = 1,
    link_latency_us: float | None = None,
    link_bandwidth_gbps: float | None = None,
    gpu_memory_gb: float | None = None,
    kv_blocks: int | None = None,
    source: str = "",
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Fit a profile's latency model to measured kernel times and write the profile.

    Args:
        tables: folder with dense.csv, attention.csv, per_sequence.csv and, where there are such, skew.csv and
            meta.yaml; times of one layer on one rank.
        model_config: the model's Hugging Face config.json.
        name: name of the profile.
        out: the TOML file to write.
        tp: GPUs that share the model by tensor parallelism, as in the run that measured the tables.
        link_latency_us: latency of one all-reduce between the GPUs (us).
        link_bandwidth_gbps: bandwidth of each GPU to the others in one direction (GB/s).
        gpu_memory_gb: memory of one GPU (1e9 bytes); not needed for a GPU that gpus.toml knows.
        kv_blocks: num_gpu_blocks that a real engine reported; computed when not given.
        source: place where the tables were published.
        json_file: file for the errors of the fit, as JSON.
    """
    from llmserve_env.commands.shared.report import check_outputs
    from llmserve_env.files import write_atomic
    from llmserve_env.hardware.assemble import assemble, gpus_named
    from llmserve_env.hardware.calibrate import calibrate
    from llmserve_env.hardware.memory import kv_blocks as usable_blocks
    from llmserve_env.hardware.model_config import read_model
    from llmserve_env.hardware.profile import save_profile
    from llmserve_env.hardware.tables import read_tables

    link = _link(tp, link_latency_us, link_bandwidth_gbps)
    found = {each.stem: each for each in tables.glob("*.*")}
    check_outputs({"out": out, "json": json_file}, model_config=model_config, **found)
    measured = read_tables(tables)
    model = read_model(model_config, measured.meta.get("model"))
    if model.attention_heads % tp or (model.kv_heads % tp and tp % model.kv_heads):
        heads = f"{model.attention_heads} attention heads and {model.kv_heads} KV heads"
        raise InputError(f"{heads} cannot be shared by {tp} GPUs", field="tp")
    gpu = gpus_named(measured.meta.get("gpu"), tp, gpu_memory_gb)
    result = calibrate(measured, model.layers, ", ".join(filter(None, (source, measured.origin))))
    profile = assemble(name, result, model, gpu, link=link, kv_blocks=kv_blocks)
    usable_blocks(profile)  # refuses weights that leave no room for a KV cache
    save_profile(profile, out)
    if json_file is not None:
        report = {
            "profile": name,
            "percentiles_weighted_by": "time",
            "regimes": {regime: asdict(error) for regime, error in result.regimes.items()},
            "mixed_skew": result.latency.mixed_skew,
            "notes": list(result.notes),
        }
        write_atomic(json_file, json.dumps(report, indent=2) + "\n")
    _print_errors(result.regimes)
    print(f"mixed_skew {result.latency.mixed_skew:g}")
    for note in result.notes:
        print(f"note: {note}")
    print(f"wrote {out}")


def _link(tp: int, latency_us: float | None, bandwidth: float | None) -> Link | None:
    from llmserve_env.hardware.profile import Link

    if tp < 1:
        raise InputError(f"expected 1 or more GPUs, found {tp}", field="tp")
    if tp == 1:
        if latency_us is not None or bandwidth is not None:
            print("note: one GPU exchanges nothing: the link is left out", file=sys.stderr)
        return None
    if latency_us is None or bandwidth is None:
        raise InputError(
            f"{tp} GPUs exchange two all-reduces a layer, which the tables do not hold: "
            "give --link-latency-us and --link-bandwidth-gbps",
            field="tp",
        )
    if latency_us < 0 or bandwidth <= 0:
        raise InputError(
            f"expected >= 0 us and > 0 GB/s, found {latency_us:g} and {bandwidth:g}", field="link"
        )
    return Link(latency_us=latency_us, bandwidth_gb_per_s=bandwidth, source="as given")


def _print_errors(regimes: dict[str, Regime]) -> None:
    print("error of the fit in %; percentiles are weighted by time, so that long kernels count for more")
    print(f"{'regime':<8} {'points':>7} {'median':>8} {'p90':>8} {'max':>8} {'bias':>8}")
    for name, regime in regimes.items():
        percents = (regime.median_percent, regime.p90_percent, regime.max_percent, regime.bias_percent)
        print(f"{name:<8} {regime.points:>7} " + " ".join(f"{percent:>8.2f}" for percent in percents))
