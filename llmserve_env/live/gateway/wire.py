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
_MAX_DEPTH = 8  # messages hold lists of parts that hold texts: 4
_PROMPTS = ("prompt", "prompt_embeds", "input")
"""Fields that hold one prompt or a list of them."""
_COUNTED = ("prompt", "messages", "input", "instructions")
"""Fields whose tokens are counted."""
_KEPT = ("background", "previous_response_id", "conversation")
_ANSWERS = ("n", "best_of")
"""Fields that say how many sequences each prompt gets; vLLM's beam searches are as wide as `n`."""


def error_json(message: str, kind: str, code: int | str, param: str | None = None) -> bytes:
    """An error in OpenAI's form; `param` is the request's field that it is about."""
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()


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
        prompt_tokens: length of its prompt: counted where it is token ids, else a token for every four bytes.
        model: model that it asks for; None where it names none.
        streamed: whether it asks for a stream.
        sequences: sequences that an engine runs for it: `n`, the width of a beam search, too, or `best_of`
            where that is more, for each of its prompts.
        keeps: field by which it asks the server to keep something between requests; None for none.
        multiplied_by: field that asks for most of them, such as `prompt` or `n`.

    Raises:
        InputError: not a JSON object in UTF-8, or a number of sequences that is none. What was found is not
            in the message, which may be logged.
    """

    def __init__(self, content: bytes) -> None:
        try:
            self._text = content.decode()
            # Without a member `priority`, which nearly no client sends, C code alone reads the object.
            plain = '"priority"' not in self._text and "\\u00" not in self._text  # letters may be escaped
            self._spans, values = ([], _object(self._text)) if plain else _members(self._text)
        except (ValueError, StopIteration, RecursionError) as error:
            raise InputError("expected a JSON object", field="body") from error
        self._content = content
        self._empty = not values
        model = values.get("model")
        self.model = model if isinstance(model, str) else None
        self.streamed = values.get("stream") is True
        self.prompt_tokens = max(1, sum(_prompt_tokens(values[name]) for name in _COUNTED if name in values))
        self.keeps = next((name for name in _KEPT if values.get(name)), None)
        prompts = {name: _prompts(values.get(name)) for name in _PROMPTS if name in values}
        answers = {name: _count(name, values.get(name)) for name in _ANSWERS if name in values}
        self.sequences = max(1, sum(prompts.values())) * max(answers.values(), default=1)
        factors = prompts | answers
        self.multiplied_by = max(factors, key=factors.__getitem__, default="n")

    def forget(self) -> None:
        """Let go of the bytes: it will not be sent again."""
        self._content, self._text, self._spans = b"", "", []

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


def _object(text: str) -> dict[str, Any]:
    """All members of a JSON object.

    Raises:
        ValueError: not an object.
    """
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("expected an object")
    return found


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


def _prompt_tokens(prompt: Any, depth: int = 0) -> int:
    """Of a prompt or several, or of messages; what is nested deeper than these are is nothing."""
    if depth > _MAX_DEPTH:
        return 0
    if isinstance(prompt, str):
        return -(-len(prompt.encode(errors="replace")) // _BYTES_PER_TOKEN)
    if isinstance(prompt, dict):
        return _prompt_tokens(prompt.get("content") or prompt.get("text"), depth + 1)
    if isinstance(prompt, list):
        if prompt and isinstance(prompt[0], int):
            return len(prompt)
        return sum(_prompt_tokens(each, depth + 1) for each in prompt)
    return 0


def _prompts(prompt: Any) -> int:
    """Prompts in a field: a list of token ids or messages is one, a list of texts or lists is several."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        return len(prompt)
    return int(prompt is not None)


def _count(name: str, value: Any) -> int:
    """A number of sequences, 1 where none is said.

    Engines read "2" and true as numbers, too. What they would make of these need not be guessed here: no
    client sends them.
    """
    if value is None:
        return 1
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError("expected a whole number from 1 on", field=name)
    return value
