"""A gateway before the real vLLM: in the test's own event loop, or as a process."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from types import SimpleNamespace

import aiohttp

from llmserve_env.live.gateway.callers import Caller, Callers
from llmserve_env.live.gateway.deployment import Deployment
from llmserve_env.live.gateway.gateway import Gateway
from llmserve_env.live.gateway.proxy import Proxy
from llmserve_env.live.servers.telemetry import Telemetry
from llmserve_env.live.servers.upstreams import Upstream
from tests.live.endpoint_server import Running

from .conftest import ROOT, START_S, STEP_S, TRIES, completion, prompt, wait_for

CALLERS = (
    Caller(name="paid", key="k-paid", priority=0),
    Caller(name="free", key="k-free", priority=5),
    Caller(name="other", priority=9),
)
DONE = b"data: [DONE]\n\n"
LONG = 1900
"""Tokens of an answer that is there for as long as it is wanted."""


@asynccontextmanager
async def standing(server, action=None, *, url=None, control=True, lost_after_s=START_S):
    """A gateway before the server, with a client of it; `deployment` steers and watches both.

    Nobody in it loses patience: how long anything takes is the machine's.
    """
    async with AsyncExitStack() as stack:
        tenants = Callers(CALLERS)
        upstream = Upstream(url or server.url, control=server.control if control else None)
        gateway = Gateway([upstream], tenants.all, queue_timeout_s=START_S, idle_timeout_s=START_S)
        telemetry = Telemetry(
            [server.url], interval_s=0.1, timeout_s=lost_after_s, stale_after_s=lost_after_s
        )
        deployment = await stack.enter_async_context(Deployment(gateway, telemetry))
        proxy = Proxy(gateway, tenants, body_timeout_s=STEP_S, connect_timeout_s=lost_after_s)
        here = await stack.enter_async_context(Running(proxy, lifespan="on"))
        here.gateway, here.deployment, here.replica = gateway, deployment, telemetry.replicas[0]
        here.client = await stack.enter_async_context(
            aiohttp.ClientSession(here.url, timeout=aiohttp.ClientTimeout(STEP_S))
        )
        if action is not None:
            deployment.apply(action)
            if control:
                await until(lambda: server.status().asked.batch_cap == action.batch_cap)
        await until(lambda: deployment.stale is None)
        yield here
        await until(lambda: not gateway.window().in_flight)


async def until(condition):
    await asyncio.to_thread(wait_for, condition)


async def scraped(here):
    """Until the metrics are known as they are now, or later."""
    now_s = time.monotonic()
    await until(lambda: here.replica.last.at_s > now_s)


async def ran_together(server, send, count):
    """Send a load until so many of its requests have been in one iteration; the most that were."""
    first = server.last_iteration()
    for _ in range(TRIES):
        await send()
        await until(lambda: server.metric("num_requests_running") == 0)
        most = max(each.running for each in server.iterations(first))
        if most >= count:
            break
    return most


def post(here, body, key=None):
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return here.client.post("/v1/completions", json=body, headers=headers)


async def ask(here, body, key=None):
    """Status, headers and body of the answer to a request."""
    async with post(here, body, key) as response:
        return response.status, response.headers, await response.read()


def stream(words, tokens, prompt_tokens=32, **more):
    """A request for a stream that tells its usage."""
    ids = prompt(prompt_tokens, words)
    return completion(ids, tokens, stream=True, stream_options={"include_usage": True}, **more)


def tokens_of(answer):
    """Of a whole stream, as the server counted them."""
    status, _, body = answer
    assert status == 200, body
    assert body.endswith(DONE)
    return json.loads(body.split(b"\n\n")[-3].removeprefix(b"data: "))["usage"]["completion_tokens"]


@asynccontextmanager
async def held(here, words="held", key=None):
    """A stream that has begun, and goes on until its client leaves at the end of the block."""
    async with post(here, stream(words, LONG), key) as response:
        assert response.status == 200, await response.text()
        assert (await response.content.readany()).startswith(b"data: {")
        yield response


def last_event(rest):
    return json.loads(rest.split(b"\n\n")[-2].removeprefix(b"data: "))


async def ended_in(response):
    """The error that is the last event of a stream which had begun well."""
    rest = await response.read()
    assert not rest.endswith(DONE)
    return last_event(rest)["error"]["code"]


def failures(here):
    return dict(here.gateway.ledger.failures)


@contextmanager
def gateway_process(server, folder, *flags):
    """`llmserve gateway` before the server: its URL, what it prints, and its process."""
    upstream = f"{server.url},control={server.control}"
    command = [
        sys.executable, "-m", "llmserve_env", "gateway", "--upstream", upstream, "--port", "0",
        "--queue-timeout-s", str(START_S), "--idle-timeout-s", str(START_S),
    ]  # fmt: skip
    out = folder / "gateway.txt"
    with out.open("wb") as file:
        process = subprocess.Popen([*command, *flags], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    here = SimpleNamespace(process=process, out=out.read_text)
    try:
        wait_for(lambda: process.poll() is not None or "listening on" in out.read_text())
        assert process.poll() is None, out.read_text()
        here.url = re.search(r"listening on (\S+)", out.read_text())[1]
        yield here
        process.send_signal(signal.SIGINT)
        process.wait(STEP_S)
    finally:
        process.kill()
        process.wait()
