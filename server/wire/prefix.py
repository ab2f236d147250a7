"""The path below which clients have the service, where a proxy serves other things beside it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import quote

from starlette.responses import RedirectResponse

from llmserve_env.errors import InputError

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

_HEADER = b"x-forwarded-prefix"
_PREFIX = re.compile(r"(?:/(?!\.+(?:/|$))[A-Za-z0-9._~-]+)+")
"""Segments of letters that no URL has to quote, and none that leads upwards."""


class TakePrefix:
    """ASGI middleware: takes the prefix from the path of a request and keeps it as `root_path`.

    Proxies pass paths on with it or without it, and both are served. What stands behind this one sees paths
    without it.

    Args:
        app: what answers.
        root_path: the prefix; where it is empty, each request's is what its proxy says in
            `X-Forwarded-Prefix`, if that is a path.
    """

    def __init__(self, app: ASGIApp, root_path: str = "") -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] in ("http", "websocket"):
            prefix = scope.get("root_path") or self._root_path or _forwarded(scope)
            if prefix:
                scope = {**scope, "root_path": prefix}
                if f"{scope['path']}/".startswith(f"{prefix}/"):
                    _set_path(scope, scope["path"][len(prefix) :] or "/")
        await self._app(scope, receive, send)


class PutPrefix:
    """ASGI middleware: puts the prefix back before the path, as routes expect it beside a `root_path`.

    Args:
        app: the routes.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] in ("http", "websocket") and (prefix := scope.get("root_path")):
            scope = dict(scope)
            _set_path(scope, prefix + scope["path"])
        await self._app(scope, receive, send)


def checked_prefix(root_path: str) -> str:
    """The prefix without a slash at its end.

    Raises:
        InputError: it is no path.
    """
    prefix = root_path.rstrip("/")
    if prefix and not _PREFIX.fullmatch(prefix):
        raise InputError(f"expected a path like /llmserve, found '{root_path}'", field="root_path")
    return prefix


def redirect(request: Request, path: str) -> RedirectResponse:
    """A redirect to a path of ours from one at the top, also where nobody told us of a prefix.

    Args:
        request: request for `/` or `/NAME`.
        path: without a slash before it.
    """
    prefix = request.scope.get("root_path")
    return RedirectResponse(f"{prefix}/{path}" if prefix else path)


def _set_path(scope: Scope, path: str) -> None:
    scope["path"] = path
    scope["raw_path"] = quote(path).encode()


def _forwarded(scope: Scope) -> str:
    """What a proxy says that it took from the path."""
    for name, value in scope["headers"]:
        if name == _HEADER:
            prefix = value.decode("latin-1").rstrip("/")
            return prefix if _PREFIX.fullmatch(prefix) else ""
    return ""
