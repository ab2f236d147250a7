"""What the service allows, in one place."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from llmserve_env.live.settings import EndpointSettings
from llmserve_env.net.connections import ConnectionLimits
from llmserve_env.net.sockets import is_local


def _mode() -> Literal["simulated", "real"]:
    found = os.environ.get("LLMSERVE_MODE", "simulated")
    if found not in ("simulated", "real"):
        raise SystemExit(f"LLMSERVE_MODE: expected simulated or real, found {found!r}")
    return "real" if found == "real" else "simulated"


def _endpoint() -> EndpointSettings:
    url = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
    return EndpointSettings(base_url=url, model=os.environ.get("OPENAI_MODEL", "default"))


@dataclass(frozen=True)
class Settings:
    """Bounds of the service. What goes past them is refused with the bound in the message."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[tuple[int, ...], tyro.conf.UseAppendAction] = ()
    """Port to listen on, 8000 unless given; give it again for more."""
    allowed_host: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Name that clients may ask the service by, *.NAME for all below one; give it again for more (default:
    any, and none where only this machine can connect). Addresses and names without a dot are always good."""
    root_path: str = ""
    """Path below which a proxy has the service, as /llmserve (default: what a request's X-Forwarded-Prefix
    says). Requests may have it or not."""
    api_key: str | None = field(default=None, repr=False)
    """Key for what costs the owner: /baseline?mode=openai, and in mode real all that plays (default:
    LLMSERVE_API_KEY; without one the first is off, and the second only for who is on this machine)."""
    web: bool = True
    """Whether the page at /web is served."""
    mode: Literal["simulated", "real"] = field(default_factory=_mode)
    """Server of the requests: the simulator, or an OpenAI-compatible endpoint (LLMSERVE_MODE)."""
    endpoint: EndpointSettings = field(default_factory=_endpoint)
    """The endpoint in mode real (OPENAI_BASE_URL, OPENAI_MODEL; its key is OPENAI_API_KEY unless given)."""
    journal: Path | None = None
    """Folder in which open sessions are recorded, and from which a restart restores them."""
    max_sessions: int = 1024
    """Sessions open at once."""
    max_live_sessions: int = 16
    """Sessions open at once in mode real, where each has a thread."""
    session_timeout_s: float = 3600.0
    """Time after which an unused session is closed (s). Set it far above the slowest policy."""
    reclaim_after_s: float = 300.0
    """Time after which an idle session gives its place to a new one, at capacity and if no WebSocket
    holds it (s).
    """
    max_body_bytes: int = 4 * 1024 * 1024
    """Largest body of a request, and largest WebSocket message (bytes)."""
    max_actions: int = 1000
    """Actions in one step_n."""
    max_windows: int = 10_000
    """Windows of an episode that a client shaped, or whose log it posted."""
    max_requests: int = 100_000
    """Requests of an episode that a client shaped, or whose log it posted."""
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)
    """Bounds of connections, before anything else sees what they send."""
    guard_timeout_s: float = 20.0
    """Time in which what a client sent must be looked through (s)."""
    guard_memory_gb: float = 1.0
    """Memory that looking through it may take (GB)."""
    guard_queue: int = 32
    """Clients that may wait for that at once."""

    @property
    def key(self) -> str | None:
        """The service's key, if it has one."""
        return self.api_key or os.environ.get("LLMSERVE_API_KEY") or None

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        return is_local(self.host)

    @property
    def ports(self) -> tuple[int, ...]:
        """Ports to listen on."""
        return self.port or (8000,)
