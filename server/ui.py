"""The page at /web: OpenEnv's own, with a tab of ours beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from openenv.core.env_server.web_interface import create_web_interface_app

if TYPE_CHECKING:
    from fastapi import FastAPI

    from server.service import Service


def create_page_app(
    service: Service,
    factory: Callable[[], Any],
    action_cls: Any,
    observation_cls: Any,
    name: str,
    **options: Any,
) -> FastAPI:
    """OpenEnv's application with its page."""
    app: FastAPI = create_web_interface_app(factory, action_cls, observation_cls, name, **options)
    return app
