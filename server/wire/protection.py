"""What stands before the application: a proxy's prefix, bounds, the key, and rules for browsers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmserve_env.net.browsers import BrowserRules, ResponseHeaders
from server.wire.bodies import BodyLimit
from server.wire.keys import KeyRequired
from server.wire.prefix import PutPrefix, TakePrefix, checked_prefix

if TYPE_CHECKING:
    from fastapi import FastAPI

    from server.service import Service

_GUARDED = ("/baseline", "/web/gradio_api/")
"""Paths where GET is more than reading: it plays, or opens a stream of a visitor's."""
_PAGE = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; "
)
_FRAMED = "frame-ancestors 'self' https://huggingface.co"  # where a Space is shown
_DOCS = (
    "default-src 'none'; script-src 'unsafe-inline' https://cdn.jsdelivr.net; "
    "style-src 'unsafe-inline' https://cdn.jsdelivr.net https://fonts.googleapis.com; "
    "font-src https://fonts.gstatic.com; img-src data: https://fastapi.tiangolo.com https://cdn.redoc.ly; "
    "connect-src 'self'; worker-src blob:; base-uri 'none'; "
)
"""For FastAPI's pages of the interface, whose scripts are another host's."""


def protect(app: FastAPI, service: Service) -> None:
    """Put before a service's application what its settings ask for; the last that is added comes first."""
    settings = service.settings
    app.add_middleware(PutPrefix)
    app.add_middleware(
        BodyLimit, most=settings.max_body_bytes, other_json=("/mcp",), dropped=service.note_freed
    )
    if settings.mode == "real" and settings.key is not None:
        app.add_middleware(KeyRequired, key=settings.key)
    hosts = settings.allowed_host or (() if settings.is_local else None)
    app.add_middleware(BrowserRules, hosts=hosts, guarded=_GUARDED)
    app.add_middleware(ResponseHeaders, policy=_policy)
    app.add_middleware(TakePrefix, root_path=checked_prefix(settings.root_path))


def _policy(path: str) -> str:
    return (_DOCS if path.startswith(("/docs", "/redoc")) else _PAGE) + _FRAMED
