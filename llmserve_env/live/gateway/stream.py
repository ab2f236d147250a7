"""One streamed completion of an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import httpx


class RequestFailed(Exception):
    """A request has no complete answer.

    Args:
        reason: in a few words, for counting.
        status: HTTP status of a refusal.
    """

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status


async def stream_completion(
    client: httpx.AsyncClient, body: dict[str, Any], on_step: Callable[[], object]
) -> dict[str, int]:
    """Send a request and follow its answer to the end.

    Args:
        client: with the endpoint's base URL.
        body: of POST /completions, with `stream` set.
        on_step: called when a piece of the answer comes, one token or more.

    Returns:
        The endpoint's `usage`; empty where it sends none.

    Raises:
        RequestFailed: refused, an error in the stream (which vLLM sends with HTTP 200), broken off, or empty.
        httpx.HTTPError: no connection, or a lost one.
    """
    usage: dict[str, int] = {}
    steps, ended = 0, False
    async with client.stream("POST", "completions", json=body) as response:
        if response.status_code != 200:
            raise RequestFailed(f"http {response.status_code}", response.status_code)
        async with aclosing(cast("AsyncGenerator[str, None]", response.aiter_lines())) as lines:
            async for line in lines:  # to the end, so that the connection can be used again
                if not line.startswith("data:"):
                    continue
                data = line[5:].strip()
                if data == "[DONE]":
                    ended = True
                    continue
                chunk = _parsed(data)
                usage = chunk.get("usage") or usage
                for choice in chunk.get("choices") or ():
                    end = choice.get("finish_reason")
                    ended = ended or end is not None
                    # A token can be no text yet (half a character); an end without text is none.
                    if choice.get("text") or end is None:
                        steps += 1
                        on_step()
    if not ended:
        raise RequestFailed("stream broken off")
    if not steps:
        raise RequestFailed("empty answer")
    return usage


def _parsed(data: str) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except ValueError as error:
        raise RequestFailed("stream without JSON") from error
    if not isinstance(chunk, dict):
        raise RequestFailed("stream without JSON")
    if chunk.get("error") or chunk.get("object") == "error":
        raise RequestFailed("error in the stream")
    return chunk
