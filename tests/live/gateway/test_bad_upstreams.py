"""One bad upstream of two: clients hardly see it, it is told, and it comes back when it is well."""

from __future__ import annotations

import asyncio
import gzip
import json
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
import pytest

from llmserve_env.live.gateway.about import About
from llmserve_env.live.gateway.callers import Callers
from llmserve_env.live.gateway.exchange import Exchange
from llmserve_env.live.gateway.gateway import Gateway
from llmserve_env.live.gateway.proxy import Proxy
from llmserve_env.live.gateway.relay.probe import Probe
from llmserve_env.live.servers.fault import Cause
from llmserve_env.live.servers.health import SILENT_S, State
from llmserve_env.live.servers.upstreams import Upstream

from ..endpoint_server import Running, event, piece, usage
from .bad_server import KINDS, PIECE, SAID, STREAM, BadServer, answer, chunk

REQUESTS, AT_ONCE, FIRST = 120, 10, 20
STEP_S = 0.2
"""Time that passes with each answer."""


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


@asynccontextmanager
async def standing(*modes, upstream=None, **options):
    """A gateway before such servers, with a clock of its own."""
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(BadServer()) for _ in modes]
        given = upstream or [{}] * len(modes)
        upstreams = [Upstream(each.url, **more) for each, more in zip(servers, given, strict=True)]
        clock = Clock()
        gateway = Gateway(upstreams, clock=clock, **options)
        proxy = Proxy(gateway, Callers())
        stack.push_async_callback(proxy.close)
        here = await stack.enter_async_context(Running(proxy))
        here.gateway, here.clock, here.servers, here.upstreams = gateway, clock, servers, upstreams
        here.client = await stack.enter_async_context(aiohttp.ClientSession(here.url))
        for server, mode in zip(servers, modes, strict=True):
            await server.become(mode)
        yield here


async def ask(here, stream=True, path="/v1/completions"):
    """Status and body of an answer."""
    async with here.client.post(path, json={"prompt": "p", "stream": stream}) as response:
        return response.status, await response.read()


def is_whole(answered):
    status, body = answered
    return status == 200 and body.endswith(b"[DONE]\n\n")


def pass_time(here, time_s):
    here.clock.now_s += time_s
    here.gateway.tick()


async def turns(count=50):
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition):
    for _ in range(1_000_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not happen")


@pytest.mark.parametrize("kind", KINDS)
def test_with_one_bad_upstream_of_two_requests_are_served_and_it_comes_back(kind):
    async def main():
        async with standing(kind, "well") as here:
            bad = here.upstreams[0]
            numbers, answers = iter(range(REQUESTS)), {}

            async def client():
                for number in numbers:
                    answers[number] = await ask(here)
                    pass_time(here, STEP_S)

            clients = [asyncio.create_task(client()) for _ in range(AT_ONCE)]
            while not all(each.done() for each in clients):
                if len(answers) >= REQUESTS - AT_ONCE:  # the last ones wait, perhaps, for time to pass
                    pass_time(here, 1.0)
                await turns()
            await asyncio.gather(*clients)
            served = [is_whole(answers[number]) for number in range(FIRST, REQUESTS)]
            assert sum(served) >= 0.99 * len(served)
            assert bad.health.out
            assert here.gateway.in_flight == bad.running == 0

            await here.servers[0].become("well")
            well_s = here.clock.now_s
            while bad.health.state(here.clock.now_s) is not State.WELL:
                assert is_whole(await ask(here))
                pass_time(here, STEP_S)
                assert here.clock.now_s <= well_s + 10
            assert here.servers[0].served

    asyncio.run(main())


def test_ties_go_round():
    async def main():
        async with standing("well", "well", "well") as here:
            for _ in range(9):
                await ask(here)
            assert [each.served for each in here.servers] == [3, 3, 3]

    asyncio.run(main())


def test_the_health_of_a_bad_upstream_is_told_everywhere_alike():
    async def main():
        async with standing("500", "well") as here:
            for _ in range(8):
                assert is_whole(await ask(here))
            async with here.client.get("/health") as response:
                health = await response.json()
                assert response.status == 200
            said = health["upstreams"][0]
            assert (said["well"], said["state"], said["cause"]) == (False, "ejected", "server error")
            assert health["upstreams"][1]["well"]
            async with here.client.get("/gateway/metrics") as response:
                text = await response.text()
            url = here.servers[0].url
            assert f'llmserve_gateway_upstream_up{{upstream="{url}"}} 0.0' in text
            assert f'upstream_state{{cause="server error",state="ejected",upstream="{url}"}} 1.0' in text
            assert 'llmserve_gateway_retries_total{cause="server error"} 3.0' in text
            async with here.client.get("/dashboard/data") as response:
                shown = (await response.json())["upstreams"][0]
            assert (shown["up"], shown["state"], shown["cause"]) == (False, "ejected", "server error")
            assert here.gateway.window().engines_up == 1

    asyncio.run(main())


def test_the_only_upstream_is_tried_however_bad_it_is():
    async def main():
        async with standing("500") as here:
            for _ in range(10):
                assert (await ask(here))[0] == 500
            assert here.servers[0].served == 10  # and nothing is sent to it twice
            async with here.client.get("/health") as response:
                assert response.status == 503
            await here.servers[0].become("well")
            assert is_whole(await ask(here))
            async with here.client.get("/health") as response:
                assert response.status == 200

    asyncio.run(main())


def test_what_fails_everywhere_is_tried_twice_and_the_client_gets_the_last_answer():
    async def main():
        async with standing("500", "503") as here:
            status, body = await ask(here)
            assert (status, here.servers[0].served, here.servers[1].served) == (503, 1, 1)
            assert json.loads(body)["error"]["code"] == 503
            record = here.gateway.window()
            assert (record.arrived, record.failed, record.in_flight) == (1, 1, 0)

    asyncio.run(main())


def test_a_silent_upstream_gives_its_requests_back_and_gets_none_until_something_moves():
    async def main():
        async with standing("hang", "well", still_s=lambda upstream: still.get(upstream.url)) as here:
            still = {}
            frozen = here.upstreams[0]
            first = [asyncio.create_task(ask(here)) for _ in range(4)]
            await until(lambda: here.servers[0].served == 2 and sum(each.done() for each in first) == 2)
            pass_time(here, SILENT_S - 1)
            assert frozen.health.state(here.clock.now_s) is State.WELL
            still[frozen.url] = 2.0  # the counters move: a long prefill
            pass_time(here, 2.0)
            assert not frozen.health.out
            still[frozen.url] = SILENT_S
            pass_time(here, 0.1)
            assert (frozen.health.out, frozen.health.cause) == (True, Cause.SILENT)
            assert all(map(is_whole, await asyncio.gather(*first)))  # the other one has answered them
            for _ in range(30):
                pass_time(here, 1.0)
                assert is_whole(await ask(here))
            assert here.servers[0].served == 2
            still[frozen.url] = 0.0
            pass_time(here, 0.1)
            assert frozen.health.state(here.clock.now_s) is State.PROBING  # it may hang again

    asyncio.run(main())


@pytest.mark.parametrize(("moves", "out"), [(True, False), (False, True)])
def test_answers_that_stop_are_failures_unless_counters_say_that_the_engine_goes_on(moves, out):
    async def main():
        async with standing("stall", "well", still_s=lambda upstream: 1.0 if moves else None) as here:
            begun = [asyncio.create_task(ask(here)) for _ in range(8)]
            await until(lambda: here.servers[0].served >= 3)
            await until(lambda: sum(each.answered for each in here.gateway._at_upstreams) >= 3)
            pass_time(here, SILENT_S + 1)
            assert here.upstreams[0].health.out is out
            await here.servers[0].close()
            await asyncio.gather(*begun)

    asyncio.run(main())


def test_what_keeps_a_connection_open_is_no_sign_of_life(monkeypatch):
    monkeypatch.setitem(SAID, "pings", STREAM + chunk(b": ping\n\n"))

    async def main():
        async with standing("pings", "well") as here:
            asked = [asyncio.create_task(ask(here)) for _ in range(2)]
            await until(lambda: here.servers[0].served == 1)
            for _ in range(12):
                for writer in here.servers[0]._writers:
                    writer.write(chunk(b": ping\n\n"))
                await turns()
                pass_time(here, 1.0)
            assert here.upstreams[0].health.cause is Cause.SILENT
            assert all(map(is_whole, await asyncio.gather(*asked)))

    asyncio.run(main())


def test_a_packed_answer_passes_as_it_is(monkeypatch):
    packed = gzip.compress(b'{"choices": [{"text": "a"}]}')
    monkeypatch.setitem(SAID, "packed", answer(200, packed, headers=b"content-encoding: gzip\r\n"))

    async def main():
        async with standing("packed") as here:
            body = {"prompt": "p"}
            async with here.client.post("/v1/completions", json=body) as response:
                assert (response.status, await response.json()) == (200, {"choices": [{"text": "a"}]})
            assert here.gateway.window().completed == 1

    asyncio.run(main())


def test_what_ended_late_for_a_silence_is_told_apart():
    async def main():
        async with standing("hang", first_byte_timeout_s=1000.0) as here:
            waiting = [asyncio.create_task(ask(here)) for _ in range(3)]
            await until(lambda: here.servers[0].served == 3)
            pass_time(here, SILENT_S + 1)
            assert here.upstreams[0].health.cause is Cause.SILENT
            await here.servers[0].close()
            await asyncio.gather(*waiting)
            record = here.gateway.window()
            assert (record.failed, here.gateway.ledger.excused) == (3, 3)
            assert (here.gateway.window().failed, here.gateway.ledger.excused) == (0, 0)

    asyncio.run(main())


@pytest.mark.parametrize(("stream", "begun"), [(True, False), (False, False), (True, True)])
def test_an_answer_has_its_time_to_begin_and_another_to_go_on(stream, begun):
    async def main():
        mode = "stall" if begun else "hang"
        async with standing(mode, first_byte_timeout_s=5.0, idle_timeout_s=8.0) as here:
            asked = asyncio.create_task(ask(here, stream))
            await until(lambda: here.servers[0].served == 1)
            if begun:
                await until(lambda: any(each.answered for each in here.gateway._at_upstreams))
            pass_time(here, 6.0)
            await turns()
            assert asked.done() is not begun
            pass_time(here, 3.0)
            status, body = await asked
            assert status == (200 if begun else 504)
            assert json.loads(body.split(b"data: ")[-1])["error"]["code"] == 504

    asyncio.run(main())


# Whose fault it is


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
@pytest.mark.parametrize("in_stream", [False, True])
def test_a_clients_mistake_is_told_and_is_nobodys_failure(status, in_stream, monkeypatch):
    error = {"error": {"message": "no such model", "type": "NotFoundError", "code": status}}
    body = json.dumps(error).encode()
    said = STREAM + chunk(event(body.decode())) + chunk(b"") if in_stream else answer(status, body)
    monkeypatch.setitem(SAID, "mistaken", said)

    async def main():
        async with standing("mistaken", "mistaken") as here:
            for _ in range(12):
                got, text = await ask(here)
                assert (got, json.loads(text)) == (status, error)
            assert sum(each.served for each in here.servers) == 12  # nobody asks a second time
            assert {each.health.state(0.0) for each in here.upstreams} == {State.WELL}
            record = here.gateway.window()
            counts = (record.arrived, record.failed, record.completed, record.in_flight)
            assert counts == (0, 0, 0, 0)
            assert record.tenant_arrived.tolist() == record.tenant_failed.tolist() == [0]
            (totals,) = here.gateway.ledger.totals
            assert (totals.arrived, totals.outcomes["rejected"], totals.in_flight) == (12, 12, 0)
            assert sum(here.gateway.ledger.failures.values()) == 12

    asyncio.run(main())


@pytest.mark.parametrize("status", [401, 403])
def test_an_upstream_that_refuses_the_gateways_key_is_out(status, monkeypatch):
    monkeypatch.setitem(SAID, "locked", answer(status, b'{"error": "Unauthorized"}'))

    async def main():
        async with standing("locked", "well", upstream=[{"key": "old"}, {}]) as here:
            assert [is_whole(await ask(here)) for _ in range(6)] == [True] * 6
            assert (here.servers[0].served, here.upstreams[0].health.cause) == (1, Cause.KEY_REFUSED)

    asyncio.run(main())


EMPTY_TEXT = [event(piece("", "stop"))]


@pytest.mark.parametrize("tail", [[], [event(usage(3, 1))], [event(usage(3, 0))], [event("[DONE]")]])
def test_an_answer_that_ends_with_its_first_token_is_a_completion(tail, monkeypatch):
    parts = EMPTY_TEXT + tail
    monkeypatch.setitem(SAID, "short", STREAM + b"".join(map(chunk, parts)) + chunk(b""))

    async def main():
        async with standing("short") as here:
            assert await ask(here) == (200, b"".join(parts))
            record = here.gateway.window()
            assert (record.completed, record.failed, record.first_tokens) == (1, 0, 1)
            assert record.tenant_in_slo.tolist() == [1]

    asyncio.run(main())


NO_COMPLETIONS = {
    "a page": answer(200, b"<!doctype html><title>Log in</title>", b"text/html"),
    "nothing": answer(200),
    "no content": b"HTTP/1.1 204 X\r\n\r\n",
    "a part": answer(200, b'{"id": "x", "choices": [{"te'),
    "no choices": answer(200, b'{"id": "x", "object": "text_completion"}'),
    "empty choices": answer(200, b'{"choices": []}'),
    "a list": answer(200, b"[1]"),
    "a redirect": answer(302, headers=b"location: http://127.0.0.1:1/login\r\n"),
    "a page as a stream": answer(200, b"<html>log in</html>\n\n", b"text/event-stream"),
    "an empty stream": STREAM + chunk(b""),
    "an end alone": STREAM + chunk(event("[DONE]")) + chunk(b""),
    "no JSON in events": STREAM + chunk(event("hello")) + chunk(event("[DONE]")) + chunk(b""),
    "fewer bytes than stated": answer(200, b'{"choices": [', length=100),
}


@pytest.mark.parametrize("name", NO_COMPLETIONS)
def test_what_is_no_completion_is_its_upstreams_failure(name, monkeypatch):
    monkeypatch.setitem(SAID, "odd", NO_COMPLETIONS[name])
    hangs_up = name == "fewer bytes than stated"

    async def main():
        async with standing("odd") as here:
            for stream in (False, True, True):
                asked = asyncio.create_task(ask(here, stream))
                if hangs_up:
                    await until(lambda: here.servers[0].served)
                    await turns(500)
                    for writer in tuple(here.servers[0]._writers):
                        writer.close()
                status, body = await asked
                assert (status, json.loads(body)["error"]["type"]) == (502, "server_error")
            assert here.upstreams[0].health.out
            record = here.gateway.window()
            assert (record.completed, record.failed, record.output_tokens) == (0, 3, 0)

    asyncio.run(main())


def test_of_a_cut_stream_the_client_gets_whole_events_and_then_an_error():
    async def main():
        async with standing("cut within an event") as here:
            status, body = await ask(here)
            begun, last, rest = body.split(b"\n\n")
            assert (status, begun + b"\n\n", rest) == (200, PIECE, b"")
            assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == 502

    asyncio.run(main())


# Asked in the background


ENDLESS = b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n" + b"x" * 100_000


def test_health_is_asked_in_the_background_and_told_at_once(caplog):
    async def main():
        async with BadServer() as well, BadServer() as failing, BadServer() as dead, BadServer() as endless:
            failing.health, endless.health = answer(503), ENDLESS
            await dead.become("refused")
            servers = (well, failing, dead, endless)
            gateway = Gateway([Upstream(each.url) for each in servers])
            exchange = Exchange(gateway, max_answer_bytes=1, connect_timeout_s=5)
            probe = Probe(exchange, gateway.clock)
            about = About(exchange)

            async def told():
                _, _, body = await about.answer("/health", [])
                return [(each["state"], each["cause"]) for each in json.loads(body)["upstreams"]]

            for turn in range(3):
                for each in gateway.upstreams:
                    await probe.ask(each)
                if not turn:
                    assert (await told())[1:3] == [("well", None), ("ejected", "unreachable")]
            ejected = [("ejected", "unhealthy"), ("ejected", "unreachable")]
            assert await told() == [("well", None), *ejected, ("well", None)]
            said = [each.message for each in caplog.records if "at the start" in each.message]
            assert said == [
                f"{failing.url} is down at the start: /health: HTTP 503",
                f"{dead.url} is down at the start: /health: it takes no connection",
            ]
            failing.health = answer(200)
            await dead.become("well")
            for each in gateway.upstreams:
                await probe.ask(each)
            assert {state for state, _ in await told()} == {"well", "probing"}
            await exchange.close()

    asyncio.run(main())


def test_a_draining_upstream_ends_what_it_has_and_gets_nothing():
    async def main():
        async with standing("stall", "well") as here:
            begun = asyncio.create_task(ask(here))
            await until(lambda: here.servers[0].served == 1)
            here.upstreams[0].health.draining = True
            for _ in range(6):
                assert is_whole(await ask(here))
            assert (here.servers[0].served, begun.done()) == (1, False)
            async with here.client.get("/health") as response:
                said = (await response.json())["upstreams"][0]
            assert (said["well"], said["state"], said["running"]) == (False, "draining", 1)
            await here.servers[0].close()
            await begun

    asyncio.run(main())
