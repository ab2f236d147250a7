"""`llmserve bench`: how fast the simulator is, and what it needs."""

from __future__ import annotations

import json as json_format
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llmserve_env import load_profile, load_task, open_workload
from llmserve_env.commands.shared.report import check_outputs, write_json
from llmserve_env.errors import InputError
from llmserve_env.report.provenance import made_by

_GENERATED = "mmpp://?preset=azure-conv&requests=20000"
_SIZES = (10_000, 1_000_000, 10_000_000)
_CELLS = (1, 4, 16, 64)
_CELL_REQUESTS = 20_000
_ENVIRONMENTS = ((1, 1), (64, 1), (64, 2), (256, 1), (256, 2))
"""Copies and threads of the environments that are stepped."""


def bench(
    *,
    trace: str = _GENERATED,
    profile: str = "h100-llama-3.1-8b",
    requests: tuple[int, ...] = _SIZES,
    task: str = "static_workload",
    runs: int = 5,
    json: Path | None = None,
) -> None:
    """Measure the simulator (requests/s, cells of several engines, start-up, memory) and the environments.

    Each figure is the median over runs; each size has a process of its own and one serial kernel call, every
    request recorded. The project's published figures replay the public Azure conversation trace
    (AzureLLMInferenceTrace_conv.csv of Azure/AzurePublicDataset); without a trace, arrivals and lengths are
    generated with its statistics.

    The environments take vLLM's default action in every step, resets included.

    Args:
        trace: a trace file or workload URI, repeated end to end to each number of requests.
        profile: hardware and model.
        requests: numbers of requests to serve.
        task: task whose environments are stepped.
        runs: repetitions of each measurement.
        json: file for the figures.
    """
    check_outputs({"json": json}, trace=trace, profile=profile, task=task)
    if runs < 1:
        raise InputError(f"expected 1 or more, found {runs}", field="runs")
    if min(requests, default=1) < 1:
        raise InputError(f"expected 1 or more, found {min(requests)}", field="requests")
    load_profile(profile)
    load_task(task)
    open_workload(trace)
    report: dict[str, Any] = {"made_by": made_by(), "profile": profile, "runs": runs}
    worker = [sys.executable, "-m", "llmserve_env.commands.bench"]
    with tqdm(
        total=3 + len(requests) + len(_CELLS) + len(_ENVIRONMENTS), unit="measurement", leave=False
    ) as progress:
        report["import_s"] = _median(
            runs, [sys.executable, "-c", "import llmserve_env"], less=_interpreter(runs)
        )
        progress.update()
        with tempfile.TemporaryDirectory() as empty:
            report["first_result_cold_s"] = _elapsed(
                [*worker, "first", profile], stderr=subprocess.DEVNULL, NUMBA_CACHE_DIR=empty
            )
        progress.update()
        _elapsed([*worker, "first", profile])
        report["first_result_warm_s"] = _median(runs, [*worker, "first", profile])
        progress.update()
        report["replay"] = []
        for count in requests:
            report["replay"].append(_said([*worker, "replay", profile, trace, str(count), "1", str(runs)]))
            progress.update()
        report["cells"] = []
        for engines in _CELLS:
            command = [*worker, "replay", profile, trace, str(_CELL_REQUESTS), str(engines), str(runs)]
            report["cells"].append(_said(command))
            progress.update()
        report["task"], report["environments"] = task, []
        for copies, threads in _ENVIRONMENTS:
            report["environments"].append(
                _said([*worker, "step", task, str(copies), str(threads), str(runs)])
            )
            progress.update()
    print(_table(report))
    if json is not None:
        write_json(json, report)


def _table(report: dict[str, Any]) -> str:
    lines = [f"{'requests':>12}{'requests/s':>14}{'iterations/s':>14}{'ns/request':>12}{'peak memory':>13}"]
    for row in report["replay"]:
        rates = f"{row['requests_per_s']:14,.0f}{row['iterations_per_s']:14,.0f}{row['ns_per_request']:12.0f}"
        lines.append(f"{row['requests']:12,}{rates}{row['peak_memory_mb']:10,.0f} MB")
    lines += ["", f"{'engines':>12}{'ns/request':>14}   the same requests to one cell"]
    for row in report["cells"]:
        lines.append(f"{row['engines']:12,}{row['ns_per_request']:14.0f}")
    lines += ["", f"{'copies':>12}{'threads':>10}{'steps/s':>12}   {report['task']}"]
    for row in report["environments"]:
        lines.append(f"{row['copies']:12,}{row['threads']:10}{row['steps_per_s']:12,.0f}")
    lines += [
        "",
        f"import llmserve_env       {report['import_s']:7.3f} s",
        f"first result, cold cache  {report['first_result_cold_s']:7.2f} s",
        f"first result, warm cache  {report['first_result_warm_s']:7.2f} s",
        "\n{cpu}, Python {python}; one core unless threads are named".format(**report["made_by"]),
    ]
    return "\n".join(lines)


def _said(command: list[str]) -> dict[str, float]:
    """What a worker printed."""
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    said: dict[str, float] = json_format.loads(ran.stdout)
    return said


def _elapsed(command: list[str], *, stderr: int | None = None, **environment: str) -> float:
    start = time.perf_counter()
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, stderr=stderr, env={**os.environ, **environment}
    )
    return time.perf_counter() - start


def _median(runs: int, command: list[str], less: float = 0.0) -> float:
    return max(0.0, statistics.median(_elapsed(command) for _ in range(runs)) - less)


def _interpreter(runs: int) -> float:
    """Seconds that Python takes to start and import nothing."""
    return _median(runs, [sys.executable, "-c", "pass"])


def _first(profile: str) -> None:
    """The shortest way from a cold process to a simulated result."""
    from llmserve_env import Simulator

    Simulator(load_profile(profile), open_workload("poisson://?rate=4&requests=100&seed=0")).serve_out()


def _replay(profile: str, trace: str, requests: int, engines: int, runs: int) -> dict[str, float]:
    """Serve a workload of `requests` requests `runs` times on a cell; time covers the kernel call alone."""
    import resource

    from llmserve_env import ServeAction, Simulator

    hardware = load_profile(profile)
    workload = open_workload(trace).tiled(requests)
    Simulator(
        hardware, workload.tiled(100), engines=engines
    ).serve_out()  # compiles, or loads what is compiled
    seconds = []
    record = None
    for _ in range(runs):
        simulator = Simulator(hardware, workload, engines=engines)
        start = time.perf_counter()
        record = simulator.serve(ServeAction(), float("inf"))
        seconds.append(time.perf_counter() - start)
        simulator.outcomes()
        del simulator
    assert record is not None
    median = statistics.median(seconds)
    return {
        "requests": requests,
        "engines": engines,
        "iterations": record.iterations,
        "seconds": median,
        "requests_per_s": requests / median,
        "iterations_per_s": record.iterations / median,
        "ns_per_request": median / requests * 1e9,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _step(task: str, copies: int, threads: int, runs: int) -> dict[str, float]:
    """Play episodes of a task from reset to reset `runs` times; one copy is the single environment."""
    import gymnasium as gym
    import numpy as np

    from llmserve_env import ServeAction, load_task
    from llmserve_env.controls import to_array

    start = load_task(task)
    action = start.grid.indices(to_array([ServeAction()]))
    environment: Any
    if copies == 1:
        environment = gym.make("LLMServe-v0", task_id=task)
        actions = action[0]
    else:
        environment = gym.make_vec("LLMServe-v0", num_envs=copies, task_id=task, threads=threads)
        actions = np.repeat(action, copies, axis=0)
    environment.reset(seed=0)
    seconds = []
    for episode in range(runs + 1):
        begun = time.perf_counter()
        for _ in range(start.windows):
            environment.step(actions)
        if copies == 1:
            environment.reset()
        if episode:  # the first compiles, or loads what is compiled
            seconds.append(time.perf_counter() - begun)
    median = statistics.median(seconds)
    return {"copies": copies, "threads": threads, "steps_per_s": start.windows * copies / median}


if __name__ == "__main__":
    try:
        if sys.argv[1] == "first":
            _first(sys.argv[2])
        elif sys.argv[1] == "step":
            print(json_format.dumps(_step(sys.argv[2], *(int(each) for each in sys.argv[3:6]))))
        else:
            print(
                json_format.dumps(_replay(sys.argv[2], sys.argv[3], *(int(each) for each in sys.argv[4:7])))
            )
    except KeyboardInterrupt:  # the command that started this one says so
        sys.exit(130)
