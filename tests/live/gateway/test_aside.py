"""Requests that are no completions, responses, browsers, and bytes that are no ASCII."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest

from llmserve_env.live.gateway.relay.aside import ASIDE

from ..endpoint_server import BREAK, WAIT, ScriptedEndpoint
from .test_about import asked, endpoint
from .test_gateway import THREE, answering, held, standing

BODY = {"model": "b", "input": "words"}


async def post(here, path, body, **options):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with here.client.post(path, data=content, **options) as response:
        return response.status, response.headers, await response.read()


@pytest.mark.parametrize("path", [path for path, method in ASIDE.items() if method == "POST"])
def test_bodies_and_answers_pass_as_they_are(path):
    async def main():
        said = [b'{"data": ', b"[\xff]}"]
        one = ScriptedEndpoint(lambda asked: said, status=201, headers={"content-type": "x/y", "x-own": "1"})
        async with standing(one, callers=THREE[:2]) as here:
            assert (await post(here, path, BODY))[0] == 401
            status, headers, got = await post(
                here,
                f"{path}?a=b",
                b'{"model":"m"}  ',
                headers={"authorization": "Bearer k-paid", "x-y": "2"},
            )
            assert (status, headers["x-own"], headers["content-type"], got) == (
                201,
                "1",
                "x/y",
                b"".join(said),
            )
            (request,) = one.asked
            assert (request.path, request.query, request.content) == (path, "a=b", b'{"model":"m"}  ')
            assert (request.headers["x-y"], "authorization" in request.headers) == ("2", False)
            assert {each.arrived for each in here.gateway.ledger.totals} == {0}

    asyncio.run(main())


def test_they_go_where_their_model_is_and_past_the_batch_cap():
    form = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nb\r\n--x--\r\n'

    async def main():
        a, b = endpoint("a"), endpoint("b", script=held)
        async with standing(a, b) as here:
            here.gateway.apply(here.gateway.action.model_copy(update={"batch_cap": 1}))
            asking = [asyncio.create_task(post(here, "/v1/embeddings", BODY)) for _ in range(3)]
            asking.append(asyncio.create_task(post(here, "/v1/audio/transcriptions", form)))
            await b.came(4)
            for each in b.asked:
                each.go.release()
            assert [status for status, *_ in await asyncio.gather(*asking)] == [200] * 4
            assert asked(a, b) == [0, 4]
            status, _, got = await post(here, "/tokenize", {"model": "none", "prompt": "p"})
            assert (status, json.loads(got)["error"]["param"]) == (404, "model")

    asyncio.run(main())


def test_one_that_is_lost_is_tried_at_another_upstream():
    async def main():
        async def hang_up(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.close()

        server, good = await asyncio.start_server(hang_up, "127.0.0.1", 0), ScriptedEndpoint(answering)
        async with server, standing(ScriptedEndpoint(held), good) as here:
            here.gateway.upstreams[0].url = url_of(server)
            for _ in range(4):
                assert (await post(here, "/tokenize", BODY))[0] == 200
            assert len(good.asked) == 4
            await here.servers[1].kill()
            status, _, got = await post(here, "/tokenize", BODY)
            assert (status, json.loads(got)["error"]["code"]) == (502, 502)

    asyncio.run(main())


def test_an_answer_that_breaks_off_is_not_whole():
    async def main():
        one = ScriptedEndpoint(lambda asked: [b"half", WAIT, BREAK])
        async with standing(one) as here, here.client.post("/v1/embeddings", json=BODY) as response:
            assert await response.content.readany() == b"half"
            one.asked[0].go.release()
            with pytest.raises(aiohttp.ClientError):
                await response.content.read()

    asyncio.run(main())


def test_a_client_that_goes_away_is_told_to_the_upstream():
    async def main():
        one = ScriptedEndpoint(held)
        async with standing(one) as here:
            asking = asyncio.create_task(post(here, "/v1/embeddings", BODY))
            request = await one.came(1)
            asking.cancel()
            await asyncio.wait_for(request.hung_up.wait(), 60)

    asyncio.run(main())


# -------------------------------------------------------------------------------------------------- responses


def test_a_response_is_a_completion():
    usage = {"input_tokens": 1, "output_tokens": 2}
    said = [
        {"type": "response.created", "response": {}},
        {"type": "response.output_text.delta", "delta": "a"},
        {"type": "response.output_text.delta", "delta": "b"},
        {"type": "response.completed", "response": {"usage": usage}},
    ]
    events = [f"event: {each['type']}\ndata: {json.dumps(each)}\n\n".encode() for each in said]
    whole = json.dumps({"object": "response", "status": "completed", "output": [{}], "usage": usage}).encode()

    async def main():
        def answer(asked):
            return events if asked.body["stream"] else [whole]

        one = ScriptedEndpoint(answer, headers={})
        async with standing(one) as here:
            for stream, expected in ((True, b"".join(events)), (False, whole)):
                body = {"model": "m", "input": "some words here", "stream": stream}
                assert (await post(here, "/v1/responses", body))[::2] == (200, expected)
                record = here.gateway.window()
                assert (record.completed, record.output_tokens, record.failed) == (1, 2, 0)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("field", "several", "status"),
    [("background", False, 501), ("previous_response_id", True, 501), ("previous_response_id", False, 200)],
)
def test_what_would_have_to_be_kept_between_requests_is_refused(field, several, status):
    async def main():
        whole = b'{"object": "response", "output": [{}]}'
        endpoints = [ScriptedEndpoint(lambda asked: [whole], headers={}) for _ in range(1 + several)]
        async with standing(*endpoints) as here:
            got_status, _, got = await post(here, "/v1/responses", {"model": "m", "input": "i", field: "x"})
            assert got_status == status
            assert status == 200 or json.loads(got)["error"]["param"] == field

    asyncio.run(main())


# ------------------------------------------------------------------------------------------------------ bytes


def url_of(server):
    return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def talk(here, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
    writer.write(request)
    got = await asyncio.wait_for(reader.read(), 60)
    writer.close()
    return got


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
@pytest.mark.parametrize(
    ("value", "status"), [("é".encode(), 200), (b"\xe9", 400), (b"\xed\xa0\x80", 400), (b"a\xff", 400)]
)
def test_header_bytes_pass_unharmed_or_are_refused(path, value, status):
    async def main():
        one = ScriptedEndpoint(answering)
        kept = []

        async def app(scope, receive, send):
            kept.extend(scope["headers"])
            await one(scope, receive, send)

        async with standing(app) as here:
            got = await talk(
                here,
                b"POST "
                + path.encode()
                + b"?q=%C3%A9 HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\nX-Name: "
                + value
                + b"\r\nX-Tenant: "
                + value
                + b"\r\nConnection: close\r\n\r\n{}",
            )
            assert got.startswith(f"HTTP/1.1 {status} ".encode())
            assert ((b"x-name", value) in kept) == (status == 200)

    asyncio.run(main())


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_header_bytes_of_answers_pass_unharmed(path):
    async def main():
        async def raw(reader, writer):
            await reader.readuntil(b"{}")
            writer.write(
                b"HTTP/1.1 200 \xe9\xff\r\nX-Name: \xe9\xff\r\nSet-Cookie: \xe9=\xff\r\n"
                b"Content-Type: text/event-stream; a=\xe9\r\nConnection: close\r\n\r\n"
                + b"".join(answering(None))
            )
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(raw, "127.0.0.1", 0)
        async with server, standing(ScriptedEndpoint(answering)) as here:
            here.gateway.upstreams[0].url = url_of(server)
            got = await talk(
                here,
                b"POST "
                + path.encode()
                + b" HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}",
            )
            assert got.startswith(b"HTTP/1.1 200 ")
            head = got.partition(b"\r\n\r\n")[0].lower()
            assert b"\r\nx-name: \xe9\xff" in head
            assert b"\r\nset-cookie: \xe9=\xff" in head

    asyncio.run(main())


# ----------------------------------------------------------------------------------------- closed connections


def test_a_connection_that_the_upstream_closed_meanwhile_costs_nothing():
    """It closes when the next request comes, as one whose time for idle connections is over then."""
    requests = []

    async def serve(reader, writer):
        try:
            for number in range(2):
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
                if number == 1:
                    return
                requests.append(head)
                body = b"".join(answering(None))
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n%b"
                    % (len(body), body)
                )
                await writer.drain()
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    async def main():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server, standing(ScriptedEndpoint(answering)) as here:
            here.gateway.upstreams[0].url = url_of(server)
            for path in ("/v1/completions", "/v1/completions", "/tokenize", "/v1/completions"):
                assert (await post(here, path, {"prompt": "p", "stream": True}))[0] == 200
            assert len(requests) == 4
            record = here.gateway.window()
            assert (record.completed, record.failed) == (3, 0)
            assert here.gateway.upstreams[0].health.cause is None

    asyncio.run(main())
