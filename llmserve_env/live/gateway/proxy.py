"""The gateway's HTTP side: an ASGI application that streams between clients and vLLM servers.

    POST /v1/completions, /v1/chat/completions   by the gateway's rules, streamed or not
    GET  /v1/models                              of all upstreams that answer
    GET  /health                                 200 while an upstream is well, else 503
    GET  /metrics                                of all upstreams that answer, each with a label `upstream`
    GET  /gateway/metrics, /dashboard            of the gateway itself, see `dashboard`

Bodies pass as they are, but for a request's `priority`. Errors have OpenAI's form, whoever makes them. What
clients send or get is never logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from yarl import URL

from llmserve_env.errors import InputError
from llmserve_env.live.gateway.admission.passage import Passage, Refused
from llmserve_env.live.gateway.callers import Callers
from llmserve_env.live.gateway.dashboard import PATHS, Dashboard
from llmserve_env.live.gateway.exposition import merged
from llmserve_env.live.gateway.gateway import Gateway
from llmserve_env.live.gateway.history import History
from llmserve_env.live.gateway.wire import RequestBody, as_error, error_event, error_json
from llmserve_env.live.servers.stream import StreamReader
from llmserve_env.live.servers.upstreams import Upstream
from llmserve_env.net.http import open_session, payload

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

LOG = logging.getLogger(__name__)

_COMPLETIONS = ("/v1/completions", "/v1/chat/completions")
_TICK_S = 0.1
_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
    b"transfer-encoding upgrade".split()
)
_OWN = frozenset({b"host", b"content-length", b"accept-encoding", b"expect"})
"""Headers of a request that are the gateway's to set: it reads along in answers, so they come unpacked."""
_JSON = [(b"content-type", b"application/json")]
_LOST = (aiohttp.ClientError, OSError, asyncio.TimeoutError)
_LATER = (429, 503)
"""Refusals that are worth another attempt, so that a time is told for it."""
_KINDS = {401: "authentication_error", 429: "rate_limit_error"}


class Proxy:
    """Serves a gateway over HTTP.

    Args:
        gateway: the gateway that decides.
        tenants: tells callers apart; the same as the gateway's.
        history: what the dashboard shows; None for one without windows.
        max_body_bytes: most bytes of a request.
        max_held_bytes: most bytes of all requests that wait or are under way; more are refused with 429.
        max_answer_bytes: most bytes of an answer that is not streamed.
        body_timeout_s: time that a client has to send a request (s).
        connect_timeout_s: time that an upstream has to take a connection (s).

    Raises:
        InputError: tenants that are not the gateway's.
    """

    def __init__(
        self,
        gateway: Gateway,
        tenants: Callers,
        *,
        history: History | None = None,
        max_body_bytes: int = 8 << 20,
        max_held_bytes: int = 512 << 20,
        max_answer_bytes: int = 64 << 20,
        body_timeout_s: float = 30.0,
        connect_timeout_s: float = 5.0,
    ) -> None:
        if tenants.all != gateway.tenants:
            raise InputError("expected the gateway's", field="tenants")
        self.gateway = gateway
        self.history = history or History(gateway)
        self._dashboard = Dashboard(self.history)
        self._tenants = tenants
        self._max_body_bytes = max_body_bytes
        self._max_held_bytes = max_held_bytes
        self._max_answer_bytes = max_answer_bytes
        self._body_timeout_s = body_timeout_s
        self._timeout = aiohttp.ClientTimeout(total=None, connect=connect_timeout_s)
        self._held_bytes = 0
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        path, method = scope["path"], scope["method"]
        try:
            if path in _COMPLETIONS:
                _only(method, "POST")
                await self._complete(scope, receive, send)
            elif path in ("/v1/models", "/health", "/metrics"):
                _only(method, "GET")
                answer = {"/v1/models": self._models, "/health": self._health, "/metrics": self._metrics}
                await _answer(send, *await answer[path](scope["headers"]))
            elif path in PATHS:
                _only(method, "GET")
                await _answer(send, *await self._dashboard.answer(path, scope["query_string"]))
            else:
                raise Refused(404, f"No such path here; there are {', '.join(_COMPLETIONS)}", "path")
        except Refused as refused:
            await _refuse(send, refused)
        except Exception as error:  # its message might quote what somebody sent
            LOG.error("unexpected %s at %s", type(error).__name__, path)
            await _refuse(send, Refused(500, "The gateway failed", "unexpected"))

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        ticking = None
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self._connected()
                ticking = asyncio.create_task(self._tick())
                await send({"type": "lifespan.startup.complete"})
            else:
                if ticking is not None:
                    ticking.cancel()
                await self.close()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def close(self) -> None:
        """Close the connections to upstreams."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            try:
                self.gateway.tick()
            except Exception as error:  # a reader of KV caches may be anybody's
                LOG.error("unexpected %s in a tick", type(error).__name__)

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = open_session(
                timeout=self._timeout,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                skip_auto_headers=("User-Agent", "Accept", "Content-Type"),
            )
        return self._session

    # ------------------------------------------------------------------------------------------- completions

    async def _complete(self, scope: Message, receive: Receive, send: Send) -> None:
        """A completion, from its arrival to its end."""
        with self._turning_away():
            tenant, by_key = self._tenant(scope["headers"])
            content = await self._body(scope["headers"], receive)
        if content is None:
            return
        try:
            with self._turning_away():
                body = _read(content)
            passage = self.gateway.enter(tenant, body.prompt_tokens)
            headers = _sent_on(scope["headers"], by_key)
            query = scope["query_string"].decode("latin-1")
            url = f"{scope['path']}?{query}" if query else scope["path"]
            serving = asyncio.create_task(self._serve(_Request(passage, url, headers, body), send))
            hung_up = asyncio.create_task(_hung_up(receive))
            try:
                await asyncio.wait({serving, hung_up}, return_when=asyncio.FIRST_COMPLETED)
                serving.cancel()  # does nothing where it is done
                await serving
            except asyncio.CancelledError:
                if not serving.done():  # the server ends
                    serving.cancel()
                    self.gateway.fail(passage, "gateway stopped")
                    raise
            finally:
                # Only now that the upstream's connection is closed: its place is free.
                reason = "client went away" if hung_up.done() else "client does not read"
                self.gateway.fail(passage, reason, given_up=True)  # unless it is over
                hung_up.cancel()
        finally:
            self._held_bytes -= len(content)

    @contextlib.contextmanager
    def _turning_away(self) -> Iterator[None]:
        """Counts a request that is refused here, before it is one of a tenant's."""
        try:
            yield
        except Refused as refused:
            self.history.turned_away[refused.reason] += 1
            raise

    def _tenant(self, headers: Headers) -> tuple[int, bool]:
        """Who sends a request, and whether the gateway's key told."""
        tenant, by_key = self._tenants.of(headers)
        if tenant is None:
            raise Refused(401, "Incorrect API key provided", "unknown tenant")
        return tenant, by_key

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """A request's body, counted as held; None of one whose client hung up."""
        stated = next((value for name, value in headers if name == b"content-length"), b"0")
        self._check_size(int(stated) if stated.isdigit() else 0)
        parts: list[bytes] = []

        async def read() -> bool:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return False
                part = message.get("body", b"")
                parts.append(part)
                self._held_bytes += len(part)
                self._check_size(sum(map(len, parts)))
                more = message.get("more_body", False)
            return True

        whole = False
        try:
            whole = await asyncio.wait_for(read(), self._body_timeout_s)
        except asyncio.TimeoutError:
            raise Refused(408, "The request's body did not come in time", "body timeout") from None
        finally:
            if not whole:
                self._held_bytes -= sum(map(len, parts))
        return b"".join(parts) if whole else None

    def _check_size(self, size: int) -> None:
        if size > self._max_body_bytes:
            raise Refused(413, f"A request may have {self._max_body_bytes} bytes", "body too large")
        if self._held_bytes > self._max_held_bytes:
            raise Refused(429, "Too many requests wait here: try again later", "memory", 1.0)

    async def _serve(self, request: _Request, send: Send) -> None:
        """Wait for a turn, send the request on and its answer back."""
        passage = request.passage
        answer = _Answer(self.gateway, passage, send)
        try:
            await self._exchange(request, answer)
        except Refused as refused:
            await answer.fail(refused)
        except _LOST as error:
            LOG.warning("lost an upstream: %s", type(error).__name__)
            await answer.fail(Refused(502, "The connection to the upstream was lost", "upstream lost"))
        except asyncio.CancelledError:
            if not passage.silent:
                raise
            await answer.fail(Refused(504, "Nothing came from the upstream in time", "upstream silent"))
        except Exception as error:  # its message might quote what a client sent
            LOG.error("unexpected %s in a request", type(error).__name__)
            await answer.fail(Refused(500, "The gateway failed", f"unexpected {type(error).__name__}"))

    async def _exchange(self, request: _Request, answer: _Answer) -> None:
        passage, task = request.passage, asyncio.current_task()
        while True:
            assert passage.turn is not None
            await passage.turn
            assert passage.upstream is not None
            assert task is not None
            passage.cut = task.cancel
            content = request.body.with_priority(self.gateway.priority_of(passage))
            try:
                response = await self._ask("POST", passage.upstream, request.url, request.headers, content)
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
                LOG.warning("cannot reach %s", passage.upstream.shown_url)
                self.gateway.unreachable(passage)
                continue
            break
        async with response:
            if response.content_type == "text/event-stream":
                await answer.stream(response)
            else:
                await answer.whole(response, self._max_answer_bytes)

    async def _ask(
        self, method: str, upstream: Upstream, url: str, headers: Headers, content: bytes | None = None
    ) -> aiohttp.ClientResponse:
        passed = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
        if upstream.key is not None:
            passed = [each for each in passed if each[0] != "authorization"]
            passed.append(("authorization", f"Bearer {upstream.key}"))
        passed.append(("accept-encoding", "identity"))
        return await self._connected().request(
            method,
            URL(upstream.url + url, encoded=True),
            headers=passed,
            data=content and payload(content),
            allow_redirects=False,
        )

    # ------------------------------------------------------------------------------- the upstreams themselves

    async def _models(self, headers: Headers) -> tuple[int, Headers, bytes]:
        _, by_key = self._tenant(headers)
        asked = await self._ask_all("/v1/models", _sent_on(headers, by_key))
        answers = [each for each in asked if each is not None]
        good = [body for status, body in answers if status == 200]
        if not good:
            if answers:
                return answers[0][0], _JSON, as_error(*answers[0])
            raise Refused(503, "No upstream can be reached", "upstream down", 1.0)
        if len(good) == 1:
            return 200, _JSON, good[0]
        models = {each["id"]: each for body in good for each in json.loads(body)["data"]}
        return 200, _JSON, json.dumps({"object": "list", "data": list(models.values())}).encode()

    async def _health(self, headers: Headers) -> tuple[int, Headers, bytes]:
        answers = await self._ask_all("/health", [])
        well = [answer is not None and answer[0] == 200 for answer in answers]
        upstreams = [
            {
                "url": each.shown_url,
                "well": is_well,
                "running": each.running,
                "kv_usage": self.gateway.kv_usage(each),
            }
            for each, is_well in zip(self.gateway.upstreams, well, strict=True)
        ]
        body = {"well": any(well), "waiting": self.gateway.waiting, "upstreams": upstreams}
        return 200 if any(well) else 503, _JSON, json.dumps(body).encode()

    async def _metrics(self, headers: Headers) -> tuple[int, Headers, bytes]:
        answers = await self._ask_all("/metrics", [])
        texts = {
            each.shown_url: answer[1].decode()
            for each, answer in zip(self.gateway.upstreams, answers, strict=True)
            if answer is not None and answer[0] == 200
        }
        if not texts:
            raise Refused(503, "No upstream can be reached", "upstream down", 1.0)
        return 200, [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")], merged(texts).encode()

    async def _ask_all(self, path: str, headers: Headers) -> list[tuple[int, bytes] | None]:
        """Status and body of each upstream's answer; None without one."""

        async def ask(upstream: Upstream) -> tuple[int, bytes] | None:
            try:
                async with await self._ask("GET", upstream, path, headers) as response:
                    return response.status, await response.read()
            except _LOST:
                return None

        async def bounded(upstream: Upstream) -> tuple[int, bytes] | None:
            with contextlib.suppress(asyncio.TimeoutError):
                return await asyncio.wait_for(ask(upstream), self._timeout.connect)
            return None

        return await asyncio.gather(*map(bounded, self.gateway.upstreams))


@dataclass
class _Request:
    """A request as it is sent on."""

    passage: Passage
    url: str
    headers: Headers
    body: RequestBody


class _Answer:
    """An answer on its way to the client."""

    def __init__(self, gateway: Gateway, passage: Passage, send: Send) -> None:
        self._gateway = gateway
        self._passage = passage
        self._send = send
        self._reader = StreamReader()
        self._started = False

    async def stream(self, response: aiohttp.ClientResponse) -> None:
        """Pass a stream on, each chunk when it comes."""
        gateway, passage, reader = self._gateway, self._passage, self._reader
        held = b""  # until the first event is whole: it may say that the request is refused
        while chunk := await response.content.readany():
            gateway.got(passage, reader.feed(chunk))
            if self._started:
                await self._part(chunk)
                continue
            held += chunk
            if reader.error is not None and not passage.steps:
                raise _refusal(reader.error)
            if reader.events:
                await self._start(response.status, _passed(_raw(response), b"content-length"))
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

    async def whole(self, response: aiohttp.ClientResponse, most: int) -> None:
        """Pass on an answer that is not streamed; its first token comes with the last."""
        gateway, passage = self._gateway, self._passage
        parts, size = [], 0
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
        headers = _passed(
            _raw(response), b"content-length", b"content-type" if response.status != 200 else b""
        )
        if response.status != 200:
            headers += _JSON
        if response.status in _LATER and "retry-after" not in response.headers:
            headers.append((b"retry-after", b"1"))
        await self._start(response.status, [*headers, (b"content-length", str(len(body)).encode())])
        await self._part(body)
        await self._end()

    async def fail(self, refused: Refused) -> None:
        """Say that there is no answer, or no more of it."""
        self._gateway.fail(self._passage, refused.reason)
        if not self._started:
            await _refuse(self._send, refused)
            return
        error = error_event(_error_of(refused))
        await self._part((b"\n\n" if self._reader.within_event else b"") + error)
        await self._end()

    async def _start(self, status: int, headers: Headers) -> None:
        self._started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _part(self, content: bytes) -> None:
        self._passage.writing = True
        await self._send({"type": "http.response.body", "body": content, "more_body": True})
        self._passage.writing = False

    async def _end(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})


def _read(content: bytes) -> RequestBody:
    try:
        return RequestBody(content)
    except InputError as error:
        raise Refused(400, f"Invalid body: {error.reason}", "invalid body") from None


def _only(method: str, expected: str) -> None:
    if method != expected:
        raise Refused(405, f"Expected {expected}", "method")


def _error_of(refused: Refused) -> bytes:
    other = "invalid_request_error" if refused.status < 500 else "server_error"
    return error_json(refused.message, _KINDS.get(refused.status, other), refused.status)


async def _refuse(send: Send, refused: Refused) -> None:
    headers = list(_JSON)
    if refused.retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(refused.retry_after_s))).encode()))
    await _answer(send, refused.status, headers, _error_of(refused))


async def _answer(send: Send, status: int, headers: Headers, body: bytes) -> None:
    headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _passed(headers: Headers, *without: bytes) -> Headers:
    """Headers (names in lower case) that are for the other side, too."""
    named = {
        each.strip().lower() for name, value in headers if name == b"connection" for each in value.split(b",")
    }
    dropped = _HOP_BY_HOP | named | set(without)
    return [(name, value) for name, value in headers if name not in dropped]


def _sent_on(headers: Headers, by_key: bool) -> Headers:
    """Of a request's; an API key that is the gateway's stays here."""
    return _passed(headers, *_OWN, *([b"authorization"] if by_key else []))


def _raw(response: aiohttp.ClientResponse) -> Headers:
    return [(name.lower(), value) for name, value in response.raw_headers]


def _refusal(error: dict[str, Any]) -> Refused:
    """A stream whose first event is an error, as vLLM refuses a request that wants a stream."""
    code = error.get("code")
    status = code if isinstance(code, int) and 400 <= code <= 599 else 502
    retry_after_s = 1.0 if status in _LATER else None
    return Refused(status, str(error.get("message") or "refused"), f"refused with {status}", retry_after_s)


def _completion_tokens(body: bytes) -> int | None:
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        return int(json.loads(body)["usage"]["completion_tokens"])
    return None
