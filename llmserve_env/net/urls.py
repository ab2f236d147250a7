"""URLs of servers, and URLs as they may be printed."""

from __future__ import annotations

import contextlib
from urllib.parse import urlsplit, urlunsplit

from llmserve_env.errors import InputError


def without_credentials(url: str) -> str:
    """A URL without user, password, query, fragment and the slash at its end."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))


def server_url(url: str, field: str = "url") -> str:
    """A server's URL without /v1.

    Args:
        url: with or without it.
        field: what a refusal calls it.

    Raises:
        InputError: it is no URL of a server.
    """
    found = url.rstrip("/").removesuffix("/v1")
    with contextlib.suppress(ValueError):  # a port out of range, brackets that do not close
        parts = urlsplit(found)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        if usable and not parts.query and not parts.fragment:
            return found
    shown = "what is none"
    with contextlib.suppress(ValueError):
        shown = repr(without_credentials(url))
    raise InputError(f"expected http://HOST:PORT, found {shown}", field=field)
