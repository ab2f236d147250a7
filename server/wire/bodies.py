"""Bodies that are too large, or no JSON, are refused before anything else sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic_core import from_json, to_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send


_LARGE = 65_536  # bytes from which on it matters how many names an object has
_MOST_NAMES = 1000


def read_json(content: str | bytes) -> Any:
    """What JSON says, by the letter: no NaN, no half of a surrogate pair, at most 200 levels of nesting.

    Raises:
        ValueError: says what was expected where.
    """
    found = from_json(content, allow_inf_nan=False)
    if len(content) > _LARGE:
        _check_names(found)
    return found


def _check_names(found: Any) -> None:
    """Refuse objects of many names: each that is not known would be an error of its own, seconds for all."""
    unseen: list[Any] = [[found]]
    while unseen:
        each = unseen.pop()
        if isinstance(each, dict):
            if len(each) > _MOST_NAMES:
                raise ValueError(f"at most {_MOST_NAMES:,} names in an object, found {len(each):,}")
            each = list(each.values())
        unseen.extend(inner for inner in each if isinstance(inner, dict | list))


class BodyLimit:
    """ASGI middleware: answers 413 to a body that is too large, whatever its header says, and 422 to no JSON.

    Args:
        app: what is protected.
        most: bytes.
        exempt: beginnings of paths that it does not hold for.
        other_json: beginnings of paths that say themselves what is wrong with JSON.
        dropped: told the size of a body of which nothing came (bytes).
    """

    def __init__(
        self,
        app: ASGIApp,
        most: int,
        exempt: tuple[str, ...] = (),
        other_json: tuple[str, ...] = (),
        dropped: Callable[[int], object] = lambda size: None,
    ) -> None:
        self._app = app
        self._most = most
        self._exempt = exempt
        self._other_json = other_json
        self._dropped = dropped

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] != "http" or scope["path"].startswith(self._exempt):
            await self._app(scope, receive, send)
            return
        body = bytearray()
        more = True
        while more:
            part = await receive()
            if part["type"] != "http.request":  # the client has gone
                self._dropped(len(body))
                return
            body += part.get("body", b"")
            more = part.get("more_body", False)
            if len(body) > self._most:
                self._dropped(len(body))
                await _refuse(send, 413, f"expected a body of at most {self._most:,} bytes")
                return
        if body and _is_json(scope) and not scope["path"].startswith(self._other_json):
            try:
                read_json(bytes(body))
            except ValueError as error:
                fault = {"type": "json_invalid", "loc": ["body"], "msg": f"expected JSON: {error}"}
                await _refuse(send, 422, [fault])
                return
        whole: Message | None = {"type": "http.request", "body": bytes(body), "more_body": False}

        async def replay() -> Message:
            nonlocal whole
            if whole is None:
                return await receive()
            message, whole = whole, None
            return message

        await self._app(scope, replay, send)


def _is_json(scope: Scope) -> bool:
    return any(name == b"content-type" and b"json" in value.lower() for name, value in scope["headers"])


async def _refuse(send: Send, status: int, detail: object) -> None:
    content = to_json({"detail": detail})
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        (b"connection", b"close"),  # the rest of the body may not have been read
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
