"""Streams pass through a gateway event by event, whatever an upstream makes of the standard."""

from __future__ import annotations

import asyncio
import json

import pytest

from ..endpoint_server import BREAK, WAIT, ScriptedEndpoint, event, piece
from .test_gateway import ANSWER, ask, asking, failures, standing

SAID = [piece("a"), piece("b"), piece("", "stop"), "[DONE]"]


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
@pytest.mark.parametrize("before", [b"", b"event: chunk\nid: 7\n", b": ping\n", b"\n", b": ping\n\n"])
def test_streams_pass_to_the_byte_and_their_tokens_are_counted(before, end):
    parts = [(before + event(each)).replace(b"\n", end) for each in SAID]
    parts = [half for part in parts for half in (part[:5], part[5:])]

    async def main():
        async with standing(ScriptedEndpoint(lambda asked: parts)) as here:
            assert (await ask(here))[::2] == (200, b"".join(parts))
            record = here.gateway.window()
            assert (record.completed, record.output_tokens, record.first_tokens) == (1, 2, 1)

    asyncio.run(main())


@pytest.mark.parametrize("rest", [b"\n", b"\r\n", b""])
def test_the_last_event_may_lack_its_end_and_gets_it(rest):
    last = b"data: [DONE]" + rest

    async def main():
        async with standing(ScriptedEndpoint(lambda asked: [*ANSWER[:-1], last])) as here:
            status, _, got = await ask(here)
            assert (status, got.splitlines()) == (200, b"".join(ANSWER).splitlines())
            assert here.gateway.window().completed == 1

    asyncio.run(main())


@pytest.mark.parametrize(
    "said",
    [
        b": keep-alive\n\n",
        b"event: error\n",
        b"\xef\xbb\xbf: keep-alive\n\nretry: 10\n\n\n\nid: 1\n\nevent: error\nid: 2\n",
        b"data:\n\ndata\n\n",
    ],
)
def test_what_is_no_answer_yet_leaves_a_refusal_its_status(said):
    error = {"message": "too long", "type": "BadRequestError", "param": "prompt", "code": "400"}

    async def main():
        parts = [said, WAIT, event(json.dumps({"error": error})), event("[DONE]")]
        endpoint = ScriptedEndpoint(lambda asked: parts)
        async with standing(endpoint) as here:
            asked = asking(here)
            (await endpoint.came(1)).go.release()
            status, headers, got = await asked
            assert (status, headers["content-type"]) == (400, "application/json")
            assert json.loads(got) == {"error": error}
            assert failures(here) == {"refused with 400": 1}

    asyncio.run(main())


def test_comments_without_end_are_passed_on_when_they_are_many():
    comment = b": " + b"-" * 65_533 + b"\n"

    async def main():
        async with standing(ScriptedEndpoint(lambda asked: [comment] * 20 + ANSWER)) as here:
            status, _, got = await ask(here)
            assert (status, got) == (200, comment * 20 + b"".join(ANSWER))

    asyncio.run(main())


def test_an_event_without_end_is_not_held_without_end():
    async def main():
        part = b"data: " + b"a" * (1 << 20) + b"\n"
        endpoint = ScriptedEndpoint(lambda asked: [ANSWER[0], *[part] * 20, WAIT])
        async with standing(endpoint) as here:
            status, _, got = await ask(here)
            first, error = got.split(b"\n\n")[:2]
            assert (status, first) == (200, ANSWER[0].strip())
            assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == 502
            assert failures(here) == {"event too long": 1}

    asyncio.run(main())


@pytest.mark.parametrize(
    "headers", [{"content-type": "application/json"}, {"content-type": "text/plain"}, {}]
)
def test_a_stream_that_was_asked_for_passes_whatever_its_type_says(headers):
    async def main():
        parts = [WAIT, b"da", b"ta: " + ANSWER[0][6:], WAIT, *ANSWER[1:]]
        endpoint = ScriptedEndpoint(lambda asked: parts, headers=headers)
        async with standing(endpoint) as here:
            sent = asyncio.create_task(
                here.client.post("/v1/completions", json={"prompt": "p", "stream": True})
            )
            asked = await endpoint.came(1)
            asked.go.release()
            response = await sent
            assert response.headers.get("content-type") == headers.get("content-type")
            assert await response.content.readany() == ANSWER[0]
            asked.go.release()
            assert await response.content.read() == b"".join(ANSWER[1:])
            record = here.gateway.window()
            assert (record.completed, record.output_tokens) == (1, 2)

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_whole_answer_passes_where_a_stream_was_asked_for(stream):
    body = b'\n {"choices": [{"text": "a"}], "usage": {"completion_tokens": 3}}'

    async def main():
        endpoint = ScriptedEndpoint(
            lambda asked: [body[:1], body[1:]], headers={"content-type": "application/json"}
        )
        async with standing(endpoint) as here:
            status, headers, got = await ask(here, stream=stream)
            assert (status, got, headers["content-length"]) == (200, body, str(len(body)))
            assert here.gateway.window().output_tokens == 3

    asyncio.run(main())


def test_openai_s_client_sees_an_error_where_a_stream_is_cut_within_an_event():
    openai = pytest.importorskip("openai")

    async def main():
        parts = [ANSWER[0], ANSWER[1][:14], BREAK]
        async with standing(ScriptedEndpoint(lambda asked: parts)) as here:
            client = openai.AsyncOpenAI(base_url=f"{here.url}/v1", api_key="k", max_retries=0)
            async with client:
                stream = await client.completions.create(model="m", prompt="p", stream=True)
                assert (await anext(stream)).choices[0].text == "a"
                with pytest.raises(openai.APIError):
                    await anext(stream)

    asyncio.run(main())
