"""Answers that pages of other origins may read, in browsers: cross-origin resource sharing (CORS).

https://fetch.spec.whatwg.org/#http-cors-protocol
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from llmserve_env.errors import InputError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_KEPT_S = 600
"""How long a browser keeps the answer to a preflight."""
_METHODS = b"GET, POST, OPTIONS"
_NAMES = re.compile(rb"[-!#$%&'*+.^_`|~0-9A-Za-z, \t]*")
_OWN = b"access-control-"


class CrossOrigin:
    """ASGI middleware: lets pages of some origins read what a server answers.

    Preflights of these pages are answered here, whatever the path, and before anybody asks for a key: with
    them browsers send none. Whatever the server itself says of other origins is dropped. Keys that a page has
    itself it may send; cookies and passwords that browsers keep it may not.

    Args:
        app: what answers.
        origins: origins that may, "*" for all; without any, none may.

    Raises:
        InputError: what is no origin.
    """

    def __init__(self, app: App, origins: Collection[str] = ()) -> None:
        self._app = app
        self._all = "*" in origins
        self._origins = frozenset(origin_of(each).encode() for each in origins if each != "*")

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        origin = headers.get(b"origin")
        if origin is None and (self._all or not self._origins):
            await self._app(scope, receive, send)
            return
        more = self._allowed(origin)
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers and more:
            if self._all or origin in self._origins:
                asked = headers.get(b"access-control-request-headers", b"")
                more.append((b"access-control-allow-methods", _METHODS))
                if _NAMES.fullmatch(asked) and asked:
                    more.append((b"access-control-allow-headers", asked))
                more.append((b"access-control-max-age", str(_KEPT_S).encode()))
            await send({"type": "http.response.start", "status": 204, "headers": more})
            await send({"type": "http.response.body", "body": b""})
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [each for each in message.get("headers", ()) if not each[0].lower().startswith(_OWN)]
                message = {**message, "headers": [*kept, *more]}
            await send(message)

        await self._app(scope, receive, send_with_headers)

    def _allowed(self, origin: bytes | None) -> list[tuple[bytes, bytes]]:
        """What an answer says of the origin that a request is from."""
        exposed = (b"access-control-expose-headers", b"*")
        if self._all:
            return [(b"access-control-allow-origin", b"*"), exposed]
        if origin in self._origins and origin is not None:
            return [(b"access-control-allow-origin", origin), exposed, (b"vary", b"Origin")]
        return [(b"vary", b"Origin")] if self._origins else []  # to others the answer is another


def origin_of(text: str, field: str = "cors-origin") -> str:
    """An origin as browsers send it: scheme, host and port, the usual port left out.

    Args:
        text: SCHEME://HOST or SCHEME://HOST:PORT.
        field: what a refusal calls it.

    Raises:
        InputError: it is none.
    """
    try:
        parts = urlsplit(text)
        port = parts.port
        whole = parts.scheme and parts.hostname and parts.path in ("", "/") and "@" not in parts.netloc
    except ValueError:
        whole, port = None, None
    if not whole or parts.query or parts.fragment or not text.isascii():
        raise InputError(f"expected * or SCHEME://HOST[:PORT], found {text!r}", field=field)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    usual = {"http": 80, "https": 443}.get(parts.scheme)
    return f"{parts.scheme}://{host}" + ("" if port in (None, usual) else f":{port}")
