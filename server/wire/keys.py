"""The service's API key: who bears it may have what costs the owner."""

from __future__ import annotations

import base64
import binascii
import hmac
from typing import TYPE_CHECKING

from pydantic_core import to_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.types import ASGIApp, Receive, Scope, Send

OPEN_PATHS = ("/health", "/metadata", "/schema", "/tasks", "/openapi.json", "/favicon.ico")
"""What is told to anybody, and costs nothing."""
CHALLENGE = 'Basic realm="LLMServe, any user, the key as password", charset="UTF-8"'
"""What browsers ask their user by."""


def bears(headers: Iterable[tuple[bytes, bytes]], key: str) -> bool:
    """Whether a request has the key: `Authorization: Bearer KEY`, or Basic with the key as password.

    Args:
        headers: of the request, with their names in lower case.
        key: the service's.
    """
    given = [_given(value) for name, value in headers if name == b"authorization"]
    return any(hmac.compare_digest(each, key.encode()) for each in given)


class KeyRequired:
    """ASGI middleware: answers 401 to requests without the key, but to those for `OPEN_PATHS`.

    Args:
        app: what is protected.
        key: the service's.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        is_open = scope["type"] not in ("http", "websocket") or scope["path"] in OPEN_PATHS
        if is_open or bears(scope["headers"], self._key):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            content = to_json({"detail": "expected the service's key: Authorization: Bearer KEY"})
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(content)).encode()),
                (b"www-authenticate", CHALLENGE.encode()),
                (b"connection", b"close"),  # the body has not been read
            ]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": content})


def _given(value: bytes) -> bytes:
    """The key of an Authorization header, or something that is none."""
    scheme, _, given = value.partition(b" ")
    given = given.strip()
    if scheme.lower() == b"bearer":
        return given
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(given, validate=True).partition(b":")[2]
        except binascii.Error:
            pass
    return b""
