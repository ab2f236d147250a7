"""What an engine answers, and whether what a client got of it is whole."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["answer", "error", "cut", "violation"]
"""A whole answer; an error in OpenAI's form; a stream that ends with an error; what should never be."""


class Violation(Exception):
    """What no client should ever get.

    Args:
        what: it.
        tag: of the request, where it is known.
    """

    def __init__(self, what: str, tag: str | None = None) -> None:
        super().__init__(what)
        self.tag = tag


@dataclass(frozen=True)
class Asked:
    """A request for a completion.

    Attributes:
        tag: first word of the prompt, and of each piece of the answer: nobody gets another one's.
        stream: whether a stream is asked for.
        tokens: tokens of each sequence.
        n: sequences of each prompt.
        prompts: prompts; of more than one the tag is the first word of each.
        padding: bytes that make the prompt longer.
    """

    tag: str
    stream: bool = False
    tokens: int = 4
    n: int = 1
    prompts: int = 1
    padding: int = 0

    @property
    def sequences(self) -> int:
        return self.n * self.prompts

    def body(self) -> bytes:
        prompt = f"{self.tag} {'x' * self.padding}"
        body = {
            "model": "m",
            "prompt": prompt if self.prompts == 1 else [prompt] * self.prompts,
            "max_tokens": self.tokens,
            "stream": self.stream,
        }
        if self.n > 1:
            body["n"] = self.n
        if self.stream:
            body["stream_options"] = {"include_usage": True}
        return json.dumps(body).encode()


def asked_by(body: dict) -> Asked:
    """A request as its body tells it."""
    prompt = body["prompt"]
    prompts = [prompt] if isinstance(prompt, str) else prompt
    return Asked(
        prompts[0].split(" ", 1)[0],
        bool(body.get("stream")),
        body["max_tokens"],
        body.get("n", 1),
        len(prompts),
    )


def _piece(tag: str, sequence: int, token: int) -> str:
    return f"{tag}.{sequence}.{token} "


def whole(asked: Asked) -> bytes:
    """The answer to a request that wants no stream."""
    texts = [
        "".join(_piece(asked.tag, sequence, token) for token in range(asked.tokens))
        for sequence in range(asked.sequences)
    ]
    choices = [{"index": i, "text": text, "finish_reason": "length"} for i, text in enumerate(texts)]
    count = asked.tokens * asked.sequences
    usage = {"prompt_tokens": 9, "completion_tokens": count, "total_tokens": 9 + count}
    return json.dumps({"object": "text_completion", "choices": choices, "usage": usage}).encode()


def events(asked: Asked, padding: str = "") -> Iterator[bytes]:
    """The answer to one that does: a server-sent event at a time."""
    for token in range(asked.tokens):
        for sequence in range(asked.sequences):
            finish = "length" if token == asked.tokens - 1 else None
            text = _piece(asked.tag, sequence, token) + padding
            yield event({"choices": [{"index": sequence, "text": text, "finish_reason": finish}]})
    count = asked.tokens * asked.sequences
    usage = {"prompt_tokens": 9, "completion_tokens": count, "total_tokens": 9 + count}
    yield event({"choices": [], "usage": usage})
    yield b"data: [DONE]\n\n"


def event(data: dict) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(data).encode() + b"\n\n"


@dataclass
class Response:
    """What a client got.

    Attributes:
        status: HTTP status.
        headers: by their names in lower case.
        body: so far.
        whole: whether the response ended as HTTP has it.
    """

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = False


def judged(response: Response, asked: Asked | None = None) -> Verdict:
    """What a response is.

    Args:
        response: it, to its end.
        asked: what was asked for; None for what has no answer.

    Raises:
        Violation: it is nothing that a client should get.
    """
    if not response.whole:
        raise Violation(f"HTTP {response.status}, broken off after {response.body[-80:]!r}")
    if response.status != 200:
        return _error(response)
    if asked is None:
        raise Violation(f"answered with {response.body[:80]!r}")
    if not asked.stream:
        packed = response.headers.get("content-encoding") == "gzip"
        body = gzip.decompress(response.body) if packed else response.body
        _complete(asked, _choices(_json(body)))
        return "answer"
    return _stream(response, asked)


def _error(response: Response) -> Verdict:
    if not 400 <= response.status <= 599:
        raise Violation(f"HTTP {response.status}, which is no error and no answer")
    _check_error(_json(response.body))
    if not response.headers.get("content-type", "").startswith("application/json"):
        raise Violation(f"HTTP {response.status} of type {response.headers.get('content-type')}")
    return "error"


def _check_error(told: dict) -> None:
    error = told.get("error")
    if not (isinstance(error, dict) and isinstance(error.get("message"), str)):
        raise Violation(f"no error in OpenAI's form: {str(told)[:80]}")


def _stream(response: Response, asked: Asked) -> Verdict:
    *blocks, rest = response.body.replace(b"\r\n", b"\n").split(b"\n\n")
    if rest:
        raise Violation(f"a stream that ends within an event: {rest[-80:]!r}")
    choices: list[dict] = []
    ended: Verdict | None = None
    for block in blocks:
        lines = [line[5:].strip() for line in block.split(b"\n") if line.startswith(b"data:")]
        if not lines:
            continue  # a comment
        if ended is not None:
            raise Violation(f"goes on after its end: {block[:80]!r}")
        if lines == [b"[DONE]"]:
            ended = "answer"
            continue
        told = _json(b"\n".join(lines))
        if "error" in told:
            _check_error(told)
            ended = "cut"
        else:
            choices += _choices(told)
    if ended == "cut":
        _partly(asked, choices)
        return "cut"
    _complete(asked, choices)
    return "answer"


def _json(content: bytes) -> dict:
    try:
        told = json.loads(content)
    except ValueError as error:
        raise Violation(f"no JSON: {content[:80]!r}") from error
    if not isinstance(told, dict):
        raise Violation(f"no JSON object: {content[:80]!r}")
    return told


def _choices(told: dict) -> list[dict]:
    choices = told.get("choices")
    if not isinstance(choices, list) or not all(isinstance(each, dict) for each in choices):
        raise Violation(f"no choices: {str(told)[:80]}")
    return choices


def _partly(asked: Asked, choices: list[dict]) -> dict[int, int]:
    """Tokens of each sequence; all of them are its own, in their order."""
    found: dict[int, int] = {}
    for choice in choices:
        index = choice["index"]
        for word in choice["text"].split():
            expected = _piece(asked.tag, index, found.get(index, 0)).strip()
            if word.strip("-") and word != expected:
                raise Violation(f"expected {expected}, found {word[:80]}")
            found[index] = found.get(index, 0) + bool(word.strip("-"))
    return found


def _complete(asked: Asked, choices: list[dict]) -> None:
    found = _partly(asked, choices)
    ended = {choice["index"] for choice in choices if choice.get("finish_reason")}
    if found != dict.fromkeys(range(asked.sequences), asked.tokens) or ended != set(found):
        raise Violation(f"an answer that is not whole: {found}, expected {asked.tokens} each")
