"""`llmserve calibrate live`: a profile of a running vLLM server."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from llmserve_env.errors import InputError

if TYPE_CHECKING:
    from llmserve_env.live.calibrate.calibration import Fit


def live(
    *,
    url: str,
    model_config: Path,
    out: Path,
    iteration_log: Path | None = None,
    name: str | None = None,
    model: str | None = None,
    hardware: str = "unknown",
    minutes: float = 3.0,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int | None = None,
    async_scheduling: bool | None = None,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    picture: Path | None = None,
) -> None:
    """Fit a profile to a running vLLM server, which should have nothing else to do meanwhile.

    Puts it under closed-loop load at several concurrencies and lengths, prints how far the fit is from what
    was measured, and writes the profile. A key is taken from OPENAI_API_KEY.

    Args:
        url: URL of the server, with or without /v1.
        model_config: config.json of the model that it serves.
        out: the TOML file to write.
        iteration_log: the file that the server's output goes to, where it was started with
            --enable-logging-iteration-details; without it the fit rests on client timings.
        name: name of the profile (default: the output file's).
        model: name of the model at the server (default: the first that it lists).
        hardware: hardware of the server, in words.
        minutes: time under load (min).
        max_num_seqs: running sequences that the server was started for (default: its log's, else vLLM's).
        max_num_batched_tokens: token budget of an iteration, likewise.
        async_scheduling: whether the server decides a batch while one runs (default: its log's, else yes).
        json_file: file for the figures of the fit, as JSON.
        picture: picture of predicted against measured iterations (png, svg or pdf).

    Raises:
        InputError: the server, its log or a file cannot be used.
    """
    from llmserve_env.commands.shared.report import check_outputs, write_json
    from llmserve_env.hardware.model_config import read_model
    from llmserve_env.hardware.profile import save_profile
    from llmserve_env.live.calibrate.calibration import (
        find_engine_limits,
        fit_profile,
        measure,
        ordinary_tokens,
        report,
    )
    from llmserve_env.live.calibrate.load import Target
    from llmserve_env.report.figures import check_suffix
    from llmserve_env.report.provenance import made_by

    outputs = {"out": out, "json": json_file, "picture": picture}
    check_outputs(outputs, model_config=model_config, iteration_log=iteration_log)
    if picture is not None:
        check_suffix(picture)
    if not minutes > 0:
        raise InputError(f"expected more than 0, found {minutes}", field="minutes")
    shape = read_model(model_config)
    key = os.environ.get("OPENAI_API_KEY")
    limits = find_engine_limits(
        url,
        iteration_log,
        model=model,
        api_key=key,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        async_scheduling=async_scheduling,
    )
    print(
        f"{limits.model}: {limits.max_num_seqs} sequences, {limits.max_num_batched_tokens:,} tokens an "
        f"iteration, {limits.kv_tokens:,} KV tokens ({limits.told})",
        flush=True,
    )
    target = Target(url, limits.model, ordinary_tokens(shape), key)
    phases = measure(
        target,
        limits,
        iteration_log,
        minutes=minutes,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    fit = fit_profile(phases, limits, shape, name or out.stem, hardware)
    save_profile(fit.profile, out)
    print_fit(fit)
    print(f"wrote {out}")
    if json_file is not None:
        write_json(json_file, {"made_by": made_by(), **report(fit)})
    if picture is not None:
        _draw(fit, picture)


def print_fit(fit: Fit) -> None:
    """Print how far a profile is from what it was fitted to."""
    from llmserve_env.commands.shared.report import table

    rows = [
        [
            name,
            f"{each.points:,}",
            *(f"{value:.1f}" for value in (each.median_percent, each.p90_percent)),
            f"{each.bias_percent:+.1f}",
        ]
        for name, each in fit.regimes.items()
    ]
    print(f"\n{fit.profile.latency.source}\n")
    print(table(["batches", "number", "median error %", "p90 %", "total time %"], rows))
    server = fit.profile.server
    if server is not None:
        print(
            f"\nbeside the iterations: {server.step_us / 1e3:.2f} ms between two, and "
            f"{server.sequence_us:.0f} us more for each sequence; {server.request_us / 1e3:.2f} ms between "
            "client and engine"
        )


def _draw(fit: Fit, path: Path) -> None:
    from llmserve_env.report.figures import BLUE, GREY, ORANGE, picture_file

    prefill = fit.iterations.prefill_tokens > 0
    measured_ms, predicted_ms = 1e3 * fit.iterations.elapsed_s, 1e3 * fit.predicted_s
    with picture_file(path, (5.0, 4.6)) as figure:
        axes = figure.subplots()
        for which, colour, label in ((~prefill, BLUE, "decode"), (prefill, ORANGE, "with prefill")):
            axes.plot(
                measured_ms[which], predicted_ms[which], ".", ms=2, alpha=0.4, color=colour, label=label
            )
        ends = (0.5 * float(predicted_ms.min()), 2 * float(predicted_ms.max()))
        axes.plot(ends, ends, color=GREY, lw=1)
        axes.set(xlim=ends, ylim=ends)
        axes.set(
            xscale="log", yscale="log", xlabel="measured (ms)", ylabel="predicted (ms)", title="Iterations"
        )
        axes.legend(markerscale=5)
