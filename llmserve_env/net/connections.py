"""Bounds of a server's connections, and which of them give way when there are too many.

Without uvicorn: `protocols` has what speaks HTTP within these bounds.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Protocol

from llmserve_env.errors import InputError

_OWN_FILES = 96
"""Open files that a server keeps free for itself: sockets to listen on, journals, pipes, libraries."""


@dataclass(frozen=True)
class ConnectionLimits:
    """What a server takes from anybody before its application sees a request.

    Attributes:
        max_connections: open connections.
        max_header_bytes: request line and headers of a request, and trailers of its body (bytes).
        header_timeout_s: time from the first byte of a request, or from the connection, to the end of its
            headers (s).
        body_timeout_s: time from there to the end of its body, and from the beginning of a WebSocket message
            to its end (s).
        max_unfinished_bytes: bodies and WebSocket messages that have not ended, all together (bytes).
        write_timeout_s: time in which a client has to read something of what is sent to it (s).

    Raises:
        InputError: one is no number above 0.
    """

    max_connections: int = 4096
    max_header_bytes: int = 64 << 10
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    max_unfinished_bytes: int = 128 << 20
    write_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 < value < math.inf:
                raise InputError(f"expected a number above 0, found {value}", field=name)


class Connection(Protocol):
    """One connection of a server."""

    def hang_up(self) -> None:
        """End it at once: another one takes its place."""

    def give_up_reading(self) -> None:
        """End it: what it has sent of a body or message takes more memory than there is."""


class Connections:
    """The open connections of a server.

    At `limits.max_connections` the next one takes the place of one that would not be missed: one that has
    been refused and is about to end, else one from which no whole request has come, else one between two
    requests, else one whose request is not whole; of each kind the oldest. Where there is none, it is not
    let in.

    Args:
        limits: bounds.

    Attributes:
        unfinished_bytes: bodies and messages that have not ended, all together (bytes).
    """

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self.unfinished_bytes = 0
        self._open: set[Connection] = set()
        # Dictionaries keep their order: the first is the one that has been there longest.
        self._ending: dict[Connection, None] = {}
        self._strangers: dict[Connection, None] = {}
        self._idle: dict[Connection, None] = {}
        self._unfinished: dict[Connection, int] = {}

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, connection: Connection) -> bool:
        """Let a new connection in, in the place of another if need be; returns whether there is room."""
        if len(self._open) >= self.limits.max_connections:
            kinds = (self._ending, self._strangers, self._idle, self._unfinished)
            spared = next((next(iter(kind)) for kind in kinds if kind), None)
            if spared is None:
                return False
            self.leave(spared)
            spared.hang_up()
        self._open.add(connection)
        self._strangers[connection] = None
        return True

    def serve(self, connection: Connection) -> None:
        """A request or message of the connection is served: it keeps its place."""
        self._strangers.pop(connection, None)
        self._idle.pop(connection, None)

    def rest(self, connection: Connection) -> None:
        """The connection has been served, and may be used again."""
        if connection in self._open:
            self.release(connection)  # what still comes of its body is not kept
            self._idle[connection] = None

    def end(self, connection: Connection) -> None:
        """The connection has been refused, and ends as soon as the client has read that."""
        if connection in self._open:
            self._leave_kinds(connection)
            self._ending[connection] = None

    def leave(self, connection: Connection) -> None:
        """The connection is closed, or as good as that."""
        self._open.discard(connection)
        self._leave_kinds(connection)

    def hold(self, connection: Connection, size: int) -> None:
        """So many bytes more are kept of a body or message that has not ended (bytes).

        Where all of these together are too many, the one that was begun first is given up.
        """
        self._unfinished[connection] = self._unfinished.get(connection, 0) + size
        self.unfinished_bytes += size
        while self.unfinished_bytes > self.limits.max_unfinished_bytes:
            oldest = next(iter(self._unfinished))
            self.release(oldest)
            oldest.give_up_reading()

    def release(self, connection: Connection) -> None:
        """What the connection's body or message held has ended."""
        self.unfinished_bytes -= self._unfinished.pop(connection, 0)

    def _leave_kinds(self, connection: Connection) -> None:
        self.release(connection)
        for kind in (self._ending, self._strangers, self._idle):
            kind.pop(connection, None)


def room_for(connections: int, files_each: int = 1) -> int:
    """How many connections the system's bound of open files has room for; where it may be raised, it is.

    Args:
        connections: as many as are wanted.
        files_each: open files that one takes.
    """
    try:
        import resource
    except ImportError:  # another system than Unix
        return connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections * files_each + _OWN_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return connections
    return max(1, min(connections, (soft - _OWN_FILES) // files_each))
