"""`llmserve validate`: the simulator against a measured run of a real engine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from llmserve_env.errors import InputError

if TYPE_CHECKING:
    from llmserve_env.commands.shared.measured import Latencies, Measured
    from llmserve_env.commands.shared.serving import Cell
    from llmserve_env.hardware import Profile

MEAN_LIMIT_PERCENT, LARGEST_LIMIT_PERCENT = 3.0, 8.0
"""What the report holds the mean absolute error and the largest one against."""

LATENCIES = ("ttft", "tpot", "e2e")


def validate(
    run_dir: Annotated[Path, tyro.conf.Positional],
    *,
    profile: str,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    picture: Path | None = None,
) -> None:
    """Compare the simulator with a measured run of vLLM.

    Replays the run's requests at the times at which its engine queued them, under its engine's settings, and
    prints measured and simulated TTFT, TPOT and end-to-end latency with the error of each.

    Args:
        run_dir: folder with requests.jsonl and, where there is one, meta.json.
        profile: hardware and model: a shipped profile, or the path of a .toml file.
        json_file: file for the figures, as JSON.
        picture: picture of the distributions (png, svg or pdf).
    """
    from llmserve_env.commands.shared.measured import Latencies, read_run
    from llmserve_env.commands.shared.report import check_outputs, write_json
    from llmserve_env.commands.shared.serving import serve
    from llmserve_env.hardware import load_profile
    from llmserve_env.report.figures import check_suffix
    from llmserve_env.report.provenance import made_by

    requests, meta = run_dir / "requests.jsonl", run_dir / "meta.json"
    check_outputs({"json": json_file, "picture": picture}, profile=profile, requests=requests, meta=meta)
    if picture is not None:
        check_suffix(picture)
    hardware = load_profile(profile)
    measured = read_run(requests)
    cell, warnings = _cell(meta, hardware)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    outcomes = serve(measured.workload, cell).outcomes
    missing = int((outcomes.status != "completed").sum())
    if missing:
        print(f"warning: the simulator could not complete {missing} of the requests", file=sys.stderr)
    simulated = Latencies(outcomes.arrival_s, outcomes.ttft_s, outcomes.tpot_s, outcomes.e2e_s)
    report = _compare(measured, simulated, int(outcomes.preemptions.sum()))
    report = {
        "run": run_dir.resolve().name,
        "profile": hardware.name,
        **_settings(cell),
        "warnings": warnings,
        **report,
    }
    _print(report)
    if json_file is not None:
        write_json(json_file, {"made_by": made_by(), **report})
    if picture is not None:
        from llmserve_env.commands.shared.picture import draw_validation

        draw_validation(measured.latencies, simulated, _title(report), picture)


def _cell(path: Path, profile: Profile) -> tuple[Cell, list[str]]:
    """The engine that meta.json describes, the profile's where it is silent, and how the two differ."""
    from llmserve_env.commands.shared.measured import Meta
    from llmserve_env.commands.shared.serving import Cell
    from llmserve_env.controls import within_action
    from llmserve_env.hardware.memory import kv_blocks
    from llmserve_env.schema import ServeAction
    from llmserve_env.sim.state import BLOCK_TOKENS, MAX_RUNNING

    meta = Meta(path)
    warnings = [
        f"the run has {name} {found}, profile '{profile.name}' {expected}"
        for name, found, expected in (
            ("tensor_parallel_size", meta.count("engine_kwargs.tensor_parallel_size"), profile.gpu.count),
            ("model", meta.text("model"), profile.model.name),
            ("GPU", meta.text("hardware.device_name"), profile.gpu.name),
        )
        if found is not None and found != expected
    ]
    sequences = meta.count("engine_kwargs.max_num_seqs") or profile.engine.max_num_seqs
    if sequences > MAX_RUNNING:
        warnings.append(f"the run has max_num_seqs {sequences}, the simulator runs at most {MAX_RUNNING}")
    budget = meta.count("engine_kwargs.max_num_batched_tokens") or profile.engine.max_num_batched_tokens
    block_tokens = meta.count("kv_cache.block_size") or BLOCK_TOKENS
    if block_tokens != BLOCK_TOKENS:
        raise InputError(
            f"expected {BLOCK_TOKENS}, found {block_tokens}", file=str(path), field="kv_cache.block_size"
        )
    allocated = meta.count("kv_cache.num_gpu_blocks", at_least=2)
    if allocated is None:
        tokens = meta.count("kv_cache.num_kv_tokens", at_least=2 * BLOCK_TOKENS)
        allocated = None if tokens is None else tokens // BLOCK_TOKENS
    prefix_cache = meta.flag("resolved_config.cache_config.enable_prefix_caching")
    cap, more = within_action(min(sequences, MAX_RUNNING, budget))
    blocks = kv_blocks(profile) if allocated is None else allocated - 1  # vLLM keeps the null block
    cell = Cell(
        profile,
        ServeAction(batch_cap=cap),
        budget,
        blocks,
        prefix_cache=prefix_cache is not False,
        max_num_seqs=more,
        max_model_len=meta.count("engine_kwargs.max_model_len"),
    )
    return cell, warnings


def _settings(cell: Cell) -> dict[str, Any]:
    return {
        "engine": {
            "max_num_seqs": cell.sequences,
            "max_num_batched_tokens": cell.max_num_batched_tokens,
            "kv_tokens": cell.kv_blocks * cell.profile.engine.block_tokens,
            "prefix_cache": cell.prefix_cache,
        }
    }


def _compare(measured: Measured, simulated: Latencies, preemptions: int) -> dict[str, Any]:
    """Each latency figure measured and simulated, and the mean and largest absolute error (%)."""
    from llmserve_env.commands.shared.report import statistics

    figures = {
        name: {
            statistic: {"measured_s": real, "simulated_s": ours, "error_percent": _error(ours, real)}
            for (statistic, real), ours in zip(
                statistics(getattr(measured.latencies, f"{name}_s")).items(),
                statistics(getattr(simulated, f"{name}_s")).values(),
                strict=True,
            )
        }
        for name in LATENCIES
    }
    errors = {
        f"{name.upper()} {statistic}": abs(figure["error_percent"])
        for name, statistics_of in figures.items()
        for statistic, figure in statistics_of.items()
        if figure["error_percent"] is not None
    }
    real_s, ours_s = measured.latencies.makespan_s, simulated.makespan_s
    mean = sum(errors.values()) / len(errors) if errors else None
    largest_at = max(errors, key=lambda name: errors[name]) if errors else None
    return {
        "requests": len(measured.workload),
        "latency": figures,
        "makespan": {"measured_s": real_s, "simulated_s": ours_s, "error_percent": _error(ours_s, real_s)},
        "preemptions": {"measured": measured.preemptions, "simulated": preemptions},
        "mean_error_percent": mean,
        "largest_error_percent": None if largest_at is None else errors[largest_at],
        "largest_error_at": largest_at,
    }


def _error(simulated: float | None, measured: float | None) -> float | None:
    if simulated is None or not measured:
        return None
    return 100 * (simulated - measured) / measured


def _print(report: dict[str, Any]) -> None:
    from llmserve_env.commands.shared.report import number, table

    def row(label: str, figure: dict[str, float | None], factor: float, digits: int) -> list[str]:
        values = [figure["measured_s"], figure["simulated_s"]]
        error = figure["error_percent"]
        return [
            label,
            *(number(None if value is None else factor * value, digits) for value in values),
            "–" if error is None else f"{error:+.2f}",
        ]

    engine = report["engine"]
    cache = "" if engine["prefix_cache"] else ", no prefix cache"
    print(f"{report['run']}: {report['requests']:,} requests; {report['profile']}")
    print(
        f"{engine['max_num_seqs']} sequences, {engine['max_num_batched_tokens']:,} tokens an iteration, "
        f"{engine['kv_tokens']:,} KV tokens{cache}\n"
    )
    units = {"ttft": (1.0, 3, "s"), "tpot": (1e3, 2, "ms"), "e2e": (1.0, 3, "s")}
    lines = [
        row(f"{name.upper()} {statistic} ({units[name][2]})", figure, *units[name][:2])
        for name, figures in report["latency"].items()
        for statistic, figure in figures.items()
    ]
    lines.append(row("makespan (s)", report["makespan"], 1.0, 2))
    counts = report["preemptions"]
    real = "not recorded" if counts["measured"] is None else f"{counts['measured']:,}"
    lines.append(["preemptions", real, f"{counts['simulated']:,}", ""])
    print(table(["", "measured", "simulated", "error %"], lines))
    if report["mean_error_percent"] is not None:
        print(f"\n{_verdict(report)}")


def _verdict(report: dict[str, Any]) -> str:
    mean, largest = report["mean_error_percent"], report["largest_error_percent"]
    return (
        f"mean absolute error {mean:.2f}% ({_within(mean, MEAN_LIMIT_PERCENT)}), "
        f"largest {largest:.2f}% at {report['largest_error_at']} ({_within(largest, LARGEST_LIMIT_PERCENT)})"
    )


def _within(error: float, limit: float) -> str:
    return f"{'within' if error <= limit else 'not within'} {limit:g}%"


def _title(report: dict[str, Any]) -> str:
    mean, largest = report["mean_error_percent"], report["largest_error_percent"]
    errors = "" if mean is None else f", mean absolute error {mean:.2f}%, largest {largest:.2f}%"
    return f"{Path(report['run']).resolve().name}\n{report['requests']:,} requests{errors}"
