"""What a gateway shows of itself: a page for people, its data, and metrics for Prometheus.

    GET /dashboard                the page
    GET /dashboard/data?after=N   JSON: how it stands now, and windows and decisions after number N
    GET /gateway/metrics          Prometheus text, `llmserve_gateway_*`

The page asks no other host for anything.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from llmserve_env.live.gateway.exposition import GatewayMetrics, exposed
from llmserve_env.report.version import __version__

if TYPE_CHECKING:
    from llmserve_env.live.gateway.history import History

PATHS = ("/dashboard", "/dashboard/data", "/gateway/metrics")

_PAGE_HEADERS = [
    (b"content-type", b"text/html; charset=utf-8"),
    (
        b"content-security-policy",
        b"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
        b"img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"cache-control", b"no-cache"),
    (b"referrer-policy", b"no-referrer"),
]
_DATA_HEADERS = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
_TEXT_HEADERS = [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")]


class Dashboard:
    """Answers for the paths of this module.

    Args:
        history: history of the gateway.
    """

    def __init__(self, history: History) -> None:
        self.history = history
        self._metrics = GatewayMetrics(history)

    async def answer(self, path: str, query: bytes) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """Status, headers and body for one of `PATHS`. Long texts are written in a thread: streams go on."""
        if path == "/dashboard":
            return 200, _PAGE_HEADERS, _page()
        if path == "/dashboard/data":
            (after,) = parse_qs(query.decode("latin-1")).get("after", ["-1"])[-1:]
            number = int(after) if after.isdecimal() and len(after) < 16 else -1
            text = await asyncio.to_thread(json.dumps, self.data(number), allow_nan=False)
            return 200, _DATA_HEADERS, text.encode()
        return 200, _TEXT_HEADERS, await asyncio.to_thread(exposed, self._metrics.collected())

    def data(self, after: int) -> dict[str, object]:
        """What the page shows, as JSON has it: what is now, and windows and decisions after this number."""
        history = self.history
        gateway = history.gateway
        return {
            "run": history.run,
            "version": __version__,
            "began_s": history.began_s,
            "now_s": time.time(),
            "window_s": history.window_s,
            "agent": history.agent,
            "task": history.task,
            "dry_run": history.dry_run,
            "stale": history.stale,
            "waiting": gateway.waiting,
            "action": history.action.model_dump(mode="json"),
            "not_applied": history.not_applied,
            "capabilities": history.capabilities,
            "decisions": dict(history.decisions),
            "tenants": [
                {
                    "name": tenant.name,
                    "ttft_slo_s": tenant.ttft_slo_s,
                    "tpot_slo_s": tenant.tpot_slo_s,
                    "priority": tenant.priority,
                    "weight": tenant.weight,
                    "arrived": totals.arrived,
                    "in_flight": totals.in_flight,
                    "in_slo": totals.in_slo,
                    "outcomes": dict(totals.outcomes),
                }
                for tenant, totals in zip(gateway.tenants, gateway.ledger.totals, strict=True)
            ],
            "turned_away": history.turned_away.total(),
            "upstreams": [asdict(each) for each in history.upstreams()],
            "entries": history.since(after),
        }


@cache
def _page() -> bytes:
    return (Path(__file__).parents[1] / "data" / "dashboard.html").read_bytes()
