"""Measure how far the simulator is from a running vLLM server.

    python -m benchmarks.live_fidelity --url http://127.0.0.1:8101 --iteration-log vllm.log \
        --model-config model/config.json [--json FILE]

Calibrates a profile on the server under closed-loop load (`llmserve calibrate live`), then plays loads that
the calibration has not seen on the server and in the simulator (`llmserve compare`), and holds the errors
against limits. Takes about seven minutes, in which the machine should do nothing else.
docs/live-calibration.md tells how to start the server.
"""

from __future__ import annotations

import json as json_format
import os
import sys
from pathlib import Path
from typing import Any

import tyro

from llmserve_env.commands.calibrate.live import print_fit
from llmserve_env.commands.shared.report import table
from llmserve_env.files import write_atomic
from llmserve_env.hardware import load_profile
from llmserve_env.hardware.model_config import read_model
from llmserve_env.hardware.profile import save_profile
from llmserve_env.live.calibrate.calibration import (
    find_engine_limits,
    fit_profile,
    measure,
    ordinary_tokens,
    report,
)
from llmserve_env.live.calibrate.comparison import compare, simulate
from llmserve_env.live.calibrate.load import Target
from llmserve_env.report.provenance import made_by
from llmserve_env.workloads import open_workload

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_DATA = Path(__file__).parent / "live_fidelity_data"

ITERATION_MEDIAN, ITERATION_TOTAL, LATENCY = 8.0, 5.0, 15.0
"""Limits of the errors: of an iteration's time, of all iterations', of p50 and p99 of latencies (%)."""

HELD = ("p50", "p99")
NAMES = {"ttft": "TTFT", "itl": "ITL", "e2e": "E2E"}


def live_fidelity(
    *,
    url: str,
    iteration_log: Path,
    model_config: Path | None = None,
    profile: Path | None = None,
    save: Path | None = None,
    hardware: str = "unknown",
    minutes: float = 2.5,
    json: Path | None = None,
) -> None:
    """Calibrate on a server, compare on other loads, and say which errors are within their limits.

    Args:
        url: URL of the server.
        iteration_log: file that the server's output goes to.
        model_config: config.json of its model, for a calibration.
        profile: profile made before, in place of a calibration.
        save: file for the profile of the calibration.
        hardware: hardware of the server, in words.
        minutes: time of the calibration (min).
        json: file for all figures.
    """
    found: dict[str, Any] = {"made_by": made_by(), "load_before": os.getloadavg()}
    limits = find_engine_limits(url, iteration_log)
    if profile is not None:
        calibrated = load_profile(profile)
    elif model_config is not None:
        shape = read_model(model_config)
        target = Target(url, limits.model, ordinary_tokens(shape))
        fit = fit_profile(
            measure(target, limits, iteration_log, minutes=minutes), limits, shape, "live", hardware
        )
        calibrated = fit.profile
        print_fit(fit)
        found["calibration"] = report(fit)
        if save is not None:
            save_profile(calibrated, save)
    else:
        raise SystemExit("give --model-config for a calibration, or --profile")
    target = Target(url, limits.model, ordinary_tokens(calibrated.model))
    simulate(
        calibrated, open_workload("poisson://?requests=2&lengths=fixed:8,2")
    )  # not while the server is measured
    loads = tomllib.loads((_DATA / "loads.toml").read_text(encoding="utf-8"))["load"]
    found["loads"] = {}
    for load in loads:
        workload = open_workload(f"{load['uri']}&lengths={_DATA / 'lengths.csv'}")
        found["loads"][load["name"]] = compare(target, limits, calibrated, workload, log=iteration_log).report
        found["loads"][load["name"]]["trace"] = load["uri"]
    found["load_after"] = os.getloadavg()
    _print(found["loads"])
    if json is not None:
        write_atomic(json, json_format.dumps(found, indent=1) + "\n")


def _print(loads: dict[str, Any]) -> None:
    errors: list[tuple[str, float, list[float]]] = []
    every = [each["iterations"]["all"] for each in loads.values()]
    errors.append(("iteration, median error", ITERATION_MEDIAN, [each["median_percent"] for each in every]))
    errors.append(("iterations, total time", ITERATION_TOTAL, [each["bias_percent"] for each in every]))
    for name, label in NAMES.items():
        for q in HELD:
            figures = [each["latency"][name][q]["error_percent"] for each in loads.values()]
            errors.append((f"{label} {q}", LATENCY, figures))
    throughput = [each["tokens_per_s"]["error_percent"] for each in loads.values()]
    rows = [
        [
            label,
            *(f"{value:+.1f}" for value in values),
            f"{limit:g}",
            "yes" if max(map(abs, values)) <= limit else "NO",
        ]
        for label, limit, values in errors
    ]
    rows.append(["throughput", *(f"{value:+.1f}" for value in throughput), "", ""])
    print("\nerrors of the simulator in %\n")
    print(table(["", *loads, "limit", "within"], rows))
    for name, each in loads.items():
        latency = each["latency"]
        told = "; ".join(
            f"{label} " + " and ".join(f"{1e3 * latency[key][q]['measured']:.1f}" for q in HELD)
            for key, label in NAMES.items()
        )
        print(f"\n{name}: {each['requests']} requests, {sum(each['unanswered'].values())} without an answer; "
              f"measured p50 and p99 in ms: {told}")  # fmt: skip


if __name__ == "__main__":
    tyro.cli(live_fidelity)
