"""Connections of aiohttp's that are used again only where nothing has come over them meanwhile."""

from __future__ import annotations

import select
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import aiohttp

if TYPE_CHECKING:
    from aiohttp import ClientTimeout
    from aiohttp.client_reqrep import ClientRequest
    from aiohttp.connector import Connection
    from aiohttp.tracing import Trace


WAS_KEPT: ContextVar[bool] = ContextVar("WAS_KEPT", default=False)
"""Whether the last request of this task went over a connection that was kept.

aiohttp's tracing would tell, too, but does much more for each request."""


class QuietConnector(aiohttp.TCPConnector):
    """Keeps connections, and closes those over which something came while nobody waited for it.

    That is the end of the connection, or an answer too many. aiohttp would take the latter for the answer to
    the next request, which may be another client's.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._used: WeakSet[Any] = WeakSet()  # protocols that have had a request

    async def connect(self, req: ClientRequest, traces: list[Trace], timeout: ClientTimeout) -> Connection:
        """A connection for a request, kept or new."""
        WAS_KEPT.set(False)  # also if there is none
        while True:
            connection = await super().connect(req, traces, timeout)
            if _is_quiet(connection):
                if connection.protocol in self._used:
                    WAS_KEPT.set(True)
                else:
                    self._used.add(connection.protocol)
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
