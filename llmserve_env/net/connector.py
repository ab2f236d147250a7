"""Connections of aiohttp's that are used again only where nothing has come over them meanwhile."""

from __future__ import annotations

import select
from typing import TYPE_CHECKING

import aiohttp

if TYPE_CHECKING:
    from aiohttp import ClientTimeout
    from aiohttp.client_reqrep import ClientRequest
    from aiohttp.connector import Connection
    from aiohttp.tracing import Trace


class QuietConnector(aiohttp.TCPConnector):
    """Keeps connections, and closes those over which something came while nobody waited for it.

    That is the end of the connection, or an answer too many. aiohttp would take the latter for the answer to
    the next request, which may be another client's.
    """

    async def connect(self, req: ClientRequest, traces: list[Trace], timeout: ClientTimeout) -> Connection:
        """A connection for a request, kept or new."""
        while True:
            connection = await super().connect(req, traces, timeout)
            if _is_quiet(connection):
                return connection
            connection.close()


def _is_quiet(connection: Connection) -> bool:
    """Whether nothing came, read or not."""
    protocol, transport = connection.protocol, connection.transport
    if protocol is None or transport is None or protocol.should_close:
        return False
    if transport.get_extra_info("ssl_object") is not None:  # TLS has messages of its own, which mean nothing
        return True
    waiting = select.poll()
    waiting.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
    return not waiting.poll(0)
