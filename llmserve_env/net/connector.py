"""Connections of aiohttp's that are used again only where nothing has come over them meanwhile."""

from __future__ import annotations

import select
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import aiohttp

if TYPE_CHECKING:
    import asyncio

    from aiohttp import ClientTimeout
    from aiohttp.client_reqrep import ClientRequest
    from aiohttp.connector import Connection
    from aiohttp.tracing import Trace


_Unread = Callable[[int], list[tuple[int, int]]]

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
        # Of connections that have had a request; by their protocols, which last as long as they do.
        self._used: WeakKeyDictionary[Any, _Unread] = WeakKeyDictionary()

    async def connect(self, req: ClientRequest, traces: list[Trace], timeout: ClientTimeout) -> Connection:
        """A connection for a request, kept or new."""
        WAS_KEPT.set(False)  # also if there is none
        while True:
            connection = await super().connect(req, traces, timeout)
            protocol = connection.protocol
            unread = self._used.get(protocol)
            kept = unread is not None
            if not kept and connection.transport is not None:
                self._used[protocol] = unread = _unread(connection.transport)
            if protocol is not None and unread is not None and not (protocol.should_close or unread(0)):
                WAS_KEPT.set(kept)
                return connection
            connection.close()


def _unread(transport: asyncio.Transport) -> _Unread:
    """What tells whether something has come over a connection that was not read yet."""
    if transport.get_extra_info("ssl_object") is not None:  # TLS has messages of its own, which mean nothing
        return lambda timeout_ms: []
    waiting = select.poll()
    waiting.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
    return waiting.poll
