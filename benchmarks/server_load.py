"""Measure the service: speed, latency, sessions, memory, abuse.

    python -m benchmarks.server_load [--json FILE]
    python -m benchmarks.server_load --only soak --episodes 100000
    python -m benchmarks.server_load --against FOLDER

It starts the service itself, a new one for each part; clients run in processes of their own on this machine,
and parse every answer. Actions are random ones of the whole schema. `--url` measures a service that runs
already, with the parts that need no watching from outside: one, many. `--against` measures these two of this
checkout and of another one, such as `git worktree add ../before main`, in turn, and tells how they compare.
"""

from __future__ import annotations

import json as json_format
import math
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

from benchmarks import _server_abuse, _server_client
from benchmarks._server_process import Service, started
from llmserve_env import Episode, grade, list_tasks, load_task
from llmserve_env.files import write_atomic
from llmserve_env.report.provenance import made_by
from llmserve_env.schema import ServeAction

Part = Literal["one", "many", "sessions", "soak", "expiry", "killed", "abuse"]
_ALL: tuple[Part, ...] = ("one", "many", "sessions", "soak", "expiry", "killed", "abuse")
_SPEED: tuple[Part, ...] = ("one", "many")
_OTHER = ", other checkout"
Row = tuple[str, str, str]
"""What was measured, the figure, how."""


def server_load(
    *,
    url: str | None = None,
    against: Path | None = None,
    only: tuple[Part, ...] = _ALL,
    runs: int = 5,
    connections: int = 64,
    seconds: float = 20.0,
    sessions: int = 1000,
    episodes: int = 100_000,
    json: Path | None = None,
) -> None:
    """Measure the service.

    Args:
        url: URL of a service that runs (default: one is started for each part).
        against: folder of another checkout, whose service is measured in turn with this one's.
        only: parts to measure.
        runs: repetitions of the speed measurements.
        connections: connections at once, in `many`.
        seconds: time that they play, and four times that of each abuse (s).
        sessions: sessions open at once, in `sessions`.
        episodes: episodes of the test of memory, half of them over one connection.
        json: file for the figures.
    """
    if against is not None and only == _ALL:
        only = _SPEED
    if url is not None and not set(only) <= set(_SPEED):
        raise SystemExit("--url: expected --only one many, what the other parts watch is on this machine")
    if against is not None and (url is not None or not set(only) <= set(_SPEED)):
        raise SystemExit("--against: expected no --url, and no other parts than one and many")
    rows: list[Row] = []
    report: dict[str, Any] = {"made_by": made_by(), "load_before": os.getloadavg(), "parts": {}}
    parts: dict[Part, Callable[[], dict[str, Any]]] = {
        "one": lambda: _one(url, against, runs, rows),
        "many": lambda: _many(url, against, connections=connections, seconds=seconds, runs=runs, rows=rows),
        "sessions": lambda: _sessions(sessions, rows),
        "soak": lambda: _soak(episodes, rows),
        "expiry": lambda: _expiry(rows),
        "killed": lambda: _killed(rows),
        "abuse": lambda: _abuse(seconds / 4, rows),
    }
    for name in tqdm(only, unit="part"):
        report["parts"][name] = parts[name]()
    report["load_after"] = os.getloadavg()
    width = max(len(row[0]) for row in rows)
    for what, figure, how in rows:
        print(f"{what:<{width}}  {figure:>22}  {how}")
    load = "{:.1f} before, {:.1f} after".format(report["load_before"][0], report["load_after"][0])
    print(f"\n{report['made_by']['cpu']}, {os.cpu_count()} cores; load of the machine {load}")
    if json is not None:
        write_atomic(json, json_format.dumps(report, indent=1) + "\n")


@contextmanager
def _services(url: str | None, against: Path | None) -> Iterator[dict[str, Service]]:
    """What is measured, by what is said of it: nothing where it is one service alone."""
    if url is not None:
        _server_client.warm_up(Service(url).ws_url)
        yield {"": Service(url)}
        return
    with ExitStack() as stack:
        services = {"": stack.enter_context(started())}
        if against is not None:
            services[_OTHER] = stack.enter_context(started(checkout=against.resolve()))
        yield services


def _in_turn(
    services: dict[str, Service], runs: int, measured: Callable[[Service, int], dict[str, Any]], what: str
) -> dict[str, list[dict[str, Any]]]:
    """Results of so many runs of each service; each is as often before the others as after them."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in services}
    for run in tqdm(range(runs), desc=what, leave=False):
        for name in list(services)[:: (1, -1)[run % 2]]:
            cpu = services[name].cpu_s()
            result = measured(services[name], run)
            result["server_cpu_s"] = services[name].cpu_s() - cpu
            results[name].append(result)
    return results


def _compared(what: str, results: dict[str, list[dict[str, Any]]], rows: list[Row]) -> None:
    """A line for the ratio of two services, if there are two."""
    if len(results) < 2:
        return
    rates = [statistics.median(_rates(each)) for each in results.values()]
    cpus = [_per_step(each, "server_cpu_s") for each in results.values()]
    rows.append(
        (f"{what}, ratio", f"{rates[0] / rates[1]:.3f}", f"of steps/s; of CPU a step {cpus[0] / cpus[1]:.3f}")
    )


def _rates(results: list[dict[str, Any]]) -> list[float]:
    return [each["windows"] / each["seconds"] for each in results]


def _one(url: str | None, against: Path | None, runs: int, rows: list[Row]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with _services(url, against) as services:
        for together in (1, 50):
            for task in list_tasks():
                episodes = max(1, (1500 if together == 1 else 6000) // load_task(task).windows)

                def measured(
                    service: Service, run: int, task: str = task, n: int = episodes, together: int = together
                ) -> dict[str, Any]:
                    return _server_client.in_process(
                        _server_client.one, service.ws_url, task, n, 1000 * run, together
                    )

                results = _in_turn(services, runs, measured, f"one client, {task}")
                kind = "steps" if together == 1 else f"step_n({together})"
                for name, each in results.items():
                    rates = _rates(each)
                    rows.append(
                        (
                            f"one client, {kind}, {task}{name}",
                            f"{statistics.median(rates):,.0f} steps/s",
                            f"{min(rates):,.0f} to {max(rates):,.0f} in {runs} runs; {_cpu(each)}",
                        )
                    )
                    found[f"{kind} {task}{name}"] = each
                _compared(f"one client, {kind}, {task}", results, rows)
    return found


def _cpu(results: list[dict[str, Any]]) -> str:
    server, client = (_per_step(results, name) for name in ("server_cpu_s", "client_cpu_s"))
    return f"CPU a step: server {server:.0f} us, client {client:.0f} us"


def _per_step(results: list[dict[str, Any]], name: str) -> float:
    return statistics.median(1e6 * each[name] / each["windows"] for each in results)


def _many(
    url: str | None,
    against: Path | None,
    *,
    connections: int,
    seconds: float,
    runs: int,
    rows: list[Row],
) -> dict[str, Any]:
    def measured(service: Service, run: int) -> dict[str, Any]:
        result = _server_client.in_process(
            _server_client.many, service.ws_url, connections, seconds, 1_000_000 * run
        )
        for name in ("steps_s", "resets_s"):
            latencies = np.array(result.pop(name)) * 1e3
            result[name.replace("_s", "_ms")] = {
                "p50": float(np.quantile(latencies, 0.5)),
                "p99": float(np.quantile(latencies, 0.99)),
                "max": float(latencies.max()),
                "count": len(latencies),
            }
        return result

    with _services(url, against) as services:
        found = _in_turn(services, runs, measured, f"{connections} connections")
    what = f"{connections} connections, all tasks in turn"
    for name, results in found.items():
        rates = _rates(results)
        p99s = [each["steps_ms"]["p99"] for each in results]
        median = {
            which: statistics.median(each["steps_ms"][which] for each in results)
            for which in ("p50", "p99", "max")
        }
        rows.append(
            (
                f"{what}{name}",
                f"{statistics.median(rates):,.0f} steps/s",
                f"{min(rates):,.0f} to {max(rates):,.0f} in {runs} runs of {seconds:g} s; {_cpu(results)}",
            )
        )
        rows.append(
            (
                f"{what}{name}, latency of a step",
                f"p50 {median['p50']:.0f}, p99 {median['p99']:.0f} ms",
                f"p99 {min(p99s):.0f} to {max(p99s):.0f} ms, longest {median['max']:.0f} ms",
            )
        )
    _compared(what, found, rows)
    own = {"runs": found[""]}
    return own if against is None else own | {"against": found[_OTHER]}


def _sessions(count: int, rows: list[Row]) -> dict[str, Any]:
    """Grades of as many sessions at once as `count`, against those of the same actions here."""
    context = multiprocessing.get_context("spawn")
    with started("--max-sessions", str(count)) as service:
        before = service.rss_mb()
        queue, goes_on, result = context.Manager().Queue(), context.Manager().Event(), []
        pool = _server_client.ProcessPoolExecutor(1, context)
        begun = time.perf_counter()
        future = pool.submit(_server_client.sessions, service.url, count, queue, goes_on)
        _wait(queue, future, "half")
        during = service.rss_mb()
        goes_on.set()
        _wait(queue, future, "graded")
        seconds = time.perf_counter() - begun
        graded = service.rss_mb()
        goes_on.set()
        result = future.result()
        pool.shutdown()
        time.sleep(33.0)  # memory is given back every 30 s
        after = service.rss_mb()
    wrong = [
        number
        for number in tqdm(range(count), desc="replaying here", leave=False)
        if result[number] != _here(number)
    ]
    different = len({each["score"] for each in result})
    rows.append(
        (
            f"{count:,} sessions at once, 40 windows each",
            f"{count - len(wrong):,} of {count:,} grades right",
            f"every field equal to a replay here; {different:,} different scores; took {seconds:.0f} s",
        )
    )
    rows.append(
        (
            f"memory with {count:,} sessions in mid-episode",
            f"{(during - before) * 1024 / count:.0f} KB a session",
            f"server {before:.0f} MB before, {during:.0f} with them, {graded:.0f} graded, {after:.0f} after",
        )
    )
    return {
        "wrong": wrong,
        "seconds": seconds,
        "rss_mb": {"before": before, "during": during, "graded": graded, "after": after},
    }


def _wait(queue: Any, future: Any, expected: str) -> None:
    while queue.empty():
        if future.done():
            future.result()
        time.sleep(0.05)
    assert queue.get() == expected


def _here(number: int) -> dict[str, Any]:
    begun, actions = _server_client.episode_of(number)
    episode = Episode(load_task(begun["task_id"], horizon_s=begun["horizon_s"]))
    episode.reset(begun["seed"])
    for action in actions:
        if not episode.done:
            episode.step(ServeAction(**action))
    return grade(episode.log()).model_dump(mode="json")


def _soak(episodes: int, rows: list[Row]) -> dict[str, Any]:
    found = {}
    for reconnect in (False, True):
        with started() as service:
            samples, half, each = [], episodes // 2, max(1, episodes // 20)
            begun = time.perf_counter()
            _server_client.in_process(_server_client.soak, service.ws_url, 200, 0, reconnect)
            samples.append((0, service.rss_mb()))
            for first in tqdm(range(0, half, each), desc="episodes", leave=False):
                _server_client.in_process(_server_client.soak, service.ws_url, each, first, reconnect)
                samples.append((first + each, service.rss_mb()))
            seconds = time.perf_counter() - begun
        # The allocator finds its size in the first fifth; from there on a leak would be a slope.
        late = np.array(samples[len(samples) // 5 :])
        slope = float(np.polyfit(late[:, 0], late[:, 1] * 1024, 1)[0]) if len(late) > 1 else math.nan
        kind = "a connection each" if reconnect else "one connection"
        rows.append(
            (
                f"{half:,} episodes, {kind}",
                f"{slope * 1000:+.1f} KB per 1,000",
                f"server {samples[0][1]:.1f} MB after 200, {samples[-1][1]:.1f} at the end; 5 windows each, "
                f"all tasks in turn; {seconds:.0f} s",
            )
        )
        found[kind] = {"rss_mb": samples, "kb_per_1000": slope * 1000, "seconds": seconds}
    return found


def _expiry(rows: list[Row]) -> dict[str, Any]:
    count, timeout_s = 500, 8.0
    with started("--session-timeout-s", str(timeout_s)) as service:
        before = service.rss_mb()
        _server_client.in_process(_server_client.open_over_http, service.url, count)
        names: list[str] = []
        # Again, to see whether the second lot takes the memory of the first.
        time.sleep(1.6 * timeout_s)
        freed = service.rss_mb()
        names = _server_client.in_process(_server_client.open_over_http, service.url, count)
        used = time.monotonic()
        during = service.rss_mb()
        still = service.get("/state", names[-1])
        while service.get("/state", names[-1]) == 200:
            time.sleep(0.05)
        took = time.monotonic() - used
        gone = sum(service.get("/state", name) == 404 for name in names)
        time.sleep(timeout_s / 2)
        after = service.rss_mb()
    rows.append(
        (
            f"{count} sessions that nobody uses for {timeout_s:g} s",
            f"{gone} closed",
            f"the last after {took:.1f} s (swept every {timeout_s / 4:g} s); server {before:.0f} MB before, "
            f"{freed:.0f} after a first lot, {during:.0f} with a second, {after:.0f} after it",
        )
    )
    return {
        "closed": gone,
        "open_at_first": still == 200,
        "last_after_s": took,
        "rss_mb": {"before": before, "after_first": freed, "during": during, "after": after},
    }


def _killed(rows: list[Row]) -> dict[str, Any]:
    count = 100
    context = multiprocessing.get_context("spawn")
    with started("--max-sessions", str(count)) as service:
        before = service.rss_mb()
        ready = context.Queue()
        with _server_client.beside(_server_client.hold, service.ws_url, count, ready) as process:
            pid = ready.get(timeout=120)
            during = service.rss_mb()
            assert pid == process.pid
            os.kill(pid, signal.SIGKILL)
            seconds = _server_client.in_process(_server_client.occupy, service.ws_url, count)
        after = service.rss_mb()
    rows.append(
        (
            f"client with {count} connections killed",
            f"{count} sessions freed",
            f"{seconds:.1f} s until {count} others had sessions, the most allowed; a step_n was under way "
            f"in each; server {before:.0f} MB before, {during:.0f} with them, {after:.0f} after",
        )
    )
    return {"seconds": seconds, "rss_mb": {"before": before, "during": during, "after": after}}


def _abuse(seconds: float, rows: list[Row]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    context = multiprocessing.get_context("spawn")
    with started("--guard-timeout-s", "3") as service, _server_client.ProcessPoolExecutor(2, context) as pool:
        for name, abuse in tqdm({"nothing": None, **_server_abuse.ABUSES}.items(), desc="abuse", leave=False):
            probing = pool.submit(_server_client.probe, service.ws_url, seconds + 1.0)
            time.sleep(0.5)
            answers = {} if abuse is None else pool.submit(abuse, service.url, seconds).result()
            latencies = np.array(probing.result()) * 1e3
            rss = service.rss_mb()
            p50, p99 = np.quantile(latencies, [0.5, 0.99])
            told = ", ".join(f"{count} x {answer}" for answer, count in answers.items())
            rows.append(
                (
                    f"another client's step beside {name}",
                    f"p50 {p50:.1f}, p99 {p99:.0f} ms",
                    f"longest {latencies.max():.0f} ms of {len(latencies):,}; server {rss:.0f} MB; {told}",
                )
            )
            found[name] = {
                "answers": answers,
                "p50_ms": float(p50),
                "p99_ms": float(p99),
                "max_ms": float(latencies.max()),
                "rss_mb": rss,
            }
        found["health_after"] = service.get("/health")
    return found


if __name__ == "__main__":
    tyro.cli(server_load)
