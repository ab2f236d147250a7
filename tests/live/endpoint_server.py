"""Real HTTP servers that speak as an OpenAI-compatible endpoint does, well and badly."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import uvicorn


class _Server(uvicorn.Server):
    def __init__(self, config):
        super().__init__(config)
        self.ready = threading.Event()

    async def startup(self, sockets=None):
        await super().startup(sockets=sockets)
        self.ready.set()


@contextmanager
def serving(app) -> Iterator[str]:
    """The URL of an ASGI application's server, with /v1."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
        server = _Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            assert server.ready.wait(30)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join()


def closed_url() -> str:
    """A URL where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


@dataclass
class Reply:
    """An answer of an endpoint; without a body it never comes."""

    body: object
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class ChatEndpoint:
    """Answers chat completions as `reply(index of the request, its body)` says."""

    reply: Callable[[int, dict], Reply]
    requests: list[dict] = field(default_factory=list)

    async def __call__(self, scope, receive, send):
        body = await _body(receive)
        assert scope["path"] == "/v1/chat/completions"
        self.requests.append(body)
        answer = self.reply(len(self.requests) - 1, body)
        if answer.body is None:
            await _hung_up(receive)
            return
        text = answer.body if isinstance(answer.body, str) else json.dumps(answer.body)
        headers = {"content-type": "application/json", **answer.headers}
        await _start(send, answer.status, headers)
        await send({"type": "http.response.body", "body": text.encode()})


def chat(
    content: str | None, *, finish: str = "stop", refusal: str | None = None, usage: bool = True
) -> Reply:
    """A chat completion."""
    message = {"role": "assistant", "content": content, "refusal": refusal}
    body = {
        "id": "c",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
    }
    if usage:
        body["usage"] = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return Reply(body)


@dataclass
class CompletionEndpoint:
    """Streams completions: one piece of text for each token, as many as asked. Answers GETs with 404.

    Args:
        lines: SSE data to send in place of an answer, for a request's body.
        refuse: HTTP status with which a request's body is refused, if it is.
        held: whether requests wait for `release`.
        others: bodies of GETs by path, in place of the 404.
    """

    lines: Callable[[dict], list[str]] | None = None
    refuse: Callable[[dict], int | None] = lambda body: None
    held: bool = False
    others: dict[str, str] = field(default_factory=dict)
    requests: list[dict] = field(default_factory=list)
    authorization: list[str] = field(default_factory=list)
    hung_up: threading.Event = field(default_factory=threading.Event)
    peak: int = 0

    def __post_init__(self):
        self._now = 0
        self._released = threading.Event()
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        if not self.held:
            self._released.set()

    def release(self):
        """Answer those that wait, and all after them at once."""
        self._released.set()
        for loop, event in self._waiting:
            loop.call_soon_threadsafe(event.set)

    async def __call__(self, scope, receive, send):
        if scope["method"] == "GET":
            found = self.others.get(scope["path"])
            await _start(send, 404 if found is None else 200, {"content-type": "text/plain"})
            await send({"type": "http.response.body", "body": (found or "").encode()})
            return
        body = await _body(receive)
        if body is None:
            return
        assert scope["path"] == "/v1/completions"
        self.requests.append(body)
        self.authorization.append(dict(scope["headers"]).get(b"authorization", b"").decode())
        self._now += 1
        self.peak = max(self.peak, self._now)
        try:
            await self._answer(body, receive, send)
        finally:
            self._now -= 1

    async def _answer(self, body, receive, send):
        status = self.refuse(body)
        if status is not None:
            await _start(send, status, {"content-type": "application/json"})
            await send({"type": "http.response.body", "body": b'{"error": {"message": "refused"}}'})
            return
        if not self._released.is_set():
            released = asyncio.Event()
            self._waiting.append((asyncio.get_running_loop(), released))
            waits = [asyncio.create_task(released.wait()), asyncio.create_task(_hung_up(receive))]
            done, left = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for task in left:
                task.cancel()
            if waits[0] not in done:
                self.hung_up.set()
                return
        await _start(send, 200, {"content-type": "text/event-stream"})
        for line in (self.lines or answer)(body):
            await send(
                {"type": "http.response.body", "body": f"data: {line}\n\n".encode(), "more_body": True}
            )
        await send({"type": "http.response.body", "body": b""})


def answer(body: dict) -> list[str]:
    """SSE data of a whole answer."""
    count = body["max_tokens"]
    lines = [piece("word ", "length" if i == count - 1 else None) for i in range(count)]
    if body.get("stream_options", {}).get("include_usage"):
        lines.append(usage(len(str(body["prompt"]).split()), count))
    return [*lines, "[DONE]"]


def piece(text: str, finish: str | None = None) -> str:
    return json.dumps({"choices": [{"index": 0, "text": text, "finish_reason": finish}]})


def usage(prompt: int, completion: int) -> str:
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return json.dumps({"choices": [], "usage": counts})


async def _body(receive) -> dict | None:
    """The body of a request; None of one whose client hung up meanwhile."""
    content, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        content += message.get("body", b"")
        more = message.get("more_body", False)
    return json.loads(content)


async def _hung_up(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _start(send, status: int, headers: dict[str, str]) -> None:
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})


WAIT, BREAK = object(), object()
"""In a script: wait until the test says `go`; cut the connection."""


@dataclass
class Asked:
    """A request as an endpoint got it."""

    path: str
    query: str
    headers: dict[str, str]
    content: bytes
    peer: tuple[str, int]
    go: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    hung_up: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def body(self) -> dict:
        return json.loads(self.content)


@dataclass
class ScriptedEndpoint:
    """Answers as scripted, chunk by chunk; for tests that run in one event loop with it.

    Args:
        script: of a request: chunks to send, WAIT, BREAK.
        status: of all answers.
        headers: of all answers.
        others: bodies of GETs by path.
    """

    script: Callable[[Asked], Iterable[object]]
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "text/event-stream"})
    others: dict[str, bytes] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    peak: int = 0

    def __post_init__(self):
        self._now = 0
        self._came = asyncio.Condition()

    async def came(self, count: int) -> Asked:
        """Wait until so many requests have come; returns the last of them."""
        async with self._came:
            await asyncio.wait_for(self._came.wait_for(lambda: len(self.asked) >= count), 30)
        return self.asked[count - 1]

    async def __call__(self, scope, receive, send):
        if scope["method"] == "GET":
            body = self.others.get(scope["path"])
            await _start(send, 404 if body is None else 200, {"content-type": "text/plain"})
            await send({"type": "http.response.body", "body": body or b"nothing here"})
            return
        content, more = b"", True
        while more:
            message = await receive()
            content += message["body"]
            more = message["more_body"]
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        asked = Asked(scope["path"], scope["query_string"].decode(), headers, content, scope["client"])
        self._now += 1
        self.peak = max(self.peak, self._now)
        async with self._came:
            self.asked.append(asked)
            self._came.notify_all()
        watching = asyncio.create_task(self._watch(receive, asked))
        try:
            await self._answer(asked, scope, send)
        finally:
            watching.cancel()
            self._now -= 1

    async def _answer(self, asked, scope, send):
        started = False
        for part in self.script(asked):
            if part is WAIT:
                going, hung_up = (
                    asyncio.create_task(each) for each in (asked.go.acquire(), asked.hung_up.wait())
                )
                await asyncio.wait({going, hung_up}, return_when=asyncio.FIRST_COMPLETED)
                going.cancel()
                hung_up.cancel()
                if asked.hung_up.is_set():
                    return
                continue
            if part is BREAK:
                raise ConnectionAbortedError
            if not started:
                await _start(send, self.status, self.headers)
                started = True
            await send({"type": "http.response.body", "body": part, "more_body": True})
        if not started:
            await _start(send, self.status, self.headers)
        await send({"type": "http.response.body", "body": b""})

    async def _watch(self, receive, asked):
        await _hung_up(receive)
        asked.hung_up.set()


class Running:
    """An ASGI application's server in this event loop.

    Args:
        app: the application.
        port: 0 for a free one.
        lifespan: as uvicorn has it.
        options: further arguments of `uvicorn.Config`.

    Attributes:
        url: of it, without /v1.
    """

    def __init__(self, app, port=0, lifespan="off", **options):
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            app,
            log_level="critical",
            lifespan=lifespan,
            timeout_graceful_shutdown=1,
            timeout_keep_alive=600,  # no client has to be quick to use a connection again
            server_header=False,
            **options,
        )
        self._server = _Server(config)
        self._server.capture_signals = nullcontext
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))

    async def __aenter__(self):
        while not self._server.started:
            await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_):
        self._server.should_exit = True
        await self._serving
        self._socket.close()

    async def kill(self):
        """As if its process were killed: all connections are gone, and nobody listens."""
        for server in self._server.servers:
            server.close()
        for connection in tuple(self._server.server_state.connections):
            connection.transport.abort()
        self._server.force_exit = True
        await self.__aexit__()


def event(data: str) -> bytes:
    """A server-sent event."""
    return f"data: {data}\n\n".encode()
