"""A real HTTP server of completions that fails as it is told, below the level of an application."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from ..endpoint_server import event, piece

STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
PIECE = event(piece("a"))
WHOLE = [PIECE, event(piece("b", "length")), event("[DONE]")]


def chunk(content):
    return b"%x\r\n%s\r\n" % (len(content), content)


def answer(status, body=b"", kind=b"application/json", headers=b"", length=None):
    length = len(body) if length is None else length
    head = b"HTTP/1.1 %d X\r\ncontent-type: %s\r\ncontent-length: %d\r\n%s\r\n"
    return head % (status, kind, length, headers) + body


SAID = {
    "well": STREAM + b"".join(map(chunk, WHOLE)) + chunk(b""),
    "500": answer(500),
    "503": answer(503),
    "429": answer(429),
    "429 for now": answer(429, headers=b"retry-after: 2\r\n"),
    "reset": b"",
    "html": answer(200, b"<html>log in</html>", b"text/html"),
    "half": answer(200, b'{"id": "x", "choices": [{"text": "hel'),
    "empty": answer(200),
    "cut": STREAM + chunk(PIECE),
    "cut within an event": STREAM + chunk(PIECE) + chunk(PIECE[:9]),
    "stall": STREAM + chunk(PIECE),
    "hang": b"",
}
"""What it sends for a completion, by mode."""
KINDS = (*(kind for kind in SAID if kind != "well"), "refused")
"""All ways to fail; "refused": nobody listens."""
_HOLDS = ("hang", "stall")
_HANGS_UP = ("reset", "cut", "cut within an event")


@dataclass
class BadServer:
    """Answers completions as its mode says, and GETs with an empty 200.

    Attributes:
        mode: key of `SAID`; may change.
        served: completions asked for in the mode.
        health: what it sends for a GET.
        pause_s: time that it takes to answer when it is well (s).
    """

    mode: str = "well"
    served: int = 0
    port: int = 0
    health: bytes = answer(200)
    pause_s: float = 0.0
    _writers: set = field(default_factory=set)
    _tasks: set = field(default_factory=set)

    async def __aenter__(self):
        await self.listen()
        return self

    async def __aexit__(self, *_):
        await self.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    async def listen(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self):
        self._server.close()
        for writer in tuple(self._writers):
            writer.transport.abort()

    async def become(self, mode):
        """Behave so from now on; connections that wait go on waiting."""
        if self.mode == "refused" and mode != "refused":
            await self.listen()
        self.mode, self.served = mode, 0
        if mode == "refused":
            await self.close()

    async def _serve(self, reader, writer):
        self._writers.add(writer)
        self._tasks.add(asyncio.current_task())
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                if head.startswith(b"get"):
                    writer.write(self.health)
                    continue
                length = head.partition(b"content-length:")[2].split(b"\r\n")[0]
                await reader.readexactly(int(length))
                self.served += 1
                mode = self.mode
                if self.pause_s and mode == "well":
                    await asyncio.sleep(self.pause_s)
                writer.write(SAID[mode])
                if mode in _HANGS_UP:
                    await writer.drain()
                    await asyncio.sleep(0)
                    writer.transport.abort()
                    return
                if mode in (*_HOLDS, "pings"):
                    await reader.read()
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            self._tasks.discard(asyncio.current_task())
            writer.close()
