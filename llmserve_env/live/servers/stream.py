"""Streamed answers of an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmserve_env.live.servers.events import MAX_EVENT_BYTES, Event, EventReader, EventTooLong
from llmserve_env.net.http import JSON_HEADERS, payload

if TYPE_CHECKING:
    import aiohttp


class RequestFailed(Exception):
    """A request has no complete answer.

    Args:
        reason: Cause in a few words, for counting.
        status: HTTP status of a refusal.
    """

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status


async def stream_completion(
    session: aiohttp.ClientSession,
    url: str,
    body: Mapping[str, Any],
    on_step: Callable[[int], object],
    headers: Mapping[str, str],
) -> dict[str, int]:
    """Send a request and follow its answer to the end.

    Args:
        session: HTTP client.
        url: Address of the endpoint's /completions.
        body: JSON of the request, with `stream` set.
        on_step: Called with the number of pieces of the answer that came, a token or more each.
        headers: Further headers, such as the endpoint's key.

    Returns:
        The endpoint's `usage`; empty where it sends none.

    Raises:
        RequestFailed: refused, an error in the stream (which vLLM sends with HTTP 200), broken off, empty, or
            with an event that is too long.
        aiohttp.ClientError: no connection, or a lost one.
    """
    reader, steps = StreamReader(), 0
    content = payload(json.dumps(body).encode())
    async with session.post(
        url, data=content, headers={**headers, **JSON_HEADERS}, allow_redirects=False
    ) as response:
        if response.status != 200:
            raise RequestFailed(f"http {response.status}", response.status)
        ended = False
        while not ended:  # to the end, so that the connection can be used again
            chunk = await response.content.readany()
            ended = not chunk
            came = reader.feed(chunk) if chunk else reader.finish()
            if came:
                steps += came
                on_step(came)
            if reader.error is not None:
                raise RequestFailed("error in the stream")
            if reader.garbled:
                raise RequestFailed("stream without JSON")
    if not reader.ended:
        raise RequestFailed("stream broken off")
    if not (steps or reader.finished):  # an answer may end with its first token, which has no text
        raise RequestFailed("empty answer")
    return reader.usage


_INDEX = re.compile(rb'"index": ?([0-9]{1,9})')
"""Of the choice in a plain event: its first one, as the others are those of calls within it."""


def _is_plain(event: bytes) -> bool:
    """Whether an event is a piece of an answer and tells no more, as nearly all do: for a tenth of the time.

    What it looks for has quotes, which are escaped within texts.
    """
    return (
        (b'"finish_reason":null' in event or b'"finish_reason": null' in event)
        and event.count(b'"finish_reason"') == 1
        and b'"role"' not in event
        and b'"error"' not in event
        and b'"usage":{' not in event
        and b'"usage": {' not in event
    )


def _is_text(data: bytes) -> bool:
    """Whether it is UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


class StreamReader:
    """Reads along in a streamed completion, chat completion or response, a stream of server-sent events.

    Args:
        max_event_bytes: Size of an event, at most.
        apart: Whether sequences are told apart, of which the answer has several.

    Attributes:
        whole: What the last `feed` or `finish` completed: whole events, and comments between them.
        sequences: Index of the sequence of each piece that came last, where they are told apart.
        events: Whole events with data so far. Comments, which keep connections open, are none.
        ended: Whether the answer said that it is complete: a finish reason, the end of a response, or [DONE].
        finished: Whether a choice told its finish reason, or a response its end.
        usage: Token counts of the engine, if it told them, by the names of completions.
        error: Error object of the first event that held one.
        garbled: Whether the data of an event was no JSON object in UTF-8.
    """

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES, *, apart: bool = False) -> None:
        self._apart = apart
        self.whole = b""
        self.sequences: Sequence[int] = ()
        self.events = 0
        self.ended = self.finished = False
        self.usage: dict[str, Any] = {}
        self.error: dict[str, Any] | None = None
        self.garbled = False
        self._reader = EventReader(max_event_bytes)
        self._indices: list[int] = []  # what `sequences` will be

    @property
    def within_event(self) -> bool:
        """Whether what came last is part of an event."""
        return self._reader.held > 0

    def feed(self, chunk: bytes) -> int:
        """Take what came; returns how many pieces of an answer were in it, one token each or more.

        Raises:
            RequestFailed: an event has more bytes than it may.
        """
        reader = self._reader
        # Nearly all chunks are a piece of an answer each. What is found in such a chunk is in its data, as
        # neither `data:` nor the line ends are looked for.
        if (
            not self._apart
            and reader.is_message(chunk)
            and _is_plain(chunk)
            and (chunk.isascii() or _is_text(chunk))
        ):
            self.events += 1
            self.sequences, self.whole = (), chunk
            return 1
        try:
            steps = self._take(reader.feed(chunk))
        except EventTooLong:
            raise RequestFailed("event too long") from None
        self.whole = self._reader.whole
        return steps

    def finish(self) -> int:
        """Take what came last as an event: the stream is over, and nothing will complete it. As `feed`.

        What is no JSON object then is the half of an event, which is for nobody.
        """
        garbled, self.garbled = self.garbled, False
        try:
            steps = self._take(self._reader.finish(), whole=False)
        except EventTooLong:
            raise RequestFailed("event too long") from None
        self.whole = b"" if self.garbled else self._reader.whole
        self.garbled = self.garbled or garbled
        return steps

    def _take(self, events: Sequence[Event], whole: bool = True) -> int:
        steps = 0
        self.sequences = self._indices = []
        for data, name in events:
            if not (data.isascii() or _is_text(data)):
                self.garbled = True
            if whole and not name and _is_plain(data):
                self.events += 1
                steps += 1
                if self._apart:
                    found = _INDEX.search(data)
                    self._indices.append(0 if found is None else int(found[1]))
            elif stripped := data.strip():
                self.events += 1
                steps += self._event(stripped, name)
        return steps

    def _event(self, data: bytes, name: bytes = b"") -> int:
        if data == b"[DONE]":
            self.ended = True
            return 0
        try:
            event = json.loads(data.decode(errors="replace"))
        except (ValueError, RecursionError):
            event = None
        if name == b"error":
            self._failed(event if isinstance(event, dict) else data.decode(errors="replace"))
            return 0
        if not isinstance(event, dict):
            self.garbled = self.garbled or name in (b"", b"message")  # others may say what they like
            return 0
        if event.get("error") or event.get("object") == "error" or event.get("type") == "error":
            self._failed(event)
            return 0
        return self._response(event) if "choices" not in event and "type" in event else self._read(event)

    def _failed(self, said: dict[str, Any] | str) -> None:
        error = said.get("error") or said if isinstance(said, dict) else said
        self.error = self.error or (error if isinstance(error, dict) else {"message": str(error)})

    def _read(self, event: dict[str, Any]) -> int:
        usage = event.get("usage")
        if isinstance(usage, dict) and usage:
            self.usage = usage
        steps = 0
        choices = event.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                pieces, index = self._choice(choice), choice.get("index")
                steps += pieces
                if self._apart:
                    self._indices += [index if isinstance(index, int) else 0] * pieces
        return steps

    def _choice(self, choice: dict[str, Any]) -> int:
        end = choice.get("finish_reason")
        if end is not None:
            self.ended = self.finished = True
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            # A token can be no text yet (half a character); an end without text is none.
            return int(bool(choice.get("text")) or end is None)
        # Chat begins with the role alone.
        told = any(delta.get(name) for name in delta if name != "role")
        return int(told or ("role" not in delta and end is None))

    def _response(self, event: dict[str, Any]) -> int:
        """An event of OpenAI's Responses."""
        kind, response = str(event["type"]), event.get("response")
        response = response if isinstance(response, dict) else {}
        if kind == "response.failed":
            self._failed({"error": response.get("error") or "the response failed"})
        elif kind in ("response.completed", "response.incomplete"):
            self.ended = self.finished = True
            self.usage = usage_of_response(response)
        return int(kind.startswith("response.") and kind.endswith(".delta"))


def usage_of_response(response: Mapping[str, Any]) -> dict[str, Any]:
    """Token counts of a response by the names that they have in completions; empty where it tells none."""
    usage = response.get("usage")
    names = {"input_tokens": "prompt_tokens", "output_tokens": "completion_tokens"}
    return {new: usage[old] for old, new in names.items() if old in usage} if isinstance(usage, dict) else {}


_STATUSES = {
    "authentication": 401,
    "apikey": 401,
    "permission": 403,
    "notfound": 404,
    "toolarge": 413,
    "ratelimit": 429,
    "quota": 429,
    "unavailable": 503,
    "timeout": 504,
    "internal": 500,
    "servererror": 500,
    "invalid": 400,
    "badrequest": 400,
    "unsupported": 400,
    "exceeded": 400,
}
"""HTTP statuses by what an error's code or type holds, without anything but letters; the first that fits."""


def error_status(error: Mapping[str, Any]) -> int:
    """HTTP status of an error object: its code where it is one, else by the words of code or type, or 502.

    vLLM's codes are HTTP statuses, OpenAI's are words, and some servers write statuses as texts.
    """
    said = [error.get(name) for name in ("code", "status", "status_code", "type")]
    for each in said:
        text = str(each) if isinstance(each, (int, str)) and not isinstance(each, bool) else ""
        if text.isascii() and text.isdecimal() and len(text) == 3 and 400 <= int(text) <= 599:
            return int(text)
    for each in said:
        words = "".join(filter(str.isalpha, each)).lower() if isinstance(each, str) else ""
        for word, status in _STATUSES.items():
            if word in words:
                return status
    return 502
