"""Replies over ASGI: whole ones, errors in OpenAI's form, and headers that pass to the other side."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, MutableMapping
from functools import cache
from typing import Any

from llmserve_env.live.gateway.admission.passage import Refused
from llmserve_env.live.gateway.wire import error_json

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

JSON: Headers = [(b"content-type", b"application/json")]
_KINDS = {401: "authentication_error", 404: "NotFoundError", 429: "rate_limit_error"}
"""Types of errors, 404 as vLLM calls it."""
_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
    b"transfer-encoding upgrade".split()
)


async def reply(send: Send, status: int, headers: Headers, body: bytes) -> None:
    """Answer at once and whole."""
    headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def refuse(send: Send, refused: Refused) -> None:
    """Answer with an error in OpenAI's form."""
    headers = list(JSON)
    if refused.retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(refused.retry_after_s))).encode()))
    await reply(send, refused.status, headers, error_of(refused))


def error_of(refused: Refused) -> bytes:
    """A refusal in OpenAI's form."""
    other = "invalid_request_error" if refused.status < 500 else "server_error"
    return error_json(refused.message, _KINDS.get(refused.status, other), refused.status, refused.param)


@cache  # nearly all requests and answers are alike in this
def _dropped(without: tuple[bytes, ...]) -> frozenset[bytes]:
    return _HOP_BY_HOP.union(without)


def passed_on(headers: Headers, *without: bytes) -> Headers:
    """Headers (names in lower case) that are for the other side, too."""
    dropped = _dropped(without)
    for name, value in headers:
        if name == b"connection":
            dropped = dropped.union(each.strip().lower() for each in value.split(b","))
    return [(name, value) for name, value in headers if name not in dropped]
