"""A gateway between real HTTP clients and real HTTP servers: order and counts."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
import pytest

from llmserve_env.errors import InputError
from llmserve_env.live.gateway.admission.passage import Refused
from llmserve_env.live.gateway.callers import Caller, Callers
from llmserve_env.live.gateway.gateway import Gateway
from llmserve_env.live.gateway.proxy import Proxy
from llmserve_env.live.servers.upstreams import Upstream
from llmserve_env.schema import QuantizationTier, ServeAction

from ..endpoint_server import BREAK, WAIT, Running, ScriptedEndpoint, event, piece, usage

ANSWER = [event(piece("a")), event(piece("b", "length")), event("[DONE]")]
THREE = (
    Caller(name="free", key="k-free", priority=2, value="free"),
    Caller(name="paid", key="k-paid", priority=0, ttft_slo_s=30, tpot_slo_s=30),
    Caller(name="other", priority=1),
)
ERROR = {"error": {"message": "queue is full", "type": "overloaded", "param": None, "code": 503}}


def answering(asked):
    return ANSWER


def held(asked):
    return [WAIT, *ANSWER]


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


@asynccontextmanager
async def standing(*endpoints, callers=THREE[2:], action=None, limits=None, upstream=None, **bounds):
    """A gateway before servers of these endpoints, with a client of it."""
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(Running(each)) for each in endpoints]
        urls = [each.url for each in servers]
        upstreams = [
            Upstream(url, **given) for url, given in zip(urls, upstream or [{}] * len(urls), strict=True)
        ]
        tenants = Callers(callers)
        gateway = Gateway(upstreams, tenants.all, action or ServeAction(), **bounds)
        proxy = Proxy(gateway, tenants, **(limits or {}))
        stack.push_async_callback(proxy.close)
        here = await stack.enter_async_context(Running(proxy))
        here.gateway, here.proxy, here.servers = gateway, proxy, servers
        here.connections, tracing = [], aiohttp.TraceConfig()

        async def connected(*found):
            here.connections.append(found)

        tracing.on_connection_create_end.append(connected)
        here.client = await stack.enter_async_context(
            aiohttp.ClientSession(here.url, auto_decompress=False, trace_configs=[tracing])
        )
        yield here


async def ask(here, headers=None, **body):
    """Status, headers and body of the answer to a request."""
    body = {"model": "m", "prompt": "some words", "stream": True, **body}
    async with here.client.post("/v1/completions", json=body, headers=headers) as response:
        return response.status, response.headers, await response.read()


def asking(here, *args, **body):
    return asyncio.create_task(ask(here, *args, **body))


async def until(condition):
    """Let the loop run until something is so."""
    async with asyncio.timeout(120) if hasattr(asyncio, "timeout") else AsyncExitStack():
        while not condition():
            await asyncio.sleep(0)


def failures(here):
    return dict(here.gateway.ledger.failures)


# --------------------------------------------------------------------------------------------------- passing


def test_bytes_pass_as_they_are():
    body = b' {"stream" : true,\t"prompt": "\\u00e9\xc3\xa9 \\ud83d\\ude00", "temperature":1e0, "n": 1 }\n'

    async def main():
        endpoint = ScriptedEndpoint(answering, headers={"content-type": "text/event-stream", "x-own": "1"})
        async with standing(endpoint) as here:
            headers = {
                "connection": "keep-alive, x-hop",
                "x-hop": "1",
                "te": "trailers",
                "x-request-id": "r1",
                "authorization": "Bearer of-the-upstream",
                "content-type": "application/json",
            }
            async with here.client.post(
                "/v1/chat/completions?a=%20b", data=body, headers=headers
            ) as response:
                assert response.status == 200
                assert response.headers["x-own"] == "1"
                assert await response.read() == b"".join(ANSWER)
            (asked,) = endpoint.asked
            assert (asked.path, asked.query, asked.content) == ("/v1/chat/completions", "a=%20b", body)
            assert asked.headers["x-request-id"] == "r1"
            assert asked.headers["authorization"] == "Bearer of-the-upstream"
            assert asked.headers["content-type"] == "application/json"
            assert not {"x-hop", "te"} & set(asked.headers)

    asyncio.run(main())


def test_each_event_is_passed_on_before_the_next_one_comes():
    """Whole: half of one would be all that a client sees of it when the stream breaks off there."""
    smile = event(piece("\N{SLIGHTLY SMILING FACE}").replace("\\ud83d\\ude42", "\N{SLIGHTLY SMILING FACE}"))
    middle = smile.index("\N{SLIGHTLY SMILING FACE}".encode()) + 2
    parts = [event(piece("a")), smile[:middle], smile[middle:], event(piece("b", "stop")), event("[DONE]")]

    async def main():
        endpoint = ScriptedEndpoint(lambda asked: [each for part in parts for each in (WAIT, part)])
        async with standing(endpoint) as here:
            sent = asyncio.create_task(here.client.post("/v1/completions", json={"prompt": "p"}))
            asked = await endpoint.came(1)
            asked.go.release()
            response = await sent
            got = [await response.content.readany()]
            for part in parts[1:]:
                asked.go.release()
                if part != smile[:middle]:
                    got.append(await response.content.readany())
            assert got == [parts[0], smile, *parts[3:]]
            assert await response.content.readany() == b""
            record = here.gateway.window()
            assert (record.completed, record.output_tokens, record.first_tokens) == (1, 3, 1)

    asyncio.run(main())


def test_answers_that_are_not_streamed_pass_whole():
    body = json.dumps({"choices": [{"text": "é"}], "usage": {"completion_tokens": 7}}, ensure_ascii=False)

    async def main():
        endpoint = ScriptedEndpoint(
            lambda asked: [body.encode()], headers={"content-type": "application/json"}
        )
        async with standing(endpoint) as here:
            status, headers, got = await ask(here, stream=False)
            assert (status, got, headers["content-length"]) == (200, body.encode(), str(len(body.encode())))
            assert here.gateway.window().output_tokens == 7

    asyncio.run(main())


def test_large_bodies_pass_and_larger_ones_do_not():
    async def main():
        endpoint = ScriptedEndpoint(answering)
        async with standing(endpoint, limits={"max_body_bytes": 3_000_000}) as here:
            body = json.dumps({"prompt": "wörd " * 450_000}, ensure_ascii=False).encode()
            async with here.client.post("/v1/completions", data=io.BytesIO(body)) as response:
                assert response.status == 200
            assert endpoint.asked[0].content == body
            async with here.client.post(
                "/v1/completions", data=io.BytesIO(body + b" " * 300_000)
            ) as response:
                assert response.status == 413
                assert (await response.json())["error"]["code"] == 413

            async def without_length():
                for _ in range(40):
                    yield b" " * 100_000

            async with here.client.post("/v1/completions", data=without_length()) as response:
                assert response.status == 413
            status, _, _ = await ask(here)
            assert (status, len(endpoint.asked)) == (200, 2)

    asyncio.run(main())


def test_connections_are_kept_on_both_sides():
    async def main():
        endpoint = ScriptedEndpoint(answering)
        async with standing(endpoint) as here:
            for _ in range(4):
                assert (await ask(here))[0] == 200
            assert len(here.connections) == 1
            assert len({asked.peer for asked in endpoint.asked}) == 1

    asyncio.run(main())


# ---------------------------------------------------------------------------------------------------- limits


def test_never_more_than_batch_cap_at_the_upstream():
    async def main():
        endpoint = ScriptedEndpoint(held)
        async with standing(endpoint, action=ServeAction(batch_cap=3)) as here:
            answers = [asking(here) for _ in range(12)]
            await endpoint.came(3)
            await until(lambda: here.gateway.waiting == 9)
            record = here.gateway.window()
            assert (record.arrived, record.running, record.waiting, record.in_flight) == (12, 3, 9, 12)
            here.gateway.apply(ServeAction(batch_cap=2))
            for index in range(12):
                assert len(endpoint.asked) <= max(3, index + 2)  # three drain, then two at once
                (await endpoint.came(index + 1)).go.release()
                await answers[index]
            assert endpoint.peak == 3
            assert here.gateway.window().completed == 12

    asyncio.run(main())


@pytest.mark.parametrize(("routing", "order"), [(True, [0, 2, 4, 1, 3]), (False, [0, 1, 2, 3, 4])])
def test_the_urgent_go_first_under_priority_routing(routing, order):
    async def main():
        endpoint = ScriptedEndpoint(held)
        action = ServeAction(batch_cap=1, priority_routing=routing)
        async with standing(endpoint, callers=THREE, action=action) as here:
            answers = []
            for index, key in enumerate(["k-free", "k-free", "k-paid", "k-free", "k-paid"]):
                answers.append(
                    asking(here, {"authorization": f"Bearer {key}"}, prompt=str(index), priority=-9)
                )
                await until(lambda n=index: here.gateway.waiting == n)
                await endpoint.came(1)
            for index in range(5):
                (await endpoint.came(index + 1)).go.release()
            await asyncio.gather(*answers)
            assert [int(asked.body["prompt"]) for asked in endpoint.asked] == order
            said = [asked.body["priority"] for asked in endpoint.asked]
            assert said == ([2, 0, 0, 2, 2] if routing else [0] * 5)  # whatever the client asked for
            assert all("authorization" not in asked.headers for asked in endpoint.asked)

    asyncio.run(main())


def enter(gateway, tenant=0):
    """Whether a request is let in; else when to come again."""
    try:
        gateway.enter(tenant, 1)
    except Refused as refused:
        return refused.retry_after_s if refused.status == 429 else None
    return True


def test_the_bucket_holds_a_second_of_its_rate():
    async def main():
        clock = Clock()
        gateway = Gateway([Upstream("http://up")], action=ServeAction(admission_rate=4.0), clock=clock)
        found = [enter(gateway) for _ in range(6)]
        assert found == [True] * 4 + [pytest.approx(0.25)] * 2
        clock.now_s += 0.5
        assert [enter(gateway) is True for _ in range(3)] == [True, True, False]
        clock.now_s += 100
        assert [enter(gateway) is True for _ in range(6)] == [True] * 4 + [False] * 2
        gateway.apply(ServeAction(admission_rate=0.1))  # one token at least
        clock.now_s += 10
        assert [enter(gateway) for _ in range(2)] == [True, pytest.approx(10)]
        gateway.apply(ServeAction())
        assert all(enter(gateway) is True for _ in range(50))
        record = gateway.window()
        assert (record.arrived, record.refused, record.failed) == (6 + 3 + 6 + 2 + 50, 6, 6)

    asyncio.run(main())


def test_priorities_share_the_bucket():
    async def main():
        action = ServeAction(admission_rate=6.0, priority_routing=True)
        tenants = Callers(THREE).all
        gateway = Gateway([Upstream("http://up")], tenants, action, clock=Clock())
        let_in = [sum(enter(gateway, tenant) is True for _ in range(9)) for tenant in (0, 2, 1)]
        assert let_in == [2, 2, 2]  # the least urgent a third of six, the next up to two thirds, then all

    asyncio.run(main())


def test_refusals_are_429_with_retry_after():
    async def main():
        endpoint, clock = ScriptedEndpoint(held), Clock()
        action = ServeAction(admission_rate=0.25, batch_cap=1)
        async with standing(endpoint, action=action, clock=clock, max_waiting=1) as here:
            first = asking(here)
            asked = await endpoint.came(1)
            status, headers, got = await ask(here)
            assert (status, headers["retry-after"]) == (429, "4")
            assert json.loads(got)["error"]["type"] == "rate_limit_error"
            here.gateway.apply(ServeAction(batch_cap=1))
            second = asking(here)
            await until(lambda: here.gateway.waiting == 1)
            status, headers, _ = await ask(here)
            assert (status, headers["retry-after"]) == (429, "1")
            asked.go.release()
            (await endpoint.came(2)).go.release()
            assert [each[0] for each in await asyncio.gather(first, second)] == [200, 200]
            assert failures(here) == {"admission rate": 1, "queue full": 1}

    asyncio.run(main())


def test_a_full_kv_cache_takes_no_more():
    async def main():
        endpoint, usage = ScriptedEndpoint(answering), [0.5]
        action = ServeAction(kv_budget_fraction=0.5)
        async with standing(endpoint, action=action, kv_usage=lambda upstream: usage[0]) as here:
            answers = [asking(here) for _ in range(2)]
            await until(lambda: here.gateway.waiting == 2)
            here.gateway.tick()
            assert here.gateway.waiting == 2
            record = here.gateway.window()
            assert record.kv_occupancy == 0.5
            assert "kv_budget_fraction" not in record.not_applied
            usage[0] = 0.49
            here.gateway.tick()
            await asyncio.gather(*answers)
            usage[0] = None  # a lost scrape is no full cache, and no empty one: nothing is held back
            assert (await ask(here))[0] == 200
            assert "kv_budget_fraction" in here.gateway.not_applied

    asyncio.run(main())


# --------------------------------------------------------------------------------------- clients that go away


def test_a_client_that_goes_away_frees_its_place_and_closes_the_upstream():
    async def main():
        endpoint = ScriptedEndpoint(lambda asked: [event(piece("a")), WAIT, *ANSWER])
        async with standing(endpoint, action=ServeAction(batch_cap=1)) as here:
            going = await here.client.post("/v1/completions", json={"prompt": "p"})
            waiting = asking(here)
            staying = asking(here)
            await until(lambda: here.gateway.waiting == 2)
            waiting.cancel()  # in the queue
            await until(lambda: here.gateway.waiting == 1)
            assert await going.content.readany() == event(piece("a"))
            going.close()  # in the middle of its answer
            await asyncio.wait_for(endpoint.asked[0].hung_up.wait(), 30)
            (await endpoint.came(2)).go.release()
            assert (await staying)[0] == 200
            record = here.gateway.window()
            assert (record.arrived, record.completed, record.failed, record.timeouts) == (3, 1, 2, 2)
            assert (record.in_flight, len(endpoint.asked)) == (0, 2)
            assert failures(here) == {"client went away": 2}
            assert endpoint.peak == 1

    asyncio.run(main())


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (400, json.dumps({"error": {"message": "too long", "code": 400}}), "too long"),
        (
            404,
            json.dumps({"object": "error", "message": "no such model", "type": "NotFound"}),
            "no such model",
        ),
        (422, json.dumps({"detail": [{"msg": "m"}]}), '[{"msg": "m"}]'),
        (500, "Internal Server Error", "the upstream answered with HTTP 500"),
    ],
)
def test_refusals_of_an_upstream_come_in_openai_s_form(status, body, message):
    async def main():
        endpoint = ScriptedEndpoint(
            lambda asked: [body.encode()],
            status=status,
            headers={"content-type": "text/x", "retry-after": "7"},
        )
        async with standing(endpoint) as here:
            got_status, headers, got = await ask(here)
            assert (got_status, headers["retry-after"]) == (status, "7")
            assert headers["content-type"] == "application/json"
            assert json.loads(got)["error"]["message"] == message
            if "error" in body:
                assert "object" in body or got == body.encode()
            assert failures(here) == {f"http {status}": 1}

    asyncio.run(main())


@pytest.mark.parametrize(("status", "retry"), [(503, "1"), (429, "1"), (400, None)])
def test_a_refusal_for_now_says_when_to_try_again(status, retry):
    async def main():
        endpoint = ScriptedEndpoint(
            lambda asked: [json.dumps(ERROR).encode()],
            status=status,
            headers={"content-type": "application/json"},
        )
        async with standing(endpoint) as here:
            got_status, headers, _ = await ask(here)
            assert (got_status, headers.get("retry-after")) == (status, retry)

    asyncio.run(main())


@pytest.mark.parametrize(("code", "status", "retry"), [(503, 503, "1"), (400, 400, None), ("x", 502, None)])
@pytest.mark.parametrize("split", [False, True])
def test_a_stream_that_begins_with_an_error_is_a_refusal(code, status, retry, split):
    said = event(json.dumps({"error": {**ERROR["error"], "code": code}}))
    parts = [said[:9], WAIT, said[9:]] if split else [said]

    async def main():
        endpoint = ScriptedEndpoint(lambda asked: [*parts, event("[DONE]")])
        async with standing(endpoint) as here:
            asked = asking(here)
            (await endpoint.came(1)).go.release()
            got_status, headers, got = await asked
            assert (got_status, headers.get("retry-after")) == (status, retry)
            assert json.loads(got)["error"]["message"] == "queue is full"
            assert failures(here) == {f"refused with {status}": 1}

    asyncio.run(main())


def test_an_error_inside_a_stream_passes_and_is_counted():
    parts = [event(piece("a")), event(json.dumps(ERROR)), event("[DONE]")]

    async def main():
        async with standing(ScriptedEndpoint(lambda asked: parts)) as here:
            assert (await ask(here))[::2] == (200, b"".join(parts))
            record = here.gateway.window()
            assert (record.completed, record.failed) == (0, 1)
            assert failures(here) == {"error in the stream": 1}

    asyncio.run(main())


@pytest.mark.parametrize("end", [[BREAK], []])  # cut off; ended without saying so
@pytest.mark.parametrize("part", [b"", event(piece("b"))[:12]])
def test_a_stream_that_breaks_off_ends_with_an_error(part, end):
    async def main():
        async with standing(ScriptedEndpoint(lambda asked: [event(piece("a")), part, *end])) as here:
            status, _, got = await ask(here)
            assert status == 200
            begun, last, rest = got.split(b"\n\n")  # of the half of an event nothing
            assert (begun + b"\n\n", rest) == (event(piece("a")), b"")
            assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == 502
            assert here.gateway.window().failed == 1

    asyncio.run(main())


def test_without_an_answer_there_is_a_502_and_without_an_upstream_a_503():
    async def main():
        async with standing(ScriptedEndpoint(lambda asked: [BREAK], status=200)) as here:
            await here.servers[0].kill()
            status, headers, got = await ask(here)
            assert (status, headers["retry-after"]) == (503, "1")
            assert json.loads(got)["error"]["code"] == 503
        endpoint = ScriptedEndpoint(held)
        async with standing(endpoint) as here:
            asked = asking(here)
            await endpoint.came(1)
            await here.servers[0].kill()
            status, _, got = await asked
            assert (status, json.loads(got)["error"]["code"]) == (502, 502)
            assert failures(here) == {"upstream lost": 1}

    asyncio.run(main())


def test_an_upstream_may_be_killed_in_the_middle_and_come_back():
    async def main():
        endpoint = ScriptedEndpoint(lambda asked: [event(piece("a")), WAIT, *ANSWER])
        async with standing(endpoint, action=ServeAction(batch_cap=1)) as here:
            (server,) = here.servers
            response = await here.client.post("/v1/completions", json={"prompt": "p"})
            waiting = asking(here)
            await until(lambda: here.gateway.waiting == 1)
            await server.kill()
            rest = await response.content.read()
            assert json.loads(rest.split(b"data: ")[-1])["error"]["code"] == 502
            assert (await waiting)[0] == 503
            async with Running(endpoint, server.port):
                asked = asking(here)
                (await endpoint.came(2)).go.release()
                assert (await asked)[0] == 200
            assert here.gateway.window().in_flight == 0

    asyncio.run(main())


@pytest.mark.parametrize(
    ("body", "status"), [(b"{]", 400), (b"[1]", 400), (b"\xff\xfe{", 400), (b"", 400), (b"[" * 100_000, 400)]
)
def test_what_is_no_request_is_refused_here(body, status):
    async def main():
        async with standing(ScriptedEndpoint(answering)) as here:
            async with here.client.post("/v1/completions", data=body) as response:
                assert response.status == status
                assert (await response.json())["error"]["type"] == "invalid_request_error"
            assert here.gateway.window().arrived == 0

    asyncio.run(main())


def test_other_paths_and_methods():
    async def main():
        async with standing(ScriptedEndpoint(answering)) as here:
            for method, path, status in (
                ("GET", "/v1/completions", 405),
                ("POST", "/v1/models", 405),
                ("POST", "/v1/files", 404),
            ):
                async with here.client.request(method, path) as response:
                    assert response.status == status
                    assert (await response.json())["error"]["code"] == status

    asyncio.run(main())


# ------------------------------------------------------------------------------------------------ time limits


def test_time_limits():
    async def main():
        endpoint, clock = ScriptedEndpoint(lambda asked: [WAIT, *ANSWER[:1], WAIT]), Clock()
        action, bounds = ServeAction(batch_cap=1), {"queue_timeout_s": 10.0, "idle_timeout_s": 100.0}
        async with standing(endpoint, action=action, clock=clock, **bounds) as here:
            first = asking(here)
            await endpoint.came(1)
            second = asking(here)
            await until(lambda: here.gateway.waiting == 1)
            clock.now_s += 11
            here.gateway.tick()
            status, headers, _ = await second
            assert (status, headers["retry-after"]) == (503, "1")
            clock.now_s += 90
            here.gateway.tick()
            status, _, got = await first
            assert (status, json.loads(got)["error"]["code"]) == (504, 504)
            await asyncio.wait_for(endpoint.asked[0].hung_up.wait(), 30)
            response = asyncio.create_task(here.client.post("/v1/completions", json={"prompt": "p"}))
            (await endpoint.came(2)).go.release()
            response = await response
            clock.now_s += 101
            here.gateway.tick()
            assert json.loads((await response.content.read()).split(b"data: ")[-1])["error"]["code"] == 504
            assert failures(here) == {"queue timeout": 1, "upstream silent": 2}
            assert here.gateway.window().in_flight == 0

    asyncio.run(main())


def test_a_client_that_does_not_read_is_let_go():
    # The endpoint stays to see its connection close: what it sends into a lost one does not make it wait.
    flood = [event(piece("x" * 100_000))] * 200 + [WAIT]

    async def main():
        endpoint, clock = ScriptedEndpoint(lambda asked: flood), Clock()
        async with standing(endpoint, clock=clock) as here:
            _, writer = await asyncio.open_connection("127.0.0.1", here.port, limit=1)
            body = b'{"prompt": "p"}'
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n" % len(body) + body
            )
            await endpoint.came(1)
            (passage,) = await until_found(
                lambda: [each for each in here.gateway._at_upstreams if each.writing]
            )
            clock.now_s += 301
            here.gateway.tick()
            await asyncio.wait_for(endpoint.asked[0].hung_up.wait(), 30)
            assert passage.over
            assert failures(here) == {"client does not read": 1}
            writer.close()

    asyncio.run(main())


async def until_found(find):
    await until(find)
    return find()


# ------------------------------------------------------------------------------------------------------ pools


def test_pools_take_what_the_action_names():
    pools = [
        {"tier": QuantizationTier.FP16, "speculation": 0},
        {"tier": QuantizationTier.INT8, "speculation": 0},
        {"tier": QuantizationTier.INT8, "speculation": 3},
    ]

    async def main():
        endpoints = [ScriptedEndpoint(answering) for _ in pools]
        async with standing(*endpoints, upstream=pools) as here:
            asked_for = [("FP16", 0), ("INT8", 0), ("INT8", 3), ("FP16", 3), ("INT4", 3)]
            not_applied = []
            for tier, depth in asked_for:
                action = ServeAction(quantization_tier=tier, speculation_depth=depth)
                not_applied.append(set(here.gateway.apply(action)) - {"prefill_decode_split"})
                await ask(here, prompt=f"{tier} {depth}")
            got = [[asked.body["prompt"] for asked in each.asked] for each in endpoints]
            assert got == [["FP16 0", "FP16 3"], ["INT8 0"], ["INT8 3", "INT4 3"]]
            assert not_applied == [set(), set(), set(), {"speculation_depth"}, {"quantization_tier"}]
            record = here.gateway.window()
            assert record.engines_tier.tolist() == [1, 2, 0]
            assert record.tier_in_slo[:, 0].tolist() == [2, 3, 0]

    asyncio.run(main())


def test_the_least_loaded_of_a_pool_is_next_and_one_that_is_down_is_passed_over():
    async def main():
        endpoints = [ScriptedEndpoint(held) for _ in range(3)]
        async with standing(*endpoints, action=ServeAction(batch_cap=2)) as here:
            await here.servers[1].kill()
            answers = [asking(here) for _ in range(5)]
            await until(lambda: here.gateway.waiting == 1)
            await until(lambda: [len(each.asked) for each in endpoints] == [2, 0, 2])
            endpoints[2].asked[0].go.release()
            await endpoints[2].came(3)
            for endpoint in endpoints:
                for asked in endpoint.asked:
                    asked.go.release()
            assert [each[0] for each in await asyncio.gather(*answers)] == [200] * 5
            assert here.gateway.window().failed == 0

    asyncio.run(main())


def test_a_request_whose_upstream_takes_no_connection_is_the_first_to_wait():
    async def main():
        action = ServeAction(batch_cap=1)
        gateway = Gateway([Upstream("http://a"), Upstream("http://b")], action=action, clock=Clock())
        first, second, third = (gateway.enter(0, 1) for _ in range(3))
        gateway.unreachable(first)
        assert (gateway.waiting, gateway.window().running) == (2, 1)
        gateway.fail(second, "any")
        assert (first.upstream, third.upstream) == (gateway.upstreams[1], None)
        with pytest.raises(Refused):  # it has tried both
            gateway.unreachable(first)

    asyncio.run(main())


def test_models_health_and_metrics_are_of_all_upstreams():
    def others(model, value):
        models = {"object": "list", "data": [{"id": "base"}, {"id": model}]}
        text = (
            f'# HELP a of\n# TYPE a gauge\na{{x="}}"}} {value}\na_b 1 2\n# TYPE c counter\nc_total {value}\n'
        )
        paths = ("/v1/models", "/health", "/metrics")
        return dict(zip(paths, (json.dumps(models).encode(), b" ", text.encode()), strict=True))

    async def main():
        endpoints = [ScriptedEndpoint(answering, others=others(f"m{n}", n)) for n in range(2)]
        async with standing(*endpoints) as here:

            async def get(path):
                async with here.client.get(path) as response:
                    return response.status, await response.read()

            status, got = await get("/v1/models")
            assert (status, [each["id"] for each in json.loads(got)["data"]]) == (200, ["base", "m0", "m1"])
            status, got = await get("/metrics")
            first, second = (f'upstream="{server.url}"' for server in here.servers)
            assert got.decode().splitlines() == [
                "# HELP a of",
                "# TYPE a gauge",
                f'a{{{first},x="}}"}} 0',
                f"a_b{{{first}}} 1 2",
                f'a{{{second},x="}}"}} 1',
                f"a_b{{{second}}} 1 2",
                "# TYPE c counter",
                f"c_total{{{first}}} 0",
                f"c_total{{{second}}} 1",
            ]
            endpoints[1].others["/v1/models"] = b"no JSON"
            status, got = await get("/v1/models")
            assert (status, [each["id"] for each in json.loads(got)["data"]]) == (200, ["base", "m0"])
            endpoints[1].others.update(others("m1", 1))
            await here.servers[0].kill()
            assert (await get("/health"))[0] == 200
            assert json.loads((await get("/v1/models"))[1])["data"][1]["id"] == "m1"
            await here.servers[1].kill()
            assert [(await get(path))[0] for path in ("/v1/models", "/metrics")] == [503, 503]

    asyncio.run(main())


# --------------------------------------------------------------------------------------- tenants and accounts


def test_tenants_are_measured_apart():
    parts = [*ANSWER[:2], event(usage(9, 4)), event("[DONE]")]

    async def main():
        async with standing(ScriptedEndpoint(lambda asked: parts), callers=THREE) as here:
            await ask(here, {"authorization": "Bearer k-paid"}, prompt=[1, 2, 3])
            await ask(here, {"x-tenant": "free"})
            await ask(here, {"x-tenant": "free"})
            await ask(here)
            record = here.gateway.window()
            assert record.tenant_arrived.tolist() == record.tenant_completed.tolist() == [2, 1, 1]
            assert record.tenant_output_tokens.tolist() == [8, 4, 4]
            assert record.tenant_in_slo[1] == 1
            assert record.arrived_prompt_tokens == 3 + 3 * 3  # ids are counted; of text a token every 4 bytes
            assert record.ttft_histogram.sum() == 4
            assert here.gateway.window().arrived == 0

    asyncio.run(main())


def test_strangers_are_refused_where_nobody_is_everybody_else():
    async def main():
        endpoint = ScriptedEndpoint(answering)
        upstream = [{"key": "upstream's own"}]
        async with standing(endpoint, callers=THREE[:2], upstream=upstream) as here:
            status, _, got = await ask(here, {"authorization": "Bearer k-fre"})
            assert (status, json.loads(got)["error"]["type"]) == (401, "authentication_error")
            async with here.client.get("/v1/models") as response:
                assert response.status == 401
            await ask(here, {"authorization": "Bearer k-free"})
            assert endpoint.asked[0].headers["authorization"] == "Bearer upstream's own"

    asyncio.run(main())


def test_what_clients_send_and_get_is_never_logged(caplog, capfd):
    secret = "xyzzy-secret"
    scripts = iter(
        [
            ANSWER,
            [event(piece(secret)), BREAK],
            [event(json.dumps({"error": {"message": secret, "code": 400}}))],
            [event(piece("a")), event(json.dumps({"error": secret}))],
            [f"data: {secret}\n\n".encode(), BREAK],
            [BREAK],
        ]
    )

    async def main():
        asyncio.get_running_loop().set_debug(True)
        endpoint = ScriptedEndpoint(lambda asked: next(scripts))
        async with standing(endpoint, callers=(Caller(name="a", key=secret),)) as here:
            headers = {"authorization": f"Bearer {secret}"}
            for _ in range(6):
                await ask(here, headers, prompt=secret)
            for body in (f'{{"{secret}"', f'{{"prompt": {secret}}}'):
                async with here.client.post("/v1/completions", data=body, headers=headers) as response:
                    assert secret not in await response.text()
            await here.servers[0].kill()
            assert (await ask(here, headers, prompt=secret))[0] == 503
            assert secret not in repr(here.gateway.window())
            assert secret not in repr(here.gateway.ledger.failures)

    with caplog.at_level(logging.DEBUG):
        asyncio.run(main())
    out, err = capfd.readouterr()
    assert secret not in caplog.text + out + err


@pytest.mark.parametrize("bounds", [{"max_waiting": 0}, {"queue_timeout_s": 0.0}, {"idle_timeout_s": -1.0}])
def test_bounds_that_cannot_be_are_refused(bounds):
    with pytest.raises(InputError) as caught:
        Gateway([Upstream("http://up")], **bounds)
    assert caught.value.field in bounds
    with pytest.raises(InputError):
        Gateway([])
