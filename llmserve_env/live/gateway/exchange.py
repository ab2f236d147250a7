"""A request's exchange with an upstream: how it is sent on, and how the answer comes back to the client."""

from __future__ import annotations

import asyncio
import logging
import re
from dataclasses import dataclass

import aiohttp
from yarl import URL

from llmserve_env.live.gateway.admission.passage import Passage, Refused
from llmserve_env.live.gateway.gateway import Gateway
from llmserve_env.live.gateway.relay.answer import Answer, UpstreamFailed
from llmserve_env.live.gateway.relay.reply import Headers, Send, passed_on
from llmserve_env.live.gateway.wire import RequestBody
from llmserve_env.live.servers.upstreams import Upstream
from llmserve_env.net.connector import WAS_KEPT
from llmserve_env.net.http import fetch, open_session, payload

LOG = logging.getLogger(__name__)

LOST = (aiohttp.ClientError, OSError, asyncio.TimeoutError)
"""How a connection to an upstream fails."""
_OWN = frozenset({b"host", b"content-length", b"accept-encoding", b"expect"})
"""Headers of a request that are the gateway's to set: it reads along in answers, so they come unpacked."""
_KEPT_TRIES = 3
"""Kept connections that may turn out to be closed, for one request."""
_NO_ASCII = re.compile(rb"[^!-~]")


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
        while True:
            answer = Answer(self.gateway, passage, request.url.partition("?")[0], send)
            try:
                if await self._attempt(request, answer):
                    return
                continue  # it waits again: its upstream took no connection
            except UpstreamFailed as failed:
                failure = failed
            except Refused as refused:
                await answer.fail(UpstreamFailed(refused))
                return
            except LOST as error:
                LOG.warning("lost an upstream: %s", type(error).__name__)
                failure = _lost(answer.began)
            except asyncio.CancelledError:
                if passage.displaced is not None:
                    await answer.fail(UpstreamFailed(passage.displaced))
                    return
                if not (passage.silent or passage.moving):
                    raise
                failure = UpstreamFailed(
                    Refused(504, "Nothing came from the upstream in time", "upstream silent")
                )
            except Exception as error:  # its message might quote what a client sent
                LOG.error("unexpected %s in a request", type(error).__name__)
                reason = f"unexpected {type(error).__name__}"
                await answer.fail(UpstreamFailed(Refused(500, "The gateway failed", reason)))
                return
            if not self.gateway.again(passage, failure.refused.reason, failure.refused.retry_after_s):
                await answer.fail(failure)
                return
            passage.silent = False

    async def _attempt(self, request: Request, answer: Answer) -> bool:
        """Send it to one upstream and pass the answer on; False where it waits for another one."""
        passage, task = request.passage, asyncio.current_task()
        assert passage.turn is not None
        await passage.turn
        if passage.displaced is not None:
            raise passage.displaced
        assert passage.upstream is not None
        assert task is not None
        passage.cut = task.cancel
        priority = self.gateway.priority_of(passage)
        try:
            response = await self.ask(
                "POST",
                passage.upstream,
                request.url,
                request.headers,
                request.body.with_priority(priority),  # by no name: not held for as long as the answer takes
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            self.gateway.unreachable(passage)
            return False
        async with response:
            await answer.take(response, self._max_answer_bytes)
        return True

    async def ask(
        self, method: str, upstream: Upstream, url: str, headers: Headers, content: bytes | None = None
    ) -> aiohttp.ClientResponse:
        """Ask an upstream.

        A connection that was kept may be closed by the upstream in the moment in which it is used again. Then
        the request is sent once more, over another one.

        Raises:
            aiohttp.ClientError, OSError, asyncio.TimeoutError: it cannot be reached, or was lost.
        """
        for left in reversed(range(_KEPT_TRIES + 1)):
            try:
                return await self.open().request(
                    method,
                    URL(upstream.url + url, encoded=True),
                    headers=_headers(upstream, headers),
                    data=content and payload(content),
                    allow_redirects=False,
                )
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError):
                if not (left and WAS_KEPT.get()):
                    raise
        raise AssertionError("the last failure is raised")

    async def get(self, upstream: Upstream, path: str, headers: Headers, max_bytes: int) -> tuple[int, bytes]:
        """Status and body of what an upstream shows; redirects to itself are followed.

        Raises:
            InputError: it is longer.
            aiohttp.ClientError, OSError, asyncio.TimeoutError: it cannot be reached, or was lost.
        """
        return await fetch(self.open(), upstream.url + path, _headers(upstream, headers), max_bytes=max_bytes)


def _lost(began: bool) -> UpstreamFailed:
    """The connection went away, before the answer or in it."""
    if began:
        return UpstreamFailed(Refused(502, "The upstream broke its answer off", "stream broken off"))
    return UpstreamFailed(Refused(502, "The connection to the upstream was lost", "upstream lost"))


def sent_on(headers: Headers, by_key: bool) -> Headers:
    """Headers of a request that go to an upstream; an API key that is the gateway's stays here.

    Raises:
        Refused: 400, of one that could not be passed on as it is.
    """
    passed = passed_on(headers, *_OWN, *([b"authorization"] if by_key else []))
    for name, value in passed:
        if name.isascii() and value.isascii():
            continue
        try:
            name.decode("ascii"), value.decode()
        except UnicodeDecodeError:
            shown = name.decode("ascii", "replace")
            raise Refused(400, f"Invalid header {shown}: expected UTF-8", "invalid header") from None
    return passed


def sent_to(path: str, query: bytes) -> str:
    """Path and query of a request as they are sent on, in ASCII."""
    return path + (
        "?" + _NO_ASCII.sub(lambda byte: b"%%%02X" % ord(byte[0]), query).decode() if query else ""
    )


def _headers(upstream: Upstream, headers: Headers) -> list[tuple[str, str]]:
    """Headers for an upstream, in UTF-8 as aiohttp sends them."""
    passed = [(name.decode(), value.decode()) for name, value in headers]
    if upstream.key is not None:
        passed = [each for each in passed if each[0] != "authorization"]
        passed.append(("authorization", f"Bearer {upstream.key}"))
    return [*passed, ("accept-encoding", "identity")]
