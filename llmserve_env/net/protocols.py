"""HTTP and WebSockets within bounds: uvicorn's protocols, which have none before the application is called.

uvicorn reads headers of any length for any time, which takes time that grows with the square of their length;
it waits for ever for the rest of a body or a message, and for a client to read; it takes any number of
connections. Here each of these is bounded, for all connections of a server together where they share
something. A bound costs a request that keeps to it some comparisons.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from llmserve_env.net.connections import ConnectionLimits, Connections

if TYPE_CHECKING:
    Base = asyncio.Protocol
else:
    Base = object

ErrorBody = Callable[[str, int], bytes]
"""JSON of a refusal, from its message and status."""

_BETWEEN, _HEAD, _BODY = range(3)  # where in a request the next byte will be
_MOST_AHEAD = 16
"""Requests that a client may send ahead of their answers; each of them takes some kilobytes and its time."""
_LINGER_S = 2.0
_LINGER_BYTES = 1 << 20
"""For how long, and how many bytes, a refused client may go on sending: hung up on before, it might not see
why."""


def bounded(limits: ConnectionLimits, error_body: ErrorBody | None = None) -> dict[str, Any]:
    """Arguments of `uvicorn.Config` for a server within bounds.

    Args:
        limits: bounds, of all sockets of the server together.
        error_body: body of refusals (default: `{"detail": message}`).
    """
    own: dict[str, Any] = {"pool": Connections(limits)}
    if error_body is not None:
        own["error_body"] = staticmethod(error_body)
    return {
        "http": type("BoundedHttp", (BoundedHttp,), own),
        "ws": type("BoundedWebSocket", (BoundedWebSocket,), own),
    }


def _detail(message: str, status: int) -> bytes:
    return json.dumps({"detail": message}).encode()


class _Bounded(Base):
    """What connections of both kinds have: a deadline for reading, and one for writing.

    Attributes:
        pool: connections of the server.
        error_body: body of refusals.
    """

    pool: ClassVar[Connections]
    error_body: ClassVar[ErrorBody] = staticmethod(_detail)
    transport: asyncio.Transport
    loop: asyncio.AbstractEventLoop
    _read_until: float | None = None
    _reading_timer: asyncio.TimerHandle | None = None
    _timer_until = 0.0
    _writing_timer: asyncio.TimerHandle | None = None
    _unsent = 0

    def hang_up(self) -> None:
        """End the connection at once."""
        self._forget_deadlines()
        self.transport.abort()

    def pause_writing(self) -> None:
        """The client does not read as fast as it is written to."""
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        """It has read on."""
        super().resume_writing()
        if self._writing_timer is not None and not self.transport.is_closing():
            self._writing_timer.cancel()
            self._writing_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._forget_deadlines()
        self.pool.leave(self)  # type: ignore[arg-type] # it is one by its subclasses
        super().connection_lost(exc)

    def _read_within(self, seconds: float) -> None:
        """Call `_too_slow` then, unless what is read now has ended before.

        Most requests end at once: a timer that was set for one is kept for the next.
        """
        if self._read_until is not None:
            return
        self._read_until = until = self.loop.time() + seconds
        if self._reading_timer is not None and self._timer_until > until:
            self._reading_timer.cancel()
            self._reading_timer = None
        if self._reading_timer is None:
            self._set_reading_timer(until)

    def _set_reading_timer(self, until: float) -> None:
        self._timer_until = until
        self._reading_timer = self.loop.call_at(until, self._look_at_reading)

    def _look_at_reading(self) -> None:
        self._reading_timer = None
        until = self._read_until
        if until is None or self.transport.is_closing():
            return
        if self.loop.time() < until:
            self._set_reading_timer(until)
            return
        self._read_until = None
        self._too_slow()

    def _too_slow(self) -> None:
        raise NotImplementedError

    def _watch_writing(self) -> None:
        """Hang up on a client that reads nothing for too long, also of what is left when all is written."""
        self._unsent = self.transport.get_write_buffer_size()
        if self._unsent and self._writing_timer is None:
            seconds = self.pool.limits.write_timeout_s
            self._writing_timer = self.loop.call_later(seconds, self._check_writing)

    def _check_writing(self) -> None:
        self._writing_timer = None
        if self.transport.get_write_buffer_size() >= self._unsent:
            self.hang_up()
        else:
            self._watch_writing()

    def _forget_deadlines(self) -> None:
        self._read_until = None
        for timer in (self._reading_timer, self._writing_timer):
            if timer is not None:
                timer.cancel()
        self._reading_timer = self._writing_timer = None


class BoundedHttp(_Bounded, HttpToolsProtocol):
    """A connection that speaks HTTP; see `bounded`."""

    cycle: Any  # of the request that came last; None before the first
    _answered: Any = None  # of the request that the application answers, or has answered last

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._at = _BETWEEN
        self._chunk_bytes = 0  # read at once
        self._chunk_is_head = False  # whether it began with a request
        self._unparsed_bytes = 0  # read since the last thing that was whole: headers that do not end
        self._body_bytes = 0  # of the body, since they were last told
        self._too_large = False
        self._is_over = False  # refused, or no more HTTP
        self._ignored_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        if self.pool.admit(self):
            self._read_within(self.pool.limits.header_timeout_s)
        else:
            self._is_over = True
            self._write_refusal(503, "Too many connections")
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        """The client has sent something."""
        most = self.pool.limits.max_header_bytes
        if len(data) <= most:
            self._receive(data)
            return
        for begin in range(0, len(data), most):  # so that no more headers are parsed than there may be
            self._receive(data[begin : begin + most])

    def _receive(self, data: bytes) -> None:
        if self._is_over:
            self._ignored_bytes += len(data)
            if self._ignored_bytes > _LINGER_BYTES:
                self.hang_up()
            return
        size = self._chunk_bytes = len(data)
        self._unparsed_bytes += size
        self._chunk_is_head = self._at == _BETWEEN
        HttpToolsProtocol.data_received(self, data)
        if self._at == _BETWEEN:  # also after line ends without a request, which uvicorn would wait behind
            if self.cycle is not None and self.cycle.response_complete and not self._is_over:
                self._read_within(self.pool.limits.header_timeout_s)
        elif not self._is_over:
            self._read_on()

    def _read_on(self) -> None:
        """There is more to come of a request."""
        limits = self.pool.limits
        if self._unparsed_bytes > limits.max_header_bytes:
            self._refuse(431, self._header_bound)
        elif self._at == _HEAD:
            self._read_within(limits.header_timeout_s)
        else:
            self._read_within(limits.body_timeout_s)
            size, self._body_bytes = self._body_bytes, 0
            self.pool.hold(self, size)

    def send_400_response(self, msg: str) -> None:
        """Refuse what the parser has refused."""
        if self._too_large:
            self._refuse(431, self._header_bound)
        else:
            self._refuse(400, msg)

    def handle_websocket_upgrade(self) -> None:
        """Go on as a WebSocket."""
        self._is_over = True
        self._forget_deadlines()
        self.pool.leave(self)
        super().handle_websocket_upgrade()

    def on_message_begin(self) -> None:
        """A request begins."""
        self._at = _HEAD
        self._unparsed_bytes = self._chunk_bytes if self._chunk_is_head else 0
        self._chunk_is_head = False  # where the next one begins in this chunk is not known
        HttpToolsProtocol.on_message_begin(self)

    def on_headers_complete(self) -> None:
        """The headers are whole."""
        self._at = _BODY
        most = self.pool.limits.max_header_bytes
        # What was read since they began tells without a count that most are short enough.
        if self._unparsed_bytes + self._chunk_bytes > most and self._header_bytes() > most:
            self._too_large = True
            raise ValueError(self._header_bound)  # ends the parser
        if len(self.pipeline) >= _MOST_AHEAD:
            raise ValueError("too many requests ahead of their answers")
        self._unparsed_bytes = 0
        self._read_until = None
        self.pool.serve(self)
        HttpToolsProtocol.on_headers_complete(self)
        if self.scope["http_version"] == "1.0":
            _answer_without_chunks(self.cycle)

    def on_body(self, body: bytes) -> None:
        """A part of the body has come."""
        self._unparsed_bytes = 0
        if not self.cycle.response_complete:  # else it is not kept
            self._body_bytes += len(body)
        HttpToolsProtocol.on_body(self, body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._at = _BETWEEN
        self._unparsed_bytes = self._body_bytes = 0
        if self._read_until is not None:  # it did not come at once
            self._read_until = None
            self.pool.release(self)
        HttpToolsProtocol.on_message_complete(self)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed: the application hears of it, also where further requests have come."""
        self._tell_of_the_end()
        super().connection_lost(exc)

    def _tell_of_the_end(self) -> None:
        """What the application still says is heard by nobody, and it is asked nothing more."""
        self.pipeline.clear()
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()

    def on_response_complete(self) -> None:
        """The application has answered."""
        HttpToolsProtocol.on_response_complete(self)
        if self.transport.is_closing():
            self._watch_writing()
        elif self.cycle.response_complete:  # no further request waits
            self.pool.rest(self)

    def timeout_keep_alive_handler(self) -> None:
        """No further request has come."""
        super().timeout_keep_alive_handler()
        self._watch_writing()

    def give_up_reading(self) -> None:
        """Refuse the request: its body takes too much memory with all the others."""
        self._refuse(408, "Too many requests are being sent: this one took the longest")

    @property
    def _header_bound(self) -> str:
        return f"expected at most {self.pool.limits.max_header_bytes:,} bytes of headers"

    def _header_bytes(self) -> int:
        lines = sum(len(name) + len(value) + 4 for name, value in self.headers)  # colon, space and line end
        return len(self.url) + lines

    def _too_slow(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        limits = self.pool.limits
        if self._at == _BODY:
            if answering:
                self._refuse(408, f"expected the body within {limits.body_timeout_s:g} s")
            else:
                self.hang_up()
        elif answering:  # the next request has begun: there is time until this one is answered
            self._read_within(limits.header_timeout_s)
        elif self._at == _HEAD:
            self._refuse(408, f"expected the headers within {limits.header_timeout_s:g} s")
        else:
            self.hang_up()

    def _refuse(self, status: int, message: str) -> None:
        """Answer in the application's place, and end the connection; an answer under way is broken off."""
        self._is_over = True
        self._forget_deadlines()
        self._unset_keepalive_if_required()
        self.pool.end(self)
        cycle, behind = self._answered, len(self.pipeline) > 0
        self._tell_of_the_end()
        if behind or (cycle is not None and not cycle.response_complete and cycle.response_started):
            self.hang_up()  # a refusal would be taken for another request's, or for a part of its answer
            return
        self._write_refusal(status, message)
        self.transport.write_eof()
        self.flow.resume_reading()
        self._reading_timer = self.loop.call_later(_LINGER_S, self.hang_up)

    def _write_refusal(self, status: int, message: str) -> None:
        body = type(self).error_body(message, status)
        lines = [
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
        ]
        if status == 503:
            lines.append("retry-after: 1")
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)


def _answer_without_chunks(cycle: RequestResponseCycle) -> None:
    """Let an answer of unstated length end with its connection: HTTP/1.0, as nginx speaks, has no chunks."""
    send, unstated = cycle.send, False

    async def send_plainly(message: Any) -> None:
        nonlocal unstated
        if message["type"] == "http.response.start":
            unstated = not any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            if unstated:
                cycle.chunked_encoding = False
        elif unstated:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.send = send_plainly  # type: ignore[method-assign]


class BoundedWebSocket(_Bounded, WebSocketsSansIOProtocol):
    """A connection that speaks WebSocket; see `bounded`."""

    def connection_made(self, transport: Any) -> None:
        """A connection goes on as a WebSocket."""
        super().connection_made(transport)
        self.pool.admit(self)  # the place that it had before is free

    def data_received(self, data: bytes) -> None:
        """The client has sent something."""
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self.frames or self.conn.reader.buffer:
            self._read_within(self.pool.limits.body_timeout_s)
            self.pool.hold(self, len(data))
        else:  # a frame of the protocol's own has ended, if anything has
            self._message_ended()

    def send_receive_event_to_app(self) -> None:
        """A message is whole."""
        self.pool.serve(self)
        self._message_ended()
        super().send_receive_event_to_app()

    def give_up_reading(self) -> None:
        """Close: the message takes too much memory with all the others."""
        self._fail("too many messages are being sent: this one took the longest")

    def _message_ended(self) -> None:
        self._read_until = None
        self.pool.release(self)

    def _too_slow(self) -> None:
        if self.read_paused:  # the application is busy with the message before
            self._read_within(self.pool.limits.body_timeout_s)
        else:
            self._fail(f"expected the message within {self.pool.limits.body_timeout_s:g} s")

    def _fail(self, reason: str) -> None:
        self.conn.fail(1008, reason)
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.transport.close()
        self._watch_writing()
