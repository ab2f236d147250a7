"""The page at /web: OpenEnv's own, with a tab of ours beside it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Gradio reads these when OpenEnv imports and mounts it, where nobody else can give it arguments.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("GRADIO_RUN_HISTORY", "False")

from gradio.route_utils import CustomCORSMiddleware
from openenv.core.env_server.web_interface import create_web_interface_app
from starlette.responses import PlainTextResponse
from starlette.routing import Mount

from server.page.ui_playground import Playground
from server.page.ui_tab import PlayTab
from server.page.ui_visitors import Visitors
from server.wire.prefix import redirect

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Receive, Scope, Send

    from server.service import Service

_SHARED = ("/web/reset", "/web/step", "/web/state", "/ws/ui")
"""OpenEnv's routes to the one environment that all visitors of its page would share."""
_LEADING = {"/": "web/", "/web": "web/", "/favicon.ico": "web/favicon.ico"}
"""Routes that lead to the page. OpenEnv's own would lead out of a proxy's prefix."""
_USED = ("/static/", "/assets/", "/gradio_api/heartbeat/")
_USED_WHOLE = (
    *("", "/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"),
    *("/gradio_api/app_id", "/gradio_api/queue/join", "/gradio_api/queue/data"),
)
"""Gradio's routes that the page uses. Others store files of anybody, read files, fetch from other hosts, run
functions without the queue, or tell of other visitors."""


_WORDS = {
    "<h1>Llmserve</h1>": "<h1>LLMServe</h1>",
    "ServeEnvironment environment": "One configuration a window: the environment as its clients have it.",
    "from server.messages.models import ServiceAction\nfrom llmserve_env import LLMServeEnv": (
        "from llmserve_env import LLMServeEnv, ServeAction"
    ),
    "ServiceAction(": "ServeAction(",
}
"""What OpenEnv's tab says of an environment that it only knows the factory of, and what is true of ours."""


def create_page_app(
    service: Service,
    factory: Callable[[], Any],
    action_cls: Any,
    observation_cls: Any,
    name: str,
    **options: Any,
) -> FastAPI:
    """OpenEnv's application with its page, on which every visitor has a session.

    Its `state.end_streams()` ends what it streams to open pages, which would hold up a shutdown.

    Args:
        service: that plays.
        factory: makes an environment.
        action_cls: of the environment.
        observation_cls: of the environment.
        name: of the environment.
        options: further arguments of `create_web_interface_app`.
    """
    visitors, playground = Visitors(service), Playground(service)

    def build(web_manager: Any, *_: Any) -> Any:
        playground.take_over(web_manager)

        def leave(visitor: str) -> None:
            visitors.leave(visitor)
            playground.leave(visitor)

        return PlayTab(service, visitors).build(leave)

    app: FastAPI = create_web_interface_app(
        factory,
        action_cls,
        observation_cls,
        name,
        gradio_builder=build,
        custom_tab_name="Play",
        custom_tab_primary=True,
        title_override="LLMServe",
        **options,
    )
    app.router.routes[:] = [
        route
        for route in app.router.routes
        if isinstance(route, Mount) or getattr(route, "path", None) not in (*_SHARED, *_LEADING)
    ]
    for path, to in _LEADING.items():
        app.router.add_route(path, partial(redirect, path=to), include_in_schema=False)
    for mount in app.router.routes:
        if isinstance(mount, Mount) and mount.path == "/web":
            page: Any = mount.app
            _settle(page, service.settings.max_sessions)
            app.state.end_streams = page.stop_event.set
    return app


def _settle(page: Any, most_visitors: int) -> None:
    """Add our style to Gradio's mounted application, and take out what a public page should not have."""
    # Its own CORS would let any page read answers. The last that is added comes first.
    page.user_middleware[:] = [each for each in page.user_middleware if each.cls is not CustomCORSMiddleware]
    page.add_middleware(_UsedRoutes)
    blocks = page.get_blocks()
    blocks.css = (blocks.css or "") + Path(__file__).with_name("ui.css").read_text(encoding="utf-8")
    blocks.stylesheets = []  # fonts of another host; the theme names local ones to fall back to
    blocks.state_session_capacity = page.state_holder.capacity = most_visitors
    for block in blocks.blocks.values():
        if isinstance(text := getattr(block, "value", None), str):
            for theirs, ours in _WORDS.items():
                text = text.replace(theirs, ours)
            block.value = text
    for event in blocks.fns.values():
        event.concurrency_limit = None  # visitors do not wait for each other
    blocks.config = blocks.get_config_file()


class _UsedRoutes:
    """ASGI middleware: answers 404 to what the page does not ask for."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if path not in _USED_WHOLE and not path.startswith(_USED):
                await PlainTextResponse("Not Found", 404)(scope, receive, send)
                return
        await self._app(scope, receive, send)
