"""An upstream's answer on its way to the client.

A stream passes on event by event, each whole: what a client gets of an answer that breaks off can be read,
and an error that follows is an event of its own. What is neither a stream nor JSON with choices is no
completion, whatever its status says.
"""

from __future__ import annotations

import contextlib
import json
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from llmserve_env.live.gateway.admission.passage import Passage, Refused
from llmserve_env.live.gateway.relay.reply import JSON, error_of, passed_on, refuse, reply
from llmserve_env.live.gateway.wire import as_error, error_event
from llmserve_env.live.servers.events import begins_as_events
from llmserve_env.live.servers.fault import Owner, fault_of
from llmserve_env.live.servers.stream import RequestFailed, StreamReader, error_status, usage_of_response

if TYPE_CHECKING:
    import aiohttp

    from llmserve_env.live.gateway.gateway import Gateway
    from llmserve_env.live.gateway.relay.reply import Headers, Send

_LATER = (429, 503)
"""Refusals that are worth another attempt, so that a time is told for it."""
_HOLDS = {"/v1/completions": "choices", "/v1/chat/completions": "choices", "/v1/responses": "output"}
"""What an answer holds, by path; of others nothing is known but that they are JSON objects."""
_MAX_COMMENTS_BYTES = 1 << 20
"""Of comments before the first event of a stream, which are held back; what comes after them is an answer."""
_PROOF_PIECES = 64
_PROOF_BYTES = 64 << 10
"""How far a stream comes until its upstream has proven that it is well again, if it does not end before."""


class UpstreamFailed(Exception):
    """An upstream's answer is none.

    Args:
        refused: what the client is told, if no other upstream answers.
        reply: headers and body for it (default: an error with the message).
    """

    def __init__(self, refused: Refused, reply: tuple[Headers, bytes] | None = None) -> None:
        super().__init__(refused.message)
        self.refused = refused
        self.reply = reply


class Answer:
    """One attempt to answer a request.

    Args:
        gateway: keeps account.
        passage: the request.
        path: its path.
        send: ASGI's.

    Attributes:
        began: whether something came from the upstream.
    """

    def __init__(self, gateway: Gateway, passage: Passage, path: str, send: Send) -> None:
        self.began = False
        self._gateway = gateway
        self._passage = passage
        self._path = path
        self._send = send
        self._reader = StreamReader(apart=passage.sequences > 1)
        self._started = False

    async def take(self, response: aiohttp.ClientResponse, most: int) -> None:
        """Pass an answer on.

        Args:
            response: the upstream's.
            most: most bytes of one that is not streamed.

        Raises:
            UpstreamFailed: it is no completion, or not a whole one.
            aiohttp.ClientError, OSError: the connection was lost.
        """
        if response.status != 200:
            raise _refusal(self._passage, response, await self._body(response, b"", most))
        headers = passed_on(_raw(response), b"content-length")
        first = b""
        streamed = True if response.content_type == "text/event-stream" else None
        while streamed is None and len(first) <= _MAX_COMMENTS_BYTES:
            chunk = await self._read(response)
            if not chunk:
                break
            first += chunk
            streamed = begins_as_events(first)
        if streamed:  # some proxies send it under another content type
            try:
                await self._stream(response, first, headers)
            except RequestFailed:
                said = Refused(502, "An event of the upstream is too long", "event too long")
                raise UpstreamFailed(said) from None
        else:
            packed = response.headers.get("content-encoding", "identity").lower() != "identity"
            await self._whole(await self._body(response, first, most), headers, packed=packed)

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        chunk = await response.content.readany()
        if chunk:
            self.began = True
            if not chunk.isspace():  # which some proxies send while they wait
                self._gateway.got(self._passage)
        return chunk

    async def _stream(self, response: aiohttp.ClientResponse, first: bytes, headers: Headers) -> None:
        """Pass a stream on, whole events only, each when it comes."""
        gateway, passage, reader = self._gateway, self._passage, self._reader
        if await self._begin(response, first, headers):
            read, got, send = response.content.readany, gateway.got, self._send
            while chunk := await read():  # here nearly all of a gateway's time goes
                events = reader.events
                if came := reader.feed(chunk):
                    got(passage, came, reader.sequences)
                elif reader.events > events or reader.within_event:
                    got(passage)
                if reader.garbled and reader.error is None:
                    raise _no_completion()
                if whole := reader.whole:  # as `_part`, without a call
                    passage.writing = True
                    await send({"type": "http.response.body", "body": whole, "more_body": True})
                    passage.writing = False
            got(passage, reader.finish(), reader.sequences)
            if reader.whole:
                await self._part(reader.whole)
        if reader.error is not None:
            gateway.fail(passage, "error in the stream")
        elif not reader.ended:
            raise UpstreamFailed(Refused(502, "The upstream broke its answer off", "stream broken off"))
        elif passage.steps or reader.finished:
            gateway.complete(passage, _count(reader.usage))
        else:
            gateway.fail(passage, "empty answer")
        await self._end()

    async def _begin(self, response: aiohttp.ClientResponse, first: bytes, headers: Headers) -> bool:
        """Pass the beginning of a stream on, once it is known to be one; whether more may come."""
        gateway, passage, reader = self._gateway, self._passage, self._reader
        proving = gateway.held_back(passage)  # nothing is passed on yet: another upstream can still answer
        held, more = b"", True
        untold, of = 0, list[int]()  # pieces of the answer that are not counted yet, and their sequences
        while more:
            chunk = first or await response.content.readany()
            first, more, events = b"", bool(chunk), reader.events
            untold += reader.feed(chunk) if chunk else reader.finish()
            of += reader.sequences
            if more and reader.garbled and reader.error is None:
                raise _no_completion()
            held += reader.whole
            self.began = self.began or more
            if reader.events > events or reader.within_event:  # comments are sent while an engine hangs
                gateway.got(passage)
            self._check(untold, proving)
            if proving and (untold >= _PROOF_PIECES or len(held) >= _PROOF_BYTES):
                gateway.proven(passage)
                proving = False
            # Of a single event nothing is known if it is no piece of an answer.
            known = untold or reader.finished or reader.events > 1 or len(held) > _MAX_COMMENTS_BYTES
            if known and not proving:
                break
        if reader.error is None and not (more or reader.ended):
            raise UpstreamFailed(Refused(502, "The upstream broke its answer off", "stream broken off"))
        if not (more or untold or reader.finished):
            raise _no_completion()
        gateway.got(passage, untold, of)
        await self._start(200, headers)
        await self._part(held)
        return more

    def _check(self, steps: int, proving: bool) -> None:
        """Whether a stream of which nothing was passed on yet goes well, with so many pieces of an answer."""
        reader = self._reader
        if self._started:
            return
        if reader.error is not None and not steps:
            raise _refusal_in_stream(reader.error)
        if reader.error is not None and proving:
            raise UpstreamFailed(Refused(502, "The upstream failed", "error in the stream"))
        if reader.garbled and not steps:
            raise _no_completion()

    async def _body(self, response: aiohttp.ClientResponse, first: bytes, most: int) -> bytes:
        """An answer that is not streamed."""
        parts, size = [first], len(first)
        while chunk := await self._read(response):
            parts.append(chunk)
            size += len(chunk)
            if size > most:
                raise UpstreamFailed(Refused(502, "The upstream's answer is too long", "answer too long"))
        return b"".join(parts)

    def _told(self, body: bytes) -> tuple[Any, bool]:
        """What a whole answer tells of its tokens, and whether it says that it failed.

        Raises:
            UpstreamFailed: it is no completion.
        """
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            answer = None
        held = _HOLDS.get(self._path)
        if not isinstance(answer, dict) or (
            held is not None
            and not (isinstance(answer.get(held), list) and (answer[held] or held == "output"))
        ):
            raise _no_completion()
        if held == "output":
            return usage_of_response(answer), answer.get("status") == "failed"
        return answer.get("usage"), False

    async def _whole(self, body: bytes, headers: Headers, *, packed: bool) -> None:
        """Pass an answer on that is not streamed; its first token comes with the last.

        Args:
            body: the whole answer.
            headers: headers for the client.
            packed: whether it is compressed, though nobody asked for that: it is not read then.
        """
        usage, failed = (None, False) if packed else self._told(body)
        self._gateway.got(self._passage, 1)
        if failed:
            self._gateway.fail(self._passage, "error in the stream")
        self._gateway.complete(self._passage, _count(usage))
        self._passage.answered = self._started = True
        self._passage.on_answer()
        await reply(self._send, 200, headers, body)

    async def fail(self, failed: UpstreamFailed) -> None:
        """Say that there is no answer, or no more of it."""
        gateway, passage, refused = self._gateway, self._passage, failed.refused
        if fault_of(refused.reason).owner is Owner.CLIENT and not self._started:
            gateway.reject(passage, refused.reason)
        else:
            gateway.fail(passage, refused.reason)
        if self._started:
            await self._part(error_event(error_of(refused)))
            await self._end()
        elif failed.reply is not None:
            await reply(self._send, refused.status, *failed.reply)
        else:
            await refuse(self._send, refused)

    async def _start(self, status: int, headers: Headers) -> None:
        if not self._started:
            self._passage.answered = self._started = True
            self._passage.on_answer()
            await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _part(self, content: bytes) -> None:
        self._passage.writing = True
        await self._send({"type": "http.response.body", "body": content, "more_body": True})
        self._passage.writing = False

    async def _end(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})


def _refusal(passage: Passage, response: aiohttp.ClientResponse, body: bytes) -> UpstreamFailed:
    """An answer with another status than 200."""
    status = response.status
    if status in (401, 403) and passage.upstream is not None and passage.upstream.key is not None:
        message = "The upstream does not take the gateway's key"
        return UpstreamFailed(Refused(502, message, "key refused"))
    reason = f"http {status}"
    if not 400 <= status <= 599:  # neither an answer nor an error
        return UpstreamFailed(Refused(502, f"The upstream answered with HTTP {status}", reason))
    headers = passed_on(_raw(response), b"content-length", b"content-type") + JSON
    told = response.headers.get("retry-after")
    if status in _LATER and told is None:
        headers.append((b"retry-after", b"1"))
    refused = Refused(status, "The upstream refused", reason, None if told is None else _seconds(told))
    return UpstreamFailed(refused, (headers, as_error(status, body)))


def _refusal_in_stream(error: dict[str, Any]) -> UpstreamFailed:
    """A stream whose first event is an error, as vLLM refuses a request that wants a stream."""
    status = error_status(error)
    message = str(error.get("message") or "refused")
    headers = [(b"retry-after", b"1")] if status in _LATER else []
    body = json.dumps({"error": {**error, "message": message}}).encode()
    return UpstreamFailed(Refused(status, message, f"refused with {status}"), ([*JSON, *headers], body))


def _no_completion() -> UpstreamFailed:
    return UpstreamFailed(Refused(502, "The upstream's answer is no completion", "no completion"))


def _count(usage: Any) -> int | None:
    """Tokens of an answer as its upstream counts them; None where it does not."""
    try:
        return int(usage["completion_tokens"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _seconds(retry_after: str) -> float | None:
    """Time of a Retry-After (s), which is a number or a date."""
    with contextlib.suppress(ValueError, OverflowError):
        return max(0.0, float(retry_after))
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    return None


def _raw(response: aiohttp.ClientResponse) -> Headers:
    return [(name.lower(), value) for name, value in response.raw_headers]
