"""The service: `python -m server.app`, or `server.app:app` for any ASGI server."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import tyro

from llmserve_env.episode import prepare
from llmserve_env.errors import InputError, missing_package
from llmserve_env.net.connections import room_for
from llmserve_env.net.sockets import listen
from server.settings import Settings

# What takes seconds to import is imported where it is used: the guard's process imports this module, too.
if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from server.service import Service

_NAME = "llmserve_env"
_OWN_PATHS = ("/reset", "/step", "/state", "/ws")
"""Routes of OpenEnv's that ours take the place of: those make a new environment for every request."""
_DRAIN_S = 30
"""Time that requests have to end after a SIGTERM (s)."""


def create_app(settings: Settings | None = None) -> FastAPI:
    """The ASGI application.

    Args:
        settings: bounds (default: those of `Settings`).

    Raises:
        InputError: the journal's folder cannot be written.
    """
    settings = settings or Settings()
    with nullcontext() if settings.web else _without_gradio():
        from openenv.core.env_server.http_server import create_fastapi_app

    from fastapi import WebSocket

    from server.environment import ServeEnvironment
    from server.messages import errors
    from server.messages.models import ServiceAction, ServiceObservation, ServiceState
    from server.service import Service
    from server.wire import http, ws
    from server.wire.mcp import mount_mcp
    from server.wire.protection import protect

    service = Service(settings)
    factory = partial(ServeEnvironment, service)
    types = (ServiceAction, ServiceObservation, _NAME)
    options: dict[str, Any] = {"max_concurrent_envs": settings.max_sessions, "state_cls": ServiceState}
    if settings.web:
        from server.page.ui import create_page_app

        app: FastAPI = create_page_app(service, factory, *types, **options)
    else:
        app = create_fastapi_app(factory, *types[:2], env_name=_NAME, **options)
    app.title = "LLMServe"  # the version is that of OpenEnv's interface, which its validator reads
    app.description = "Run an LLM inference service: reset, step, grade."
    app.contact, app.license_info = None, {"name": "Apache-2.0", "identifier": "Apache-2.0"}
    app.router.routes[:] = [
        route for route in app.router.routes if getattr(route, "path", None) not in _OWN_PATHS
    ]
    app.include_router(http.router(service))

    async def websocket(connection: WebSocket) -> None:
        await ws.serve(connection, service)

    # Annotations here are texts, which FastAPI looks up among the module's names.
    websocket.__annotations__["connection"] = WebSocket
    app.add_api_websocket_route("/ws", websocket)

    errors.add_handlers(app)
    protect(app, service)
    app.state.service = service
    _run_with(app, service)
    service.answer_mcp = mount_mcp(app, service).answer
    return app


@contextmanager
def _without_gradio() -> Iterator[None]:
    """Let OpenEnv's first import find no Gradio, which takes most of its time and is for the page alone."""
    if "gradio" in sys.modules:
        yield
        return
    sys.modules["gradio"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["gradio"]


def _run_with(app: FastAPI, service: Service) -> None:
    """Let the service start and stop with the application."""
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(of: FastAPI) -> AsyncIterator[Any]:
        await asyncio.to_thread(prepare)  # no first step is to wait for a compilation
        async with inner(of) as state, service.running():
            yield state

    app.router.lifespan_context = lifespan


def main() -> None:
    """Serve until SIGTERM or Ctrl-C; requests under way are answered first."""
    settings = tyro.cli(Settings, prog="python -m server.app", description=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every request to an endpoint
    sys.setswitchinterval(5e-4)  # a replay in a thread holds up everybody else's steps for as long
    try:
        if settings.mode == "real" and not settings.is_local:
            _check_key(settings)
        import uvicorn

        app = create_app(settings)
        config = server_config(app, settings)
        prepare()  # who is told that the server listens is not to wait for a compilation
        sockets = [listen(settings.host, port) for port in settings.ports]
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    except ModuleNotFoundError as error:
        raise SystemExit(f"error: {missing_package(error)}") from None
    for listening in sockets:
        print("listening on http://{}:{}".format(*listening.getsockname()[:2]), flush=True)

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            for server in self.servers:
                server.close()
            for listening in sockets or []:
                listening.close()
            if settings.web:
                app.state.end_streams()  # an open page would wait for its next event
            await app.state.service.drain(_DRAIN_S)  # uvicorn itself cuts WebSockets off
            await super().shutdown(sockets)

    # uvicorn raises the signal again when it is done, which is the end that was asked for.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    gc.freeze()  # what is loaded stays: to look for garbage among it would hold up everybody
    Server(config).run(sockets=sockets)


def server_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """How connections are served.

    Args:
        app: the application.
        settings: bounds.
    """
    import uvicorn

    from llmserve_env.net.protocols import bounded

    limits = settings.connections
    return uvicorn.Config(
        app,
        **bounded(replace(limits, max_connections=room_for(limits.max_connections))),
        log_level="warning",
        ws_max_size=settings.max_body_bytes,
        ws_per_message_deflate=False,  # costs more than it spares on one machine
        # Pings keep proxies' connections open. Who does not answer them may be computing his next action: how
        # long he may is for the session's timeout to say.
        ws_ping_timeout=None,
        timeout_graceful_shutdown=_DRAIN_S,
    )


def _check_key(settings: Settings) -> None:
    if settings.key is None:
        reason = "expected a key (or LLMSERVE_API_KEY): in mode real whoever can connect loads the engines"
        raise InputError(reason, field="api_key")


def __getattr__(name: str) -> Any:
    if name == "app":  # made when an ASGI server asks for it, and not for `main`, which has other settings
        settings = Settings(allowed_host=("*",))  # only that server knows who can connect
        if settings.mode == "real":
            _check_key(settings)
        globals()["app"] = create_app(settings)
        return globals()["app"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    main()
