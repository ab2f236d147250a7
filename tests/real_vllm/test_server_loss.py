"""A real vLLM that freezes, is killed and comes back: what clients, agent and telemetry see of it.

The last test leaves no server behind, so that none after it has to start another one.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from contextlib import AsyncExitStack

import aiohttp

from llmserve_env.live.servers.engine_settings import EngineSettings, read_settings
from llmserve_env.live.servers.fault import Cause
from llmserve_env.live.servers.telemetry import Telemetry
from llmserve_env.schema import ServeAction

from ._gateway import (
    DONE,
    ask,
    ended_in,
    failures,
    gateway_process,
    held,
    last_event,
    scraped,
    standing,
    stream,
    tokens_of,
    until,
)  # fmt: skip
from .conftest import START_S, STEP_S

LOST_S = 10.0
"""Time after which a server that does not answer is taken for lost (s)."""


async def well(here):
    async with here.client.get("/health") as response:
        told = (await response.json())["well"]
        assert response.status == (200 if told else 503)
    return told


def test_a_frozen_server_is_told_and_serves_on_when_it_thaws(server):
    async def main():
        async with standing(server, lost_after_s=LOST_S) as here:
            async with held(here) as begun:
                await until(lambda: here.replica.last.gauges["running"] == 1)
                server.signal(signal.SIGSTOP)
                try:
                    asked = asyncio.create_task(ask(here, stream("frozen", 4)))
                    await until(lambda: len(here.gateway._at_upstreams) == 2)
                    await until(lambda: here.deployment.stale is not None)
                    # Only now is anybody in a hurry: what comes from the server comes from there at once.
                    limits = here.gateway._watch
                    limits.idle_timeout_s = limits.first_byte_timeout_s = 1.0
                    assert here.gateway.kv_usage(here.gateway.upstreams[0]) is None
                    here.deployment.window()
                    assert {"preemptions", "kv_cache_occupancy"} <= set(here.deployment.unmeasured)
                    (told,) = here.deployment.telemetry.windows()
                    assert (told.stale, told.running, told.output_tokens) == (1, None, None)
                    while await well(here):  # two answers of /health that do not come
                        pass
                    assert await ended_in(begun) == 504
                    status, _, body = await asked
                    assert (status, json.loads(body)["error"]["code"]) == (504, 504)
                    assert failures(here) == {"upstream silent": 2}
                    limits.idle_timeout_s = limits.first_byte_timeout_s = START_S
                finally:
                    server.signal(signal.SIGCONT)
            await until(lambda: here.deployment.stale is None)
            assert tokens_of(await ask(here, stream("thawed", 8))) == 8
            # What was cut off is over there, too.
            await until(lambda: server.metric("num_requests_running") == 0)
            here.replica.stale_after_s = START_S
            await scraped(here)
            (told,) = here.deployment.telemetry.windows()
            assert (told.stale, told.restarts) == (0, 0)
            while not await well(here):
                pass

    asyncio.run(main())


def test_a_frozen_engine_is_silent_until_it_thaws(server):
    """Its API server goes on answering, with the figures of the last moment."""

    async def main():
        async with standing(server) as here:
            (upstream,) = here.gateway.upstreams
            async with held(here) as begun:
                await until(lambda: here.replica.last.gauges["running"] == 1)
                os.kill(server.status().pid, signal.SIGSTOP)
                try:
                    asked = asyncio.create_task(ask(here, stream("frozen", 4)))
                    await until(lambda: here.deployment.stale is not None)
                    assert upstream.health.cause is Cause.SILENT
                    assert here.replica.error is None  # it shows its metrics
                    assert not await well(here)
                finally:
                    os.kill(server.status().pid, signal.SIGCONT)
                await until(lambda: here.deployment.stale is None)
                assert await well(here)
                assert tokens_of(await asked) == 4
                begun.close()
            here.deployment.window()
            assert here.deployment.excused <= 2  # and whether it was late is up to the machine

    asyncio.run(main())


def test_a_server_killed_under_an_agent_comes_back(server, tmp_path):
    """`llmserve gateway` with an agent, and kill -9 of all of vLLM in the middle of streams."""
    found = EngineSettings(batch_cap=6)
    log = tmp_path / "decisions.jsonl"
    flags = ["--agent", "reactive", "--task", "static_workload", "--decisions", str(log), "--window-s", "1"]

    def decisions():
        lines = map(json.loads, log.read_text().splitlines()) if log.exists() else ()
        return [line["decision"] for line in lines if line["kind"] == "decision"]

    async def main():
        telemetry = Telemetry([server.url], interval_s=0.2, timeout_s=STEP_S, stale_after_s=START_S)
        async with (
            aiohttp.ClientSession(here.url, timeout=aiohttp.ClientTimeout(START_S)) as here.client,
            telemetry,
        ):
            assert tokens_of(await ask(here, stream("before", 8))) == 8
            await until(lambda: any(each["proposed"] for each in decisions()))
            await until(lambda: server.status().asked != found)  # the agent has the engine
            async with AsyncExitStack() as clients:
                begun = [await clients.enter_async_context(held(here, seed)) for seed in range(4)]
                telemetry.windows()
                server.kill()
                assert [await ended_in(each) for each in begun] == 4 * [502]
                status, headers, body = await ask(here, stream("down", 4))
                assert (status, json.loads(body)["error"]["code"]) == (503, 503)
                assert int(headers["retry-after"]) >= 1
                async with here.client.get("/health") as response:
                    assert response.status == 503
                await until(lambda: any(each["rule"] == "stale" for each in decisions()))
                await until(lambda: telemetry.replicas[0].error)

            down = len(decisions())
            server.launch()
            await asyncio.to_thread(server.wait_ready)
            await until(lambda: telemetry.replicas[0].error is None)
            (told,) = telemetry.windows()
            assert told.restarts == 1
            answers = await asyncio.gather(*(ask(here, stream(seed, 16)) for seed in range(6)))
            assert [tokens_of(each) for each in answers] == 6 * [16]
            await until(lambda: server.metric("request_success_total") == 6)
            now_s = time.monotonic()
            await until(lambda: telemetry.replicas[0].last.at_s > now_s)
            (told,) = telemetry.windows()
            assert (told.output_tokens, told.finished["length"], told.restarts) == (6 * 16, 6, 0)
            await until(lambda: any(each["rule"] != "stale" for each in decisions()[down:]))

    server.set(batch_cap=6)
    with gateway_process(server, tmp_path, *flags) as here:
        asyncio.run(main())
    assert here.process.returncode == 0, here.out()
    assert read_settings(server.control) == found


def test_an_engine_that_dies_ends_streams_with_the_server_s_error(server):
    async def main():
        async with standing(server, ServeAction(batch_cap=8)) as here, AsyncExitStack() as clients:
            begun = [await clients.enter_async_context(held(here, seed)) for seed in range(3)]
            os.kill(server.status().pid, signal.SIGKILL)
            for each in begun:
                rest = await each.read()
                events = rest.removesuffix(DONE)
                assert last_event(events)["error"]["code"] == 500, rest[-500:]
            assert failures(here) == {"error in the stream": 3}
            await asyncio.to_thread(server.process.wait, STEP_S)
            assert (await ask(here, stream("after", 4)))[0] == 503

    asyncio.run(main())
    server.kill()
