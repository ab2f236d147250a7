"""Requests that take no place in an engine's batch of completions: passed on as they are."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp

from llmserve_env.live.gateway.admission.passage import Refused
from llmserve_env.live.gateway.exchange import LOST, Exchange
from llmserve_env.live.gateway.relay.reply import Headers, Send, passed_on
from llmserve_env.live.servers.upstreams import Upstream

LOG = logging.getLogger(__name__)

ASIDE = {
    "/version": "GET",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/v1/embeddings": "POST",
    "/pooling": "POST",
    "/classify": "POST",
    "/score": "POST",
    "/v1/score": "POST",
    "/rerank": "POST",
    "/v1/rerank": "POST",
    "/v2/rerank": "POST",
    "/v1/audio/transcriptions": "POST",
    "/v1/audio/translations": "POST",
    "/v1/audio/speech": "POST",
}
"""Methods by path."""
_TRIES = 2
_FORM_MODEL = re.compile(rb'name="?model"?\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]{1,512})\r\n')


@dataclass
class AsideRequest:
    """A request as it is sent on.

    Attributes:
        method: its method.
        url: its path and query.
        headers: headers for the upstream.
        content: its body.
        places: upstreams that serve its model; None for all.
        on_answer: called before its client gets the first part of an answer.
    """

    method: str
    url: str
    headers: Headers
    content: bytes
    places: frozenset[Upstream] | None
    on_answer: Callable[[], object]


class Aside:
    """Passes these requests on, to an upstream that is well.

    Args:
        exchange: asks the upstreams.
        silent_s: time after which a request is ended whose upstream sends nothing (s).
    """

    def __init__(self, exchange: Exchange, silent_s: float) -> None:
        self._exchange = exchange
        self._silent_s = silent_s

    async def serve(self, request: AsideRequest, send: Send) -> None:
        """Pass a request on and its answer back, whatever that is.

        Raises:
            Refused: no upstream answers.
        """
        async with await self._ask(request) as response:
            request.on_answer()
            raw = [(name.lower(), value) for name, value in response.raw_headers]
            await send({"type": "http.response.start", "status": response.status, "headers": passed_on(raw)})
            try:
                while chunk := await asyncio.wait_for(response.content.readany(), self._silent_s):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except LOST as error:
                # The answer has begun, so its end is all that can tell: the server closes the connection.
                LOG.warning("lost an upstream: %s", type(error).__name__)
                return
            await send({"type": "http.response.body", "body": b""})

    async def _ask(self, request: AsideRequest) -> aiohttp.ClientResponse:
        gateway = self._exchange.gateway
        tried: list[Upstream] = []
        while len(tried) < _TRIES and (upstream := gateway.aside(request.places, tried)) is not None:
            tried.append(upstream)
            asking = self._exchange.ask(
                request.method, upstream, request.url, request.headers, request.content
            )
            try:
                return await asyncio.wait_for(asking, self._silent_s)
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
                gateway.lost(upstream, "upstream down")
            except asyncio.TimeoutError:
                raise Refused(504, "Nothing came from the upstream in time", "upstream silent") from None
            except LOST:
                gateway.lost(upstream, "upstream lost")
        if tried:
            raise Refused(502, "The connection to the upstream was lost", "upstream lost")
        raise Refused(503, "No upstream can be reached", "upstream down", 1.0)


def form_model(content: bytes) -> str | None:
    """The model that a form names, as audio is sent; None where it names none."""
    found = _FORM_MODEL.search(content)
    return None if found is None else found[1].decode(errors="replace")
