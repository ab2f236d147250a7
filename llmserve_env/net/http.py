"""HTTP clients: aiohttp in an event loop, httpx outside of one.

A gateway relays every token when it comes, thousands a second, and aiohttp takes a fraction of httpx's
processor time for it; whatever else is asked in an event loop uses the same. Commands that await one answer
after the other need no event loop: they use httpx, which is there anyway, as OpenAI's library is built on it.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from llmserve_env.errors import missing_package

if TYPE_CHECKING:
    import aiohttp
    import httpx

JSON_HEADERS = {"Content-Type": "application/json"}
_KEPT_S = 4.0  # vLLM closes connections that were idle for 5 s
_LARGE_BYTES = 1 << 20  # what is larger aiohttp sends in parts, if it is a file


def open_session(**options: Any) -> aiohttp.ClientSession:
    """A client for an event loop, to be made in it: any number of connections, no time limit of its own.

    Args:
        options: Further arguments of `aiohttp.ClientSession`.

    Raises:
        InputError: aiohttp is missing.
    """
    try:
        import aiohttp
    except ImportError as error:
        raise missing_package(error) from error
    from llmserve_env.net.connector import QuietConnector

    return aiohttp.ClientSession(
        connector=QuietConnector(limit=0, keepalive_timeout=_KEPT_S),
        **{"timeout": aiohttp.ClientTimeout(total=None), **options},
    )


def open_client(url: str, api_key: str | None = None, *, timeout_s: float) -> httpx.Client:
    """A client outside of event loops.

    Args:
        url: Address that its requests begin with.
        api_key: Key that is sent as a bearer token, unless the URL has a user of its own.
        timeout_s: Time that an answer may take (s).

    Raises:
        InputError: httpx is missing.
        httpx.InvalidURL: the address is none.
    """
    try:
        import httpx
    except ImportError as error:
        raise missing_package(error) from error
    return httpx.Client(base_url=url, headers=bearer(url, api_key), timeout=timeout_s)


def bearer(url: str, api_key: str | None) -> dict[str, str]:
    """Headers with a key for a URL; none where the URL has a user of its own."""
    return {"Authorization": f"Bearer {api_key}"} if api_key and not urlsplit(url).username else {}


def payload(content: bytes) -> bytes | io.BytesIO:
    """A request's body as aiohttp takes it without holding up the event loop."""
    return io.BytesIO(content) if len(content) > _LARGE_BYTES else content
