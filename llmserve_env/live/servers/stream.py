"""Streamed answers of an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

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
        RequestFailed: refused, an error in the stream (which vLLM sends with HTTP 200), broken off, or empty.
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


def _data(event: bytes) -> bytes:
    """Data of an event, which is mostly its only line; empty where it has none."""
    event = event.strip()
    if b"\n" in event:
        lines = event.split(b"\n")
        return b"\n".join(line[5:].strip() for line in lines if line.startswith(b"data:"))
    return event[5:].strip() if event.startswith(b"data:") else b""


class StreamReader:
    """Reads along in a streamed completion or chat completion, a stream of server-sent events.

    Attributes:
        events: Complete events so far.
        ended: Whether the answer said that it is complete: a finish reason, or [DONE].
        finished: Whether a choice told its finish reason.
        usage: Token counts of the engine, if it told them.
        error: Error object of the first event that held one.
        garbled: Whether the data of an event was no JSON object.
    """

    def __init__(self) -> None:
        self.events = 0
        self.ended = self.finished = False
        self.usage: dict[str, Any] = {}
        self.error: dict[str, Any] | None = None
        self.garbled = False
        self._rest = b""

    @property
    def within_event(self) -> bool:
        """Whether what came last is part of an event."""
        return bool(self._rest)

    def feed(self, chunk: bytes) -> int:
        """Take what came; returns how many pieces of an answer were in it, one token each or more."""
        steps = 0
        one = chunk.endswith(b"\n\n") and chunk.index(b"\n\n") == len(chunk) - 2
        if one and not self._rest and b"\r" not in chunk:  # as servers send them
            blocks = [chunk]
        else:
            *blocks, self._rest = (self._rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        for block in blocks:
            self.events += 1
            data = _data(block)
            if data:
                steps += self._event(data)
        return steps

    def finish(self) -> int:
        """Take what came last as an event: the stream is over, and nothing will complete it. As `feed`."""
        return self.feed(b"\n\n") if self._rest else 0

    def _event(self, data: bytes) -> int:
        if data == b"[DONE]":
            self.ended = True
            return 0
        return 1 if _is_plain(data) else self._read(data)

    def _read(self, data: bytes) -> int:
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            event = None
        if not isinstance(event, dict):
            self.garbled = True
            return 0
        if event.get("error") or event.get("object") == "error":
            error = event.get("error", event)
            self.error = self.error or (error if isinstance(error, dict) else {"message": str(error)})
            return 0
        usage = event.get("usage")
        if isinstance(usage, dict) and usage:
            self.usage = usage
        steps = 0
        choices = event.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                steps += self._choice(choice)
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
