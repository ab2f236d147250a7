"""A gateway as the command sets it up, before made-up upstreams, with limits that are soon reached."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack

from llmserve_env.agents.find import find_agent
from llmserve_env.live.gateway.callers import Caller, Callers
from llmserve_env.live.gateway.deployment import SCRAPE_S, STALE_S, Deployment
from llmserve_env.live.gateway.gateway import Gateway
from llmserve_env.live.gateway.history import History
from llmserve_env.live.gateway.proxy import Proxy
from llmserve_env.live.gateway.steering import steer
from llmserve_env.live.gateway.wire import error_json
from llmserve_env.live.pilot.pilot import Pilot
from llmserve_env.live.servers.telemetry import Telemetry
from llmserve_env.live.servers.upstreams import Upstream
from llmserve_env.net.connections import ConnectionLimits
from llmserve_env.net.protocols import bounded
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import load_task
from tests.live.endpoint_server import Running

from .answers import Asked
from .clients import MAX_BODY_BYTES, Client, Tally
from .upstream_server import UpstreamServer

TENANTS = (
    Caller(name="free", key="k-free", priority=1),
    Caller(name="paid", key="k-paid", priority=0),
)
START = ServeAction(batch_cap=64)
_LIMITS = ConnectionLimits(header_timeout_s=5.0, body_timeout_s=15.0, write_timeout_s=30.0)
_WINDOW_S = 5.0
_TASK = load_task("static_workload", window_s=_WINDOW_S)
"""What the agent plays."""


class Service:
    """All of it in this event loop.

    Args:
        upstreams: upstreams, all of them good at first.
        steered: whether an agent sets the limits.

    Attributes:
        upstreams: UpstreamServer of each.
        tallies: what clients count, by tenant.
        turned_away: requests that the gateway counts as nobody's, by whether that is sure.
        steering: task that ends windows.
    """

    def __init__(self, upstreams: int, *, steered: bool = False) -> None:
        self._steered = steered
        self.upstreams = [UpstreamServer(index) for index in range(upstreams)]
        self.tallies = {each.name: Tally() for each in TENANTS}
        self.turned_away: Counter[bool] = Counter()

    async def __aenter__(self) -> Service:
        self._stack = AsyncExitStack()
        for each in self.upstreams:
            await each.become("good")
            self._stack.push_async_callback(each.close)
        clock, tenants = asyncio.get_running_loop().time, Callers(TENANTS)
        self.gateway = Gateway(
            [Upstream(each.url) for each in self.upstreams],
            tenants.all,
            START,
            max_waiting=40,
            queue_timeout_s=15.0,
            idle_timeout_s=20.0,
            clock=clock,
        )
        urls = [each.url for each in self.upstreams]
        telemetry = Telemetry(urls, interval_s=SCRAPE_S, stale_after_s=STALE_S)
        self.deployment = Deployment(self.gateway, telemetry, clock=clock)
        self.history = History(self.gateway, self.deployment, window_s=_WINDOW_S)
        self.proxy = Proxy(
            self.gateway,
            tenants,
            history=self.history,
            max_body_bytes=MAX_BODY_BYTES,
            max_answer_bytes=4 << 20,
            body_timeout_s=10.0,
            connect_timeout_s=2.0,
        )
        running = Running(self.proxy, lifespan="on", **bounded(_LIMITS, _error_body))
        self.port = (await self._stack.enter_async_context(running)).port
        await self._stack.enter_async_context(self.deployment)
        pilot = None
        if self._steered:
            agent = find_agent("reactive", _TASK)
            pilot = Pilot(agent, _TASK, START, safe=START, decide_limit_s=30.0, endless=True)
            self._stack.callback(pilot.close)
        self.steering = asyncio.create_task(steer(self.deployment, _WINDOW_S, pilot, self.history.add))
        self._stack.callback(self.steering.cancel)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def client(self, asked: Asked, tenant: int = 0) -> Client:
        """A client who speaks for a tenant."""
        speaks_for = TENANTS[tenant]
        tally = self.tallies[speaks_for.name]
        return Client(self.port, asked, speaks_for.key, tally, self.turned_away)


def _error_body(message: str, status: int) -> bytes:
    return error_json(message, "invalid_request_error", status)
