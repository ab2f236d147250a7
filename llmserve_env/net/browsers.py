"""What browsers may ask of a server, and for whom.

A browser sends requests in the name of whatever page it shows, with the cookies and passwords that it keeps
for the server, to servers that only its machine reaches. Programs that are no browsers send neither of the
headers that tell, and are not concerned.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Awaitable, Callable, Collection, Iterable, MutableMapping
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

_READING = ("GET", "HEAD", "OPTIONS")
_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}
_LOOKED_AT = frozenset({b"host", b"origin", b"sec-fetch-site", b"x-forwarded-host"})


class BrowserRules:
    """ASGI middleware: refuses what another site has a visitor's browser send, and names that are not ours.

    A request that changes something, a WebSocket, and whatever is below `guarded` is refused with 403 where
    the browser says that a page of another origin sent it. What a page of this server sends from within a
    frame of another site is this server's own. A request for a host that is none of `hosts` is refused with
    400: whoever owns a name can let it point to this machine, and his page is then of this server's origin.

    Args:
        app: what is protected.
        hosts: names that the server is asked by, `*.NAME` for all below one; None for any. Addresses,
            localhost and names without a dot are always good: nobody can buy one and let it point here.
        origins: origins of other sites that may send requests, "*" for all.
        guarded: beginnings of paths where GET is more than reading.
        error_body: body of refusals, from message and status (default: `{"detail": message}`).
    """

    def __init__(
        self,
        app: App,
        *,
        hosts: Collection[str] | None = None,
        origins: Collection[str] = (),
        guarded: tuple[str, ...] = (),
        error_body: Callable[[str, int], bytes] | None = None,
    ) -> None:
        self._app = app
        self._hosts = None if hosts is None or "*" in hosts else frozenset(each.lower() for each in hosts)
        self._origins = frozenset(origins)
        self._guarded = guarded
        self._error_body = error_body or _detail

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] in ("http", "websocket"):
            found = {name: value.decode("latin-1") for name, value in scope["headers"] if name in _LOOKED_AT}
            if self._hosts is not None and not is_host(found.get(b"host", ""), self._hosts):
                await self._refuse(scope, send, 400, "this is no name of this server: see --allowed-host")
                return
            # A program that is no browser says neither.
            tells = b"origin" in found or b"sec-fetch-site" in found
            if tells and self._changes(scope) and is_cross_origin(found, self._origins):
                await self._refuse(scope, send, 403, "pages of other sites may not send this")
                return
        await self._app(scope, receive, send)

    def _changes(self, scope: Message) -> bool:
        if scope["type"] == "websocket" or scope["method"] not in _READING:
            return True
        return bool(self._guarded) and scope["path"].startswith(self._guarded)

    async def _refuse(self, scope: Message, send: Send, status: int, message: str) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": message})
            return
        body = self._error_body(message, status)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),  # the body may not have been read
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class ResponseHeaders:
    """ASGI middleware: headers that bound what browsers do with answers.

    Args:
        app: what answers.
        policy: the Content-Security-Policy of a page, from its path.
    """

    def __init__(self, app: App, policy: Callable[[str], str]) -> None:
        self._app = app
        self._policy = policy

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
                if any(
                    name.lower() == b"content-type" and value[:9] == b"text/html" for name, value in headers
                ):
                    headers.append((b"content-security-policy", self._policy(scope["path"]).encode()))
                    headers.append((b"referrer-policy", b"same-origin"))
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, send_with_headers)


def is_cross_origin(headers: MutableMapping[bytes, str], origins: Collection[str] = ()) -> bool:
    """Whether a browser says that it sends a request for a page of another origin.

    Args:
        headers: of the request, with their names in lower case.
        origins: other origins that may, "*" for all.
    """
    origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site")
    if origin is not None and ("*" in origins or origin in origins):
        return False
    if site in ("same-origin", "none"):  # none: somebody typed the address
        return False
    if site == "cross-site":
        return True
    # Over plain HTTP browsers tell no site but to their own machine; another port of a host is the same site.
    if origin is None:
        return False
    scheme, _, own = origin.partition("://")
    named = [headers.get(b"host", ""), *headers.get(b"x-forwarded-host", "").split(",")]
    return _place(own, scheme) not in [_place(each.strip(), scheme) for each in named if each.strip()]


@lru_cache(maxsize=64)  # most requests name the same
def is_host(host: str, hosts: frozenset[str]) -> bool:
    """Whether a Host header names one of these, an address, localhost, or what has no dot."""
    name = (_place(host, "http")[0] or "").removesuffix(".")
    if "[" in name:  # an address that is none
        return False
    if "." not in name or name.endswith(".localhost") or _is_address(name):
        return True
    above = ("*." + name.split(".", number)[-1] for number in range(1, name.count(".") + 1))
    return name in hosts or any(each in hosts for each in above)


def _place(host: str, scheme: str) -> tuple[str | None, int | None]:
    """Name and port of HOST[:PORT]."""
    try:
        parts = urlsplit(f"//{host}")
        return parts.hostname, parts.port or _PORTS.get(scheme)
    except ValueError:
        return host, None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _detail(message: str, status: int) -> bytes:
    return json.dumps({"detail": message}).encode()
