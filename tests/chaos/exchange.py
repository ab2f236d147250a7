"""An upstream's side of HTTP, at the level of bytes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import dataclass

from .answers import Asked, events, whole
from .connection import LINGER_NOT

STEP_S = 0.02
"""From one token to the next (s)."""


@dataclass
class Exchange:
    """A request that an upstream got, and the connection that its answer goes to."""

    asked: Asked
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, *parts: bytes) -> None:
        self.writer.write(b"".join(parts))
        await self.writer.drain()

    async def head(self, status: str = "200 OK", *headers: str, version: str = "1.1") -> None:
        lines = [f"HTTP/{version} {status}", *headers, "", ""]
        await self.send("\r\n".join(lines).encode("latin-1"))

    async def plain(self, status: str, body: bytes, kind: str = "application/json", *headers: str) -> None:
        await self.head(status, f"content-type: {kind}", f"content-length: {len(body)}", *headers)
        await self.send(body)

    async def chunk(self, content: bytes) -> None:
        await self.send(b"%x\r\n" % len(content), content, b"\r\n")

    async def start_stream(self, kind: str = "text/event-stream", *headers: str) -> None:
        await self.head("200 OK", f"content-type: {kind}", "transfer-encoding: chunked", *headers)

    async def answer(self, *headers: str) -> None:
        """As it should be."""
        if not self.asked.stream:
            await self.plain("200 OK", whole(self.asked), "application/json", *headers)
            return
        await self.start_stream("text/event-stream", *headers)
        for part in events(self.asked):
            await asyncio.sleep(STEP_S)
            await self.chunk(part)
        await self.send(b"0\r\n\r\n")

    async def beginning(self, count: int = 2) -> None:
        """Some events of the answer; of one that is no stream a part."""
        if not self.asked.stream:
            body = whole(self.asked)
            await self.head("200 OK", "content-type: application/json", "transfer-encoding: chunked")
            await self.chunk(body[: len(body) // 2])
            return
        await self.start_stream()
        for part in list(events(self.asked))[:count]:
            await self.chunk(part)
            await asyncio.sleep(STEP_S)

    async def never(self) -> None:
        """Until the other side hangs up."""
        while await self.reader.read(1 << 16):
            pass

    def reset(self) -> None:
        with contextlib.suppress(OSError):
            sock = self.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
        self.writer.transport.abort()
