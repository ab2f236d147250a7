"""Real engines: a gateway before them, a pilot that steers them, and episodes that they serve in real time.

The names below are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmserve_env.live.endpoint import EndpointBackend
    from llmserve_env.live.episode import LiveEpisode
    from llmserve_env.live.gateway.callers import Callers, load_tenants
    from llmserve_env.live.gateway.deployment import Deployment
    from llmserve_env.live.gateway.gateway import Gateway
    from llmserve_env.live.gateway.history import History
    from llmserve_env.live.gateway.proxy import Proxy
    from llmserve_env.live.pilot.decision_log import DecisionLog, read_decisions
    from llmserve_env.live.pilot.pilot import Pilot
    from llmserve_env.live.servers.engine_settings import EngineSettings, read_statuses, write_settings
    from llmserve_env.live.servers.telemetry import Telemetry
    from llmserve_env.live.servers.upstreams import Upstream, parse_upstream
    from llmserve_env.live.settings import EndpointSettings

__all__ = [
    "Callers",
    "DecisionLog",
    "Deployment",
    "EndpointBackend",
    "EndpointSettings",
    "EngineSettings",
    "Gateway",
    "History",
    "LiveEpisode",
    "Pilot",
    "Proxy",
    "Telemetry",
    "Upstream",
    "load_tenants",
    "parse_upstream",
    "read_decisions",
    "read_statuses",
    "write_settings",
]

_HOMES = {
    "Callers": "gateway.callers",
    "DecisionLog": "pilot.decision_log",
    "Deployment": "gateway.deployment",
    "EndpointBackend": "endpoint",
    "EndpointSettings": "settings",
    "EngineSettings": "servers.engine_settings",
    "Gateway": "gateway.gateway",
    "History": "gateway.history",
    "LiveEpisode": "episode",
    "Pilot": "pilot.pilot",
    "Proxy": "gateway.proxy",
    "Telemetry": "servers.telemetry",
    "Upstream": "servers.upstreams",
    "load_tenants": "gateway.callers",
    "parse_upstream": "servers.upstreams",
    "read_decisions": "pilot.decision_log",
    "read_statuses": "servers.engine_settings",
    "write_settings": "servers.engine_settings",
}


def __getattr__(name: str) -> object:
    """Import what is asked for: `vllm_scheduler` must do without the rest in vLLM's environment."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
