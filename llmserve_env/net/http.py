"""HTTP clients: aiohttp in an event loop, httpx outside of one.

A gateway relays every token when it comes, thousands a second, and aiohttp takes a fraction of httpx's
processor time for it; whatever else is asked in an event loop uses the same. Commands that await one answer
after the other need no event loop: they use httpx, which is there anyway, as OpenAI's library is built on it.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit, urlunsplit

from llmserve_env.errors import InputError, missing_package

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import aiohttp
    import httpx

JSON_HEADERS = {"Content-Type": "application/json"}
_KEPT_S = 4.0  # vLLM closes connections that were idle for 5 s
_MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
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
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEPT_S),
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


async def fetch(
    session: aiohttp.ClientSession,
    url: str,
    headers: Mapping[str, str] | Sequence[tuple[str, str]],
    *,
    max_bytes: int,
) -> tuple[int, bytes]:
    """GET what a server shows, and follow its redirects to itself.

    Args:
        session: Client; its time limit is the caller's choice.
        url: Address to ask.
        headers: Headers to send.
        max_bytes: Bytes that the answer may have.

    Returns:
        Status and body. A redirect to elsewhere is an answer.

    Raises:
        InputError: the answer is longer.
        aiohttp.ClientError, OSError, asyncio.TimeoutError: no answer, or one that broke off.
    """
    for left in reversed(range(_MAX_REDIRECTS + 1)):
        async with session.get(url, headers=headers, allow_redirects=False) as answer:
            location = answer.headers.get("location")
            target = None
            if left and answer.status in _REDIRECTS and location is not None:
                target = redirected(url, location)
            if target is not None:
                url = target
                continue
            content = bytearray()
            async for piece in answer.content.iter_any():
                content += piece
                if len(content) > max_bytes:
                    raise InputError(f"longer than {max_bytes} bytes")
        return answer.status, bytes(content)
    raise AssertionError("the last answer is taken as it is")


def get(client: httpx.Client, path: str) -> httpx.Response:
    """GET what a server shows, and follow its redirects to itself.

    Raises:
        httpx.HTTPError: no answer, or one that broke off.
    """
    answer = client.get(path)
    for _ in range(_MAX_REDIRECTS):
        if answer.status_code not in _REDIRECTS or "location" not in answer.headers:
            break
        target = redirected(str(answer.url), answer.headers["location"])
        if target is None:
            break
        answer = client.get(target)
    return answer


def redirected(url: str, location: str) -> str | None:
    """Where a redirect of a URL leads, with the URL's user and password; None where it is another server.

    Args:
        url: Address that was asked.
        location: What the answer says, an address or a path.
    """
    try:
        location.encode()  # what came was no UTF-8 where this fails
        target, here = urlsplit(urljoin(url, location)), urlsplit(url)
        ports = [each.port or {"http": 80, "https": 443}.get(each.scheme) for each in (target, here)]
    except ValueError:
        return None
    if (target.scheme, target.hostname, ports[0]) != (here.scheme, here.hostname, ports[1]):
        return None
    return urlunsplit((here.scheme, here.netloc, target.path or "/", target.query, ""))


def bearer(url: str, api_key: str | None) -> dict[str, str]:
    """Headers with a key for a URL; none where the URL has a user of its own."""
    return {"Authorization": f"Bearer {api_key}"} if api_key and not urlsplit(url).username else {}


def payload(content: bytes) -> bytes | io.BytesIO:
    """A request's body as aiohttp takes it without holding up the event loop."""
    return io.BytesIO(content) if len(content) > _LARGE_BYTES else content
