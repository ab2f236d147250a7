"""Episodes that real engines serve: the task's requests go to an OpenAI-compatible endpoint, in real time."""

from __future__ import annotations

from llmserve_env.live.endpoint import EndpointBackend
from llmserve_env.live.episode import LiveEpisode
from llmserve_env.live.settings import EndpointSettings

__all__ = ["EndpointBackend", "EndpointSettings", "LiveEpisode"]
