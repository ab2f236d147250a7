"""OpenAI's HTTP interface as bytes: what a gateway must read of requests and answers, and its errors."""

from __future__ import annotations

import json
import re
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any

from llmserve_env.errors import InputError

_SPACE = re.compile(r"[ \t\n\r]*")
_SCAN = json.JSONDecoder().scan_once  # type: ignore[attr-defined]
_BYTES_PER_TOKEN = 4  # of English text, the usual rule of thumb


def error_json(message: str, kind: str, code: int | str) -> bytes:
    """An error in OpenAI's form."""
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()


def error_event(error: bytes) -> bytes:
    """An error as an event of a stream."""
    return b"data: " + error + b"\n\n"


def as_error(status: int, body: bytes) -> bytes:
    """The body of a refusal, as it is where it has OpenAI's form, else in that form."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    if isinstance(answer, dict):
        if isinstance(answer.get("error"), dict):
            return body
        told = answer.get("message") or answer.get("detail") or answer.get("error")
        if told:  # older releases of vLLM; FastAPI
            message = told if isinstance(told, str) else json.dumps(told)
            return error_json(message, str(answer.get("type") or "upstream_error"), status)
    return error_json(f"the upstream answered with HTTP {status}", "upstream_error", status)


class RequestBody:
    """A request for a completion or a chat completion.

    Attributes:
        prompt_tokens: of its prompt: counted where it is token ids, of text a token for every four bytes.

    Raises:
        InputError: not a JSON object in UTF-8. What was found is not in the message, which may be logged.
    """

    def __init__(self, content: bytes) -> None:
        try:
            self._text = content.decode()
            self._spans, values = _members(self._text)
        except (ValueError, StopIteration, RecursionError) as error:
            raise InputError("expected a JSON object", field="body") from error
        self._content = content
        self._empty = not values
        self.prompt_tokens = max(
            1, _prompt_tokens(values.get("prompt")) + _prompt_tokens(values.get("messages"))
        )

    def with_priority(self, priority: int) -> bytes:
        """The bytes that came, but for `priority`, which is vLLM's (lower is more urgent, 0 without)."""
        text, said = self._text, str(priority)
        if any(text[start:end] != said for start, end in self._spans):
            for start, end in reversed(self._spans):
                text = text[:start] + said + text[end:]
        elif not self._spans and priority:
            text = text.replace("{", f'{{"priority": {said}' + ("" if self._empty else ", "), 1)
        else:
            return self._content
        return text.encode()


def _members(text: str) -> tuple[list[tuple[int, int]], dict[str, Any]]:
    """Where the values of `priority` are in a JSON object's text, and all its members; as json.loads.

    Raises:
        ValueError, StopIteration: not an object.
    """
    spans: list[tuple[int, int]] = []
    members: dict[str, Any] = {}
    at = _expect(text, _skip(text, 0), "{")
    more = text[at : at + 1] != "}"
    while more:
        name, at = scanstring(text, _expect(text, at, '"'), True)
        start = _expect(text, _skip(text, at), ":")
        members[name], end = _SCAN(text, start)
        if name == "priority":
            spans.append((start, end))
        at = _skip(text, end)
        more = text[at : at + 1] == ","
        if more:
            at = _skip(text, at + 1)
    if _expect(text, at, "}") != len(text):
        raise ValueError("text after the object")
    return spans, members


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]  # matches always


def _expect(text: str, at: int, sign: str) -> int:
    if text[at : at + 1] != sign:
        raise ValueError(f"expected {sign}")
    return _skip(text, at + 1) if sign != '"' else at + 1


def _prompt_tokens(prompt: Any) -> int:
    """Of a prompt or several, or of messages."""
    if isinstance(prompt, str):
        return -(-len(prompt.encode(errors="replace")) // _BYTES_PER_TOKEN)
    if isinstance(prompt, dict):
        return _prompt_tokens(prompt.get("content") or prompt.get("text"))
    if isinstance(prompt, list):
        if prompt and isinstance(prompt[0], int):
            return len(prompt)
        return sum(_prompt_tokens(each) for each in prompt)
    return 0


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


class StreamReader:
    """Reads along in a stream of server-sent events.

    Attributes:
        events: that are complete.
        ended: whether it said that it is complete: a finish reason, or [DONE].
        usage: as the engine counted, if it did.
        error: of the first event that was one: its object.
    """

    def __init__(self) -> None:
        self.events = 0
        self.ended = False
        self.usage: dict[str, Any] = {}
        self.error: dict[str, Any] | None = None
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
            if block.startswith(b"data:"):
                steps += self._event(block[5:].strip())
        return steps

    def _event(self, data: bytes) -> int:
        if data == b"[DONE]":
            self.ended = True
            return 0
        return 1 if _is_plain(data) else self._read(data)

    def _read(self, data: bytes) -> int:
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            return 0
        if not isinstance(event, dict):
            return 0
        if event.get("error") or event.get("object") == "error":
            error = event.get("error", event)
            self.error = self.error or (error if isinstance(error, dict) else {"message": str(error)})
            return 0
        self.usage = event.get("usage") or self.usage
        steps = 0
        choices = event.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                steps += self._choice(choice)
        return steps

    def _choice(self, choice: dict[str, Any]) -> int:
        end = choice.get("finish_reason")
        self.ended = self.ended or end is not None
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            # A token can be no text yet (half a character); an end without text is none.
            return int(bool(choice.get("text")) or end is None)
        # Chat begins with the role alone.
        told = any(delta.get(name) for name in delta if name != "role")
        return int(told or ("role" not in delta and end is None))
