"""Measure what the gateway costs: the same streams with it and without.

    python -m benchmarks.gateway_load [--json FILE]
    python -m benchmarks.gateway_load --against FOLDER

An endpoint, the gateway and the clients are processes of their own on this machine. The endpoint answers as
an engine does: all streams get a token in the same step, a step every so many milliseconds, and each token
carries the time at which it was sent. Rounds with and without the gateway alternate; clients are closed-loop.
The gateway's limits are out of reach. `--against` takes turns with the gateway of another checkout, such as
`git worktree add ../before main`, and tells how the two compare.
"""

from __future__ import annotations

import asyncio
import json as json_format
import multiprocessing
import os
import re
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from benchmarks._server_process import CHECKOUT, Service, command_of
from llmserve_env.files import write_atomic
from llmserve_env.report.provenance import made_by

_STAMP = re.compile(rb'"text": "([0-9.]+) ')


def gateway_load(
    *,
    streams: int = 100,
    tokens: int = 64,
    step_ms: float = 20.0,
    seconds: float = 10.0,
    rounds: int = 5,
    prompt_bytes: int = 2000,
    against: Path | None = None,
    json: Path | None = None,
) -> None:
    """Measure the gateway's cost.

    Args:
        streams: streams at once.
        tokens: tokens of an answer.
        step_ms: time between two tokens of a stream (ms).
        seconds: length of a round (s).
        rounds: rounds of each kind: without a gateway, with it, with the other checkout's.
        prompt_bytes: size of a prompt.
        against: folder of another checkout, whose gateway is measured in turn with this one's.
        json: file for the figures.
    """
    report: dict[str, Any] = {"made_by": made_by(), "load_before": os.getloadavg()}
    checkouts = {"with": CHECKOUT} | ({} if against is None else {"against": against.resolve()})
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("without", *checkouts)}
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        endpoint = stack.enter_context(_endpoint(context, step_ms / 1e3))
        gateways = {name: stack.enter_context(_gateway(endpoint, each)) for name, each in checkouts.items()}
        for number in tqdm(range(rounds + 1), unit="round"):
            for name in list(found)[:: (1, -1)[number % 2]]:  # each as often before the others as after them
                gateway = gateways.get(name)
                cpu_s = 0.0 if gateway is None else gateway.cpu_s()
                with context.Pool(1) as pool:
                    url = endpoint if gateway is None else gateway.url
                    result = pool.apply(_clients, (url, streams, tokens, seconds, prompt_bytes))
                spent_s = 0.0 if gateway is None else gateway.cpu_s() - cpu_s
                result["gateway_cpu_us"] = 1e6 * spent_s / result.pop("tokens")  # of each token
                if number:  # the first of each warms up
                    found[name].append(result)
    report |= {"rounds": found, "load_after": os.getloadavg()}
    median = {
        name: {key: statistics.median(each[key] for each in results) for key in results[0]}
        for name, results in found.items()
    }
    report["median"] = median
    report["ratio_of_throughput"] = median["with"]["tokens_per_s"] / median["without"]["tokens_per_s"]
    report["added_ms"] = {
        key: median["with"][key] - median["without"][key] for key in median["with"] if key.endswith("_ms")
    }
    print(f"{'':22}{'without':>10}{'with':>10}{'difference':>12}")
    for key, without in median["without"].items():
        print(f"{key:22}{without:10.2f}{median['with'][key]:10.2f}{median['with'][key] - without:12.2f}")
    if against is not None:
        report["ratio"] = {key: value / median["against"][key] for key, value in median["with"].items()}
        print(f"\n{'':22}{'this':>10}{'against':>10}{'ratio':>12}")
        for key, ratio in report["ratio"].items():
            print(f"{key:22}{median['with'][key]:10.2f}{median['against'][key]:10.2f}{ratio:12.3f}")
    print(f"throughput with the gateway: {report['ratio_of_throughput']:.1%} of that without")
    print(
        f"\nmedians of {rounds} rounds of {seconds:g} s, {streams} streams, a token every {step_ms:g} ms; "
        f"{report['made_by']['cpu']}, {os.cpu_count()} cores; load of the machine "
        f"{report['load_before'][0]:.1f} before, {report['load_after'][0]:.1f} after"
    )
    if json is not None:
        write_atomic(json, json_format.dumps(report, indent=1) + "\n")


# -------------------------------------------------------------------------------------------------- processes


@contextmanager
def _endpoint(context: Any, step_s: float) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = context.Process(target=_serve, args=(port, step_s), daemon=True)
    process.start()
    try:
        _wait_for(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.join()


@contextmanager
def _gateway(upstream: str, checkout: Path) -> Iterator[Service]:
    options = ["--upstream", upstream, "--port", "0", "--batch-cap", "512", "--window-s", "3600"]
    process = subprocess.Popen(**command_of(checkout, "llmserve_env", "gateway", *options))
    try:
        assert process.stdout is not None
        yield Service(process.stdout.readline().removeprefix("listening on ").strip(), process.pid)
    finally:
        process.terminate()
        process.wait()


def _wait_for(port: int) -> None:
    until = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def _serve(port: int, step_s: float) -> None:
    """The endpoint: steps as an engine's, for all streams at once."""
    import uvicorn

    steps: list[asyncio.Event] = [asyncio.Event()]

    async def step() -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while True:
            due_s = max(due_s + step_s, loop.time())
            await asyncio.sleep(due_s - loop.time())
            steps.append(asyncio.Event())
            steps.pop(0).set()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            stepping = asyncio.create_task(step())
            await send({"type": "lifespan.startup.complete"})
            await receive()
            stepping.cancel()
            await send({"type": "lifespan.shutdown.complete"})
            return
        if scope["method"] == "GET":  # the gateway asks for metrics, too
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        content, more = b"", True
        while more:
            message = await receive()
            content += message.get("body", b"")
            more = message.get("more_body", False)
        count = json_format.loads(content)["max_tokens"]
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for index in range(count):
            await steps[-1].wait()
            choice = {
                "index": 0,
                "text": f"{time.monotonic():.6f} token",
                "logprobs": None,
                "finish_reason": "length" if index == count - 1 else None,
                "stop_reason": None,
            }
            event = {
                "id": "cmpl-0",
                "object": "text_completion",
                "created": 0,
                "model": "m",
                "choices": [choice],
            }
            body = f"data: {json_format.dumps(event)}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


def _clients(url: str, streams: int, tokens: int, seconds: float, prompt_bytes: int) -> dict[str, float]:
    """Streams one after the other, so many at once."""
    import aiohttp
    import uvloop

    ttft_s: list[float] = []
    passed_s: list[float] = []
    e2e_s: list[float] = []
    body = json_format.dumps(
        {"model": "m", "prompt": "x" * prompt_bytes, "max_tokens": tokens, "stream": True}
    )

    async def client(session: aiohttp.ClientSession, first_s: float, until_s: float) -> None:
        await asyncio.sleep(first_s)
        while time.monotonic() < until_s:
            began_s, first = time.monotonic(), True
            async with session.post("/v1/completions", data=body) as response:
                assert response.status == 200, response.status
                while chunk := await response.content.readany():
                    now_s = time.monotonic()
                    sent = _STAMP.findall(chunk)
                    passed_s.extend(now_s - float(each) for each in sent)
                    if first:
                        ttft_s.append(now_s - began_s)
                        first = False
            e2e_s.append(time.monotonic() - began_s)

    async def main() -> float:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(url, connector=connector) as session:
            began_s = time.monotonic()
            spread_s = np.linspace(0, min(1.0, seconds / 4), streams)
            await asyncio.gather(*(client(session, first_s, began_s + seconds) for first_s in spread_s))
            return time.monotonic() - began_s

    took_s = uvloop.run(main())
    assert len(passed_s) == tokens * len(e2e_s), "tokens were lost"
    quantile = lambda values, q: float(np.quantile(values, q)) * 1e3  # noqa: E731
    return {
        "tokens": len(passed_s),
        "requests_per_s": len(e2e_s) / took_s,
        "tokens_per_s": len(passed_s) / took_s,
        "p50_token_ms": quantile(passed_s, 0.5),  # from its sending to its client
        "p99_token_ms": quantile(passed_s, 0.99),
        "p50_ttft_ms": quantile(ttft_s, 0.5),
        "p99_ttft_ms": quantile(ttft_s, 0.99),
        "p50_e2e_ms": quantile(e2e_s, 0.5),
    }


if __name__ == "__main__":
    tyro.cli(gateway_load)
