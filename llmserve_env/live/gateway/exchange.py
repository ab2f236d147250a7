"""A request's exchange with an upstream: how it is sent on, and how the answer comes back to the client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from yarl import URL

from llmserve_env.live.gateway.admission.passage import Passage, Refused
from llmserve_env.live.gateway.gateway import Gateway
from llmserve_env.live.gateway.wire import RequestBody, as_error, error_event, error_json
from llmserve_env.live.servers.events import begins_as_events
from llmserve_env.live.servers.stream import RequestFailed, StreamReader, error_status
from llmserve_env.live.servers.upstreams import Upstream
from llmserve_env.net.http import open_session, payload

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

LOG = logging.getLogger(__name__)

JSON: Headers = [(b"content-type", b"application/json")]
LOST = (aiohttp.ClientError, OSError, asyncio.TimeoutError)
"""How a connection to an upstream fails."""
_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
    b"transfer-encoding upgrade".split()
)
_OWN = frozenset({b"host", b"content-length", b"accept-encoding", b"expect"})
"""Headers of a request that are the gateway's to set: it reads along in answers, so they come unpacked."""
_LATER = (429, 503)
"""Refusals that are worth another attempt, so that a time is told for it."""
_MAX_HELD_BYTES = 1 << 20
"""Of comments before the first event of a stream, which are held back; what comes after them is an answer."""
_KINDS = {401: "authentication_error", 429: "rate_limit_error"}


@dataclass
class Request:
    """A request as it is sent on."""

    passage: Passage
    url: str
    headers: Headers
    body: RequestBody


class Exchange:
    """Sends requests to upstreams, and their answers back.

    Args:
        gateway: the gateway that decides.
        max_answer_bytes: most bytes of an answer that is not streamed.
        connect_timeout_s: time that an upstream has to take a connection (s).
    """

    def __init__(self, gateway: Gateway, *, max_answer_bytes: int, connect_timeout_s: float) -> None:
        self.gateway = gateway
        self.connect_timeout_s = connect_timeout_s
        self._max_answer_bytes = max_answer_bytes
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close the connections to upstreams."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def open(self) -> aiohttp.ClientSession:
        """The client of all upstreams, to be used in the event loop that serves."""
        if self._session is None:
            self._session = open_session(
                timeout=aiohttp.ClientTimeout(total=None, connect=self.connect_timeout_s),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                skip_auto_headers=("User-Agent", "Accept", "Content-Type"),
            )
        return self._session

    async def serve(self, request: Request, send: Send) -> None:
        """Wait for a turn, send the request on and its answer back."""
        passage = request.passage
        answer = _Answer(self.gateway, passage, send)
        try:
            await self._exchange(request, answer)
        except Refused as refused:
            await answer.fail(refused)
        except LOST as error:
            LOG.warning("lost an upstream: %s", type(error).__name__)
            await answer.fail(Refused(502, "The connection to the upstream was lost", "upstream lost"))
        except asyncio.CancelledError:
            if passage.displaced is not None:
                await answer.fail(passage.displaced)
                return
            if not passage.silent:
                raise
            await answer.fail(Refused(504, "Nothing came from the upstream in time", "upstream silent"))
        except Exception as error:  # its message might quote what a client sent
            LOG.error("unexpected %s in a request", type(error).__name__)
            await answer.fail(Refused(500, "The gateway failed", f"unexpected {type(error).__name__}"))

    async def _exchange(self, request: Request, answer: _Answer) -> None:
        passage, task = request.passage, asyncio.current_task()
        while True:
            assert passage.turn is not None
            await passage.turn
            if passage.displaced is not None:
                raise passage.displaced
            assert passage.upstream is not None
            assert task is not None
            passage.cut = task.cancel
            content = request.body.with_priority(self.gateway.priority_of(passage))
            try:
                response = await self.ask("POST", passage.upstream, request.url, request.headers, content)
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
                LOG.warning("cannot reach %s", passage.upstream.shown_url)
                self.gateway.unreachable(passage)
                continue
            break
        async with response:
            streamed, first = await answer.is_stream(response, request.body.streamed)
            if streamed:
                await answer.stream(response, first)
            else:
                await answer.whole(response, first, self._max_answer_bytes)

    async def ask(
        self, method: str, upstream: Upstream, url: str, headers: Headers, content: bytes | None = None
    ) -> aiohttp.ClientResponse:
        """Ask an upstream.

        Raises:
            aiohttp.ClientError, OSError, asyncio.TimeoutError: it cannot be reached, or was lost.
        """
        passed = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
        if upstream.key is not None:
            passed = [each for each in passed if each[0] != "authorization"]
            passed.append(("authorization", f"Bearer {upstream.key}"))
        passed.append(("accept-encoding", "identity"))
        return await self.open().request(
            method,
            URL(upstream.url + url, encoded=True),
            headers=passed,
            data=content and payload(content),
            allow_redirects=False,
        )


class _Answer:
    """An answer on its way to the client."""

    def __init__(self, gateway: Gateway, passage: Passage, send: Send) -> None:
        self._gateway = gateway
        self._passage = passage
        self._send = send
        self._reader = StreamReader()
        self._started = False

    async def is_stream(self, response: aiohttp.ClientResponse, asked: bool) -> tuple[bool, bytes]:
        """Whether an answer is a stream, and what was read of it to know that.

        Args:
            response: the answer.
            asked: whether a stream was asked for. Some proxies send it under another content type.
        """
        if response.content_type == "text/event-stream" or not asked or response.status != 200:
            return response.content_type == "text/event-stream", b""
        first = b""
        while (found := begins_as_events(first)) is None and len(first) <= _MAX_HELD_BYTES:
            chunk = await response.content.readany()
            if not chunk:
                break
            self._gateway.got(self._passage)
            first += chunk
        return bool(found), first

    async def stream(self, response: aiohttp.ClientResponse, first: bytes = b"") -> None:
        """Pass a stream on, whole events only, each when it comes.

        Args:
            response: the answer.
            first: what was already read of it.
        """
        gateway, passage, reader = self._gateway, self._passage, self._reader
        held, more = b"", True  # until there is an event: it may say that the request is refused
        while more:
            chunk = first or await response.content.readany()
            first, more = b"", bool(chunk)
            try:
                gateway.got(passage, reader.feed(chunk) if chunk else reader.finish())
            except RequestFailed:
                raise Refused(502, "An event of the upstream is too long", "event too long") from None
            if self._started:
                if reader.whole:
                    await self._part(reader.whole)
                continue
            held += reader.whole
            if reader.error is not None and not passage.steps:
                # A stream whose first event is an error, as vLLM refuses a request that wants a stream.
                raise _Told(reader.error, error_status(reader.error))
            if reader.events or len(held) > _MAX_HELD_BYTES:
                await self._start(response.status, passed_on(_raw(response), b"content-length"))
                await self._part(held)
        if reader.error is not None:
            gateway.fail(passage, "error in the stream")
        elif not reader.ended:
            raise Refused(502, "The upstream broke its answer off", "stream broken off")
        else:
            tokens = reader.usage.get("completion_tokens")
            if passage.steps:
                gateway.complete(passage, tokens)
            else:
                gateway.fail(passage, "empty answer")
        await self._end()

    async def whole(self, response: aiohttp.ClientResponse, first: bytes, most: int) -> None:
        """Pass on an answer that is not streamed; its first token comes with the last.

        Args:
            response: the answer.
            first: what was already read of it.
            most: bytes that it may have.
        """
        gateway, passage = self._gateway, self._passage
        parts, size = [first], len(first)
        while chunk := await response.content.readany():
            gateway.got(passage)
            parts.append(chunk)
            size += len(chunk)
            if size > most:
                raise Refused(502, "The upstream's answer is too long", "answer too long")
        body = b"".join(parts)
        if response.status == 200:
            gateway.got(passage, 1)
            gateway.complete(passage, _completion_tokens(body))
        else:
            body = as_error(response.status, body)
            gateway.fail(passage, f"http {response.status}")
        headers = passed_on(
            _raw(response), b"content-length", b"content-type" if response.status != 200 else b""
        )
        if response.status != 200:
            headers += JSON
        if response.status in _LATER and "retry-after" not in response.headers:
            headers.append((b"retry-after", b"1"))
        await self._start(response.status, [*headers, (b"content-length", str(len(body)).encode())])
        await self._part(body)
        await self._end()

    async def fail(self, refused: Refused) -> None:
        """Say that there is no answer, or no more of it."""
        self._gateway.fail(self._passage, refused.reason)
        if not self._started:
            await refuse(self._send, refused)
            return
        await self._part(error_event(_error_of(refused)))
        await self._end()

    async def _start(self, status: int, headers: Headers) -> None:
        self._started = True
        self._passage.on_answer()
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _part(self, content: bytes) -> None:
        self._passage.writing = True
        await self._send({"type": "http.response.body", "body": content, "more_body": True})
        self._passage.writing = False

    async def _end(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})


class _Told(Refused):
    """An upstream's own refusal.

    Args:
        error: error object of the upstream.
        status: HTTP status that goes with it.
    """

    def __init__(self, error: dict[str, Any], status: int) -> None:
        message = str(error.get("message") or "refused")
        super().__init__(status, message, f"refused with {status}", 1.0 if status in _LATER else None)
        self.error = {**error, "message": message}


def _error_of(refused: Refused) -> bytes:
    if isinstance(refused, _Told):
        return json.dumps({"error": refused.error}).encode()
    other = "invalid_request_error" if refused.status < 500 else "server_error"
    return error_json(refused.message, _KINDS.get(refused.status, other), refused.status, refused.param)


async def refuse(send: Send, refused: Refused) -> None:
    """Answer with an error in OpenAI's form."""
    headers = list(JSON)
    if refused.retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(refused.retry_after_s))).encode()))
    await answer(send, refused.status, headers, _error_of(refused))


async def answer(send: Send, status: int, headers: Headers, body: bytes) -> None:
    """Answer at once and whole."""
    headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def passed_on(headers: Headers, *without: bytes) -> Headers:
    """Headers (names in lower case) that are for the other side, too."""
    named = {
        each.strip().lower() for name, value in headers if name == b"connection" for each in value.split(b",")
    }
    dropped = _HOP_BY_HOP | named | set(without)
    return [(name, value) for name, value in headers if name not in dropped]


def sent_on(headers: Headers, by_key: bool) -> Headers:
    """Headers of a request that go to an upstream; an API key that is the gateway's stays here."""
    return passed_on(headers, *_OWN, *([b"authorization"] if by_key else []))


def _raw(response: aiohttp.ClientResponse) -> Headers:
    return [(name.lower(), value) for name, value in response.raw_headers]


def _completion_tokens(body: bytes) -> int | None:
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        return int(json.loads(body)["usage"]["completion_tokens"])
    return None
