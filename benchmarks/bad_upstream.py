"""Measure how a gateway bears a bad upstream beside a good one, by kind.

    python -m benchmarks.bad_upstream [--kinds 500 hang] [--json FILE]

The gateway is a process of its own; both upstreams and the clients are here. Clients are closed-loop and send
their requests one after the other; a request is served that has a whole answer. Then the bad upstream becomes
well, and requests go on until it gets its share again.
"""

from __future__ import annotations

import asyncio
import json as json_format
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from llmserve_env.files import write_atomic
from llmserve_env.report.provenance import made_by
from tests.live.gateway.bad_server import KINDS, BadServer, answer

FIRST = 20
"""Requests that may fail: until then nothing can be known."""
FROZEN = b"""# TYPE vllm:num_requests_running gauge
vllm:num_requests_running 3
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc 0.25
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total 1000
"""
"""Metrics of an engine that stands still."""


@dataclass
class Found:
    """What came of a kind.

    Attributes:
        kind: how the upstream failed.
        served: share of the requests that were served, but for the first ones.
        first_served: share of the first ones.
        slowest_s: time of the slowest served request (s).
        out_s: time until the bad upstream was out (s); None where it never was.
        back_s: time from being well to getting requests again (s).
    """

    kind: str
    served: float
    first_served: float
    slowest_s: float
    out_s: float | None
    back_s: float


def bad_upstream(
    *,
    kinds: tuple[str, ...] = (*KINDS, "frozen"),
    requests: int = 2000,
    at_once: int = 10,
    pause_ms: float = 30.0,
    json: Path | None = None,
) -> None:
    """Measure how one bad upstream of two is borne.

    Args:
        kinds: kinds of failure, of those that `tests/live/gateway/bad_server.py` knows, and "frozen".
        requests: requests of a kind.
        at_once: clients.
        pause_ms: time that an answer takes (ms).
        json: file for the figures.
    """
    found = [asyncio.run(_measured(kind, requests, at_once, pause_ms / 1e3)) for kind in kinds]
    print(f"{'kind':20}{'served':>9}{'of the first':>14}{'slowest':>10}{'out after':>11}{'back after':>12}")
    for each in found:
        out = "-" if each.out_s is None else f"{each.out_s:.1f} s"
        print(
            f"{each.kind:20}{each.served:9.2%}{each.first_served:14.0%}{each.slowest_s:8.1f} s{out:>11}"
            f"{each.back_s:10.1f} s"
        )
    if json is not None:
        report = {"made_by": made_by(), "requests": requests, "kinds": [vars(each) for each in found]}
        write_atomic(json, json_format.dumps(report, indent=1) + "\n")


async def _measured(kind: str, requests: int, at_once: int, pause_s: float) -> Found:
    import aiohttp

    mode = "hang" if kind == "frozen" else kind
    async with BadServer(pause_s=pause_s) as bad, BadServer(pause_s=pause_s) as good:
        if kind == "frozen":
            bad.health = answer(200, FROZEN, b"text/plain")
        await bad.become(mode)
        command = [sys.executable, "-m", "llmserve_env", "gateway", "--port", "0", "--window-s", "3600"]
        process = subprocess.Popen(
            [*command, "--upstream", bad.url, "--upstream", good.url],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            assert process.stdout is not None
            said = await asyncio.to_thread(process.stdout.readline)
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(said.split()[-1], connector=connector) as client:
                return await _served(kind, client, bad, requests, at_once)
        finally:
            process.terminate()
            await asyncio.to_thread(process.communicate)


async def _served(kind: str, client: Any, bad: BadServer, requests: int, at_once: int) -> Found:
    numbers = iter(range(requests))
    whole: dict[int, bool] = {}
    slowest_s, out_s, began_s = 0.0, None, time.monotonic()

    async def ask() -> bool:
        async with client.post("/v1/completions", json={"prompt": "p", "stream": True}) as response:
            return response.status == 200 and (await response.read()).endswith(b"[DONE]\n\n")

    async def state() -> str:
        async with client.get("/health") as response:
            return str((await response.json())["upstreams"][0]["state"])

    async def send() -> None:
        nonlocal slowest_s
        for number in numbers:
            sent_s = time.monotonic()
            whole[number] = await ask()
            if whole[number]:
                slowest_s = max(slowest_s, time.monotonic() - sent_s)

    async def watch() -> None:
        nonlocal out_s
        while await state() != "ejected":
            await asyncio.sleep(0.05)
        out_s = time.monotonic() - began_s

    watching = asyncio.create_task(watch())
    clients = [asyncio.create_task(send()) for _ in range(at_once)]
    # What had begun when its upstream stopped ends at the idle timeout, for which nobody waits here.
    await asyncio.wait(clients, timeout=60 + requests / 20)
    if out_s is None and await state() == "ejected":
        out_s = time.monotonic() - began_s
    for task in (*clients, watching):
        task.cancel()
    await asyncio.gather(*clients, watching, return_exceptions=True)
    await bad.become("well")
    bad.health = answer(200)
    well_s = time.monotonic()
    while await state() != "well":
        await ask()
    back_s = time.monotonic() - well_s
    later = [whole.get(number, False) for number in range(FIRST, requests)]
    first = [whole.get(number, False) for number in range(FIRST)]
    return Found(kind, sum(later) / len(later), sum(first) / FIRST, slowest_s, out_s, back_s)


if __name__ == "__main__":
    tyro.cli(bad_upstream)
