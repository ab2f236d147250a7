"""Server-sent events, as the HTML standard has them (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

MAX_EVENT_BYTES = 16 << 20
"""Size of an event, at most; the largest that vLLM sends are the log probabilities of a long prompt."""

_BOM = b"\xef\xbb\xbf"
_BEGINNINGS = (b"data:", b"event:", b"id:", b"retry:", b":")


class Event(NamedTuple):
    """An event that has data.

    Attributes:
        data: its data lines, joined by line feeds.
        name: its type; empty for a message.
    """

    data: bytes
    name: bytes = b""


class EventTooLong(Exception):
    """An event has more bytes than it may."""


class EventReader:
    r"""Reads a stream of server-sent events, however it is cut into chunks.

    Lines end with LF, CR or CRLF; an event ends with an empty line. Its data are all its data lines, wherever
    they stand. `id` and `retry` are read over: they are for clients that connect anew.

    Args:
        max_event_bytes: Size of an event, at most.

    Attributes:
        whole: Bytes that the last `feed` completed: whole events, empty lines, and comments between events.
            What was in it from the first `feed` on, and the bytes held now, are the stream.

    Example:
        >>> reader = EventReader()
        >>> reader.feed(b"data: a\n\nda"), reader.whole, reader.held
        ([Event(data=b'a', name=b'')], b'data: a\n\n', 2)
    """

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self.whole = b""
        self._max_event_bytes = max_event_bytes
        self._held = bytearray()  # since the last whole event
        self._line = bytearray()  # what came of the line that has no end yet
        self._data: list[bytes] = []
        self._name = b""
        self._within = False  # an event has begun: a line of it is whole
        self._after_cr = False  # a line feed that comes next belongs to the line before
        self._begun = False  # the first line is over, which alone can have a byte order mark

    @property
    def held(self) -> int:
        """Bytes that came since the last whole event."""
        return len(self._held)

    def feed(self, chunk: bytes) -> Sequence[Event]:
        """Take what came; returns the events with data that are whole now.

        Raises:
            EventTooLong: an event has more bytes than it may.
        """
        if self.is_message(chunk):
            return (Event(chunk[6 if chunk.startswith(b"data: ") else 5 : -2]),)
        return self._read(chunk)

    def is_message(self, chunk: bytes) -> bool:
        """Whether what came is a message of one line, as servers send them; it is taken then, as by `feed`.

        It tells so for a tenth of the time that any other chunk takes.
        """
        if (
            self._held
            or not chunk.startswith(b"data:")
            or chunk.find(b"\n") != len(chunk) - 2
            or chunk[-1] != 10  # a line feed
            or b"\r" in chunk
            or len(chunk) > self._max_event_bytes
        ):
            return False
        self.whole, self._begun, self._after_cr = chunk, True, False
        return True

    def finish(self) -> Sequence[Event]:
        """Take what is held as an event: the stream is over, and nothing will complete it.

        By the standard such an event is none. Servers forget the last empty line, though, so `whole` has it
        here. Whether an event is the half of one only its data can tell.

        Raises:
            EventTooLong: as `feed`.
        """
        if not self._held:
            self.whole = b""
            return ()
        return self._read(b"\n" if self._held.endswith(b"\n") else b"\n\n")

    def _read(self, chunk: bytes) -> list[Event]:
        events = []
        at = end = 0  # of the chunk: what is read, what is whole
        for raw in chunk.splitlines(keepends=True):  # of bytes: at LF, CR and CRLF, at nothing else
            at += len(raw)
            if self._after_cr:
                self._after_cr = False
                if raw == b"\n":
                    end = end if self._within else at
                    continue
            if raw[-1] not in b"\r\n":
                self._line += raw
                break
            self._line += raw.rstrip(b"\r\n")
            line = bytes(self._line)
            self._line.clear()
            if not self._begun:
                self._begun, line = True, line.removeprefix(_BOM)
            if not line:
                if self._data:
                    events.append(Event(b"\n".join(self._data), self._name))
                self._data, self._name, self._within, end = [], b"", False, at
            elif line[0] != b":"[0]:
                self._within = True
                self._field(line)
            elif not self._within:
                end = at
        self._after_cr = chunk.endswith(b"\r") or (self._after_cr and not chunk)
        if end:
            self.whole = bytes(self._held) + chunk[:end]
            self._held.clear()
        else:
            self.whole = b""
        self._held += chunk[end:]
        if len(self._held) > self._max_event_bytes:
            raise EventTooLong
        return events

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._name = value


def begins_as_events(content: bytes) -> bool | None:
    """Whether a stream of events begins so; None where too little of it has come to know."""
    start = content.removeprefix(_BOM).lstrip(b"\r\n")
    if start.startswith(_BEGINNINGS):
        return True
    undecided = _BOM.startswith(content) or any(each.startswith(start) for each in _BEGINNINGS)
    return None if undecided else False
