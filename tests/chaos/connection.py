"""A client's side of HTTP, at the level of bytes."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from .answers import Response, Violation

LINGER_NOT = b"\1\0\0\0\0\0\0\0"
"""Value of SO_LINGER with which a socket that is closed sends a reset."""


class Connection:
    """A client's connection to the gateway."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def to(cls, port: int, *, narrow: bool = False) -> Connection:
        """A new one; `narrow` if what is not read shall soon hold the other side up."""
        if not narrow:
            return cls(*await asyncio.open_connection("127.0.0.1", port))
        sock = socket.socket(proto=socket.IPPROTO_TCP)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        return cls(*await asyncio.open_connection(sock=sock, limit=4096))

    async def send(self, content: bytes) -> None:
        with contextlib.suppress(ConnectionError):  # it may have been told already why
            self.writer.write(content)
            await self.writer.drain()

    async def response(self, version: str = "1.1") -> Response | None:
        """The next one; None where the connection ends before it begins.

        Args:
            version: version of HTTP that the client knows.
        """
        status, headers = 100, {}
        while 100 <= status < 200:
            try:
                head = await self.reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError as error:
                if error.partial:
                    raise Violation(f"a response broken off in its head: {error.partial[:80]!r}") from None
                return None
            except ConnectionError:
                return None
            first, *lines = head.decode("latin-1").split("\r\n")
            status = int(first.split(" ")[1])
            headers = {
                name.strip().lower(): value.strip()
                for name, _, value in (each.partition(":") for each in lines)
            }
        if version == "1.0" and "transfer-encoding" in headers:
            raise Violation("chunks to a client of HTTP/1.0")
        response = Response(status, headers)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await self._body(response)
        return response

    async def _body(self, response: Response) -> None:
        headers = response.headers
        if "chunked" in headers.get("transfer-encoding", ""):
            while size := int(await self.reader.readline() or b"x", 16):
                response.body += await self.reader.readexactly(size)
                await self.reader.readexactly(2)
            await self.reader.readexactly(2)
        elif "content-length" in headers:
            stated = int(headers["content-length"])
            try:
                response.body = await self.reader.readexactly(stated)
            except asyncio.IncompleteReadError as error:
                response.body = error.partial
                return
        else:
            response.body = await self.reader.read()
        response.whole = True

    async def ended(self) -> bool:
        """Whether the other side says no more."""
        try:
            return not await self.reader.read(1)
        except ConnectionError:
            return True

    def reset(self) -> None:
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
        self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()
