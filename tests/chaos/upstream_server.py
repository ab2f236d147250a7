"""An upstream that behaves as the schedule has it at the moment."""

from __future__ import annotations

import asyncio
import json
import socket

from .answers import Asked, asked_by
from .exchange import Exchange
from .faults import AT_THE_DOOR, FAULTS, SERVING
from .sides import SIDES

_HEAD_LIMIT = 1 << 20


class UpstreamServer:
    """One upstream on a port that stays its own.

    Args:
        index: of it.

    Attributes:
        kind: what it does with completions: a name of FAULTS or AT_THE_DOOR.
        side: what it does with GETs: a name of SIDES.
        met: by the tag of a request, which kinds it met here, in their order.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.kind = "good"
        self.side = "well"
        self.met: dict[str, list[str]] = {}
        self.flaps = 0
        self.running = 0
        self.tokens = 0
        # Bound and never listening: the port is kept while nobody listens.
        self._holder = _bound(0)
        self.port = self._holder.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server: asyncio.Server | None = None
        self._deaf: socket.socket | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def become(self, kind: str, side: str = "well") -> None:
        """Behave so from now on; what is under way goes on as it began."""
        self.kind, self.side = kind, side
        if kind in AT_THE_DOOR:
            self._shut()
            if kind == "slow_accept" and self._deaf is None:
                self._deaf = _bound(self.port)
                self._deaf.listen(0)
            return
        if self._deaf is not None:
            self._deaf.close()
            self._deaf = None
        if self._server is None:
            sock = _bound(self.port)
            self._server = await asyncio.start_server(self._serve, sock=sock, limit=_HEAD_LIMIT)

    async def close(self) -> None:
        await self.become("refused")
        self._holder.close()

    def _shut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._deaf is not None and self.kind == "refused":
            self._deaf.close()
            self._deaf = None
        for writer in tuple(self._open):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while not writer.is_closing():
                await self._one(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the other side hung up, or this one
        finally:
            self._open.discard(writer)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        request, *lines = head.decode("latin-1").split("\r\n")
        method, path, _ = request.split(" ")
        length = 0
        for line in lines:
            name, _, value = line.partition(":")
            if name.lower() == "content-length":
                length = int(value)
        content = await reader.readexactly(length)
        if method == "GET":
            await self._get(path, Exchange(Asked(""), reader, writer))
            return
        asked = asked_by(json.loads(content))
        kind = self.kind
        self.met.setdefault(asked.tag, []).append(kind)
        self.running += 1
        try:
            await FAULTS[kind](Exchange(asked, reader, writer))
        finally:
            self.running -= 1
            self.tokens += asked.tokens * asked.sequences * (kind in SERVING)

    async def _get(self, path: str, x: Exchange) -> None:
        if await SIDES[self.side](self, path, x):
            return
        if path.startswith("/metrics"):
            text = _METRICS.format(running=self.running, tokens=self.tokens)
            await x.plain("200 OK", text.encode(), "text/plain; version=0.0.4")
        elif path.startswith("/v1/models"):
            await x.plain("200 OK", b'{"object": "list", "data": [{"id": "m", "object": "model"}]}')
        elif path.startswith("/health"):
            await x.plain("200 OK", b"")
        else:
            await x.plain("404 Not Found", b'{"detail": "Not Found"}')


_METRICS = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{model_name="m"}} {running}
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{{model_name="m"}} 0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{{model_name="m"}} 0.1
# TYPE vllm:generation_tokens counter
vllm:generation_tokens_total{{model_name="m"}} {tokens}
"""


def _bound(port: int) -> socket.socket:
    # With the protocol, or asyncio leaves Nagle's algorithm on, which waits in real time.
    sock = socket.socket(proto=socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    sock.setblocking(False)
    return sock
