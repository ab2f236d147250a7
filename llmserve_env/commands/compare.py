"""`llmserve compare`: one trace on a vLLM server and in the simulator."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from llmserve_env.hardware.profile import Profile
    from llmserve_env.live.calibrate.calibration import EngineLimits
    from llmserve_env.live.calibrate.comparison import Comparison

UNITS = {"ttft": ("TTFT", "ms", 1e3, 1), "itl": ("ITL", "ms", 1e3, 2), "e2e": ("E2E", "ms", 1e3, 0)}
"""How latencies are called and shown: name, unit, factor, digits."""


def compare(
    *,
    url: str,
    profile: str,
    trace: str,
    iteration_log: Path | None = None,
    model: str | None = None,
    seed: int = 0,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    picture: Path | None = None,
) -> None:
    """Play a trace on a running vLLM server and in the simulator, and tell how far they are apart.

    The server, which should have nothing else to do meanwhile, gets the requests open-loop, with prompts of
    random token ids and answers of exactly the length that the trace says. The simulator runs the profile's
    engine on the same requests at the times at which they were sent. A key is taken from OPENAI_API_KEY.

    Args:
        url: URL of the server, with or without /v1.
        profile: a profile that `llmserve calibrate live` wrote for it, or the name of a shipped one.
        trace: a trace file, or a URI such as "poisson://?rate=8&duration=60&lengths=fixed:128,32".
        iteration_log: the file that the server's output goes to, where it was started with
            --enable-logging-iteration-details: also compares the time of each iteration.
        model: name of the model at the server (default: the first that it lists).
        seed: random seed of the prompts.
        json_file: file for the figures, as JSON.
        picture: picture of the distributions (png, svg or pdf).

    Raises:
        InputError: the server, the trace, the log or a file cannot be used.
    """
    from llmserve_env.commands.shared.report import check_outputs, write_json
    from llmserve_env.hardware import load_profile
    from llmserve_env.live.calibrate import comparison
    from llmserve_env.live.calibrate.calibration import find_engine_limits, ordinary_tokens
    from llmserve_env.live.calibrate.load import Target
    from llmserve_env.report.figures import check_suffix
    from llmserve_env.report.provenance import made_by
    from llmserve_env.workloads import open_workload

    check_outputs(
        {"json": json_file, "picture": picture}, profile=profile, trace=trace, iteration_log=iteration_log
    )
    if picture is not None:
        check_suffix(picture)
    hardware = load_profile(profile)
    workload = open_workload(trace)
    key = os.environ.get("OPENAI_API_KEY")
    engine = hardware.engine
    limits = find_engine_limits(
        url,
        iteration_log,
        model=model,
        api_key=key,
        async_scheduling=engine.async_scheduling,
    )
    for warning in differences(hardware, limits):
        print(f"warning: {warning}", file=sys.stderr)
    target = Target(url, limits.model, ordinary_tokens(hardware.model), key)
    found = comparison.compare(target, limits, hardware, workload, log=iteration_log, seed=seed)
    print_comparison(found)
    if json_file is not None:
        write_json(json_file, {"made_by": made_by(), **found.report})
    if picture is not None:
        _draw(found, picture)


def differences(profile: Profile, limits: EngineLimits) -> list[str]:
    """Where a server is known to differ from the engine of a profile."""
    from llmserve_env.hardware.memory import kv_blocks

    engine = profile.engine
    pairs = [("KV tokens", limits.kv_tokens, kv_blocks(profile) * engine.block_tokens)]
    if "max_num_seqs" in limits.logged:
        pairs.append(("max_num_seqs", limits.max_num_seqs, engine.max_num_seqs))
    if "max_num_batched_tokens" in limits.logged:
        budget = engine.max_num_batched_tokens
        pairs.append(("max_num_batched_tokens", limits.max_num_batched_tokens, budget))
    return [
        f"the server has {name} {found:,}, profile '{profile.name}' {expected:,}"
        for name, found, expected in pairs
        if abs(found - expected) >= engine.block_tokens
    ]


def print_comparison(found: Comparison) -> None:
    """Print a comparison's figures."""
    from llmserve_env.commands.shared.report import number, table

    report = found.report

    def row(label: str, figure: dict[str, float | None], factor: float, digits: int) -> list[str]:
        values = (figure["measured"], figure["simulated"])
        error = figure["error_percent"]
        return [
            label,
            *(number(None if value is None else factor * value, digits) for value in values),
            "–" if error is None else f"{error:+.1f}",
        ]

    print(f"{report['requests']:,} requests of {report['trace']}; {report['profile']}\n")
    lines = []
    for name, figures in report["latency"].items():
        label, unit, factor, digits = UNITS[name]
        lines += [row(f"{label} {q} ({unit})", figure, factor, digits) for q, figure in figures.items()]
    lines.append(row("throughput (tokens/s)", report["tokens_per_s"], 1.0, 1))
    print(table(["", "measured", "simulated", "error %"], lines))
    if report["iterations"] is not None:
        every = report["iterations"]["all"]
        print(
            f"\n{every['points']:,} iterations: median error {every['median_percent']:.1f}%, "
            f"total time {every['bias_percent']:+.1f}%"
        )
    if report["sent_late_p99_s"] > 0.01:
        print(f"\nnote: 1% of the requests were sent more than {1e3 * report['sent_late_p99_s']:.0f} ms late")
    for reason, count in report["unanswered"].items():
        print(f"\nnot answered: {count:,} requests: {reason}")


def _draw(found: Comparison, path: Path) -> None:
    import numpy as np

    from llmserve_env.report.figures import INK, ORANGE, picture_file

    looks: tuple[tuple[str, Any, str, Any], ...] = (
        ("measured", found.measured, INK, "-"),
        ("simulated", found.simulated, ORANGE, (0, (4, 1.5))),
    )
    with picture_file(path, (9.0, 3.4)) as figure:
        panels = figure.subplots(1, 3, sharey=True)
        for axes, (name, (label, unit, factor, _)) in zip(panels, UNITS.items(), strict=True):
            longest = 0.0
            for run, served, colour, style in looks:
                values = getattr(served, f"{name}_s")
                values = factor * values[~np.isnan(values)]
                if len(values):
                    axes.ecdf(values, lw=1.6, color=colour, ls=style, label=run)
                    longest = max(longest, sorted(values)[int(0.995 * (len(values) - 1))])
            axes.set(title=label, xlabel=unit, xlim=(0, 1.05 * longest), ylim=(0, 1.01))
        panels[0].set_ylabel("share")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
