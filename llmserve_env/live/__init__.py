"""Episodes that real engines serve: the task's requests go to an OpenAI-compatible endpoint, in real time."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmserve_env.live.endpoint import EndpointBackend
    from llmserve_env.live.episode import LiveEpisode
    from llmserve_env.live.settings import EndpointSettings

__all__ = ["EndpointBackend", "EndpointSettings", "LiveEpisode"]

_HOMES = {"EndpointBackend": "endpoint", "EndpointSettings": "settings", "LiveEpisode": "episode"}


def __getattr__(name: str) -> object:
    """Import what is asked for: `vllm_scheduler` must do without the rest in vLLM's environment."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
