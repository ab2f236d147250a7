"""Bodies that are too large are refused before they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic_core import to_json

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """ASGI middleware: answers 413 to a body of more bytes than the limit, whatever its header says.

    Args:
        app: what is protected.
        most: bytes.
        exempt: beginnings of paths that it does not hold for.
    """

    def __init__(self, app: ASGIApp, most: int, exempt: tuple[str, ...] = ()) -> None:
        self._app = app
        self._most = most
        self._exempt = exempt

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
                return
            body += part.get("body", b"")
            more = part.get("more_body", False)
            if len(body) > self._most:
                await self._refuse(send)
                return
        whole: Message | None = {"type": "http.request", "body": bytes(body), "more_body": False}

        async def replay() -> Message:
            nonlocal whole
            if whole is None:
                return await receive()
            message, whole = whole, None
            return message

        await self._app(scope, replay, send)

    async def _refuse(self, send: Send) -> None:
        content = to_json({"detail": f"expected a body of at most {self._most:,} bytes"})
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            (b"connection", b"close"),  # the rest of the body is not read
        ]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": content})
