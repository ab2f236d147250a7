"""Upstreams are asked for their /health in the background, so that nobody has to wait to know it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import aiohttp

from llmserve_env.live.gateway.exchange import LOST
from llmserve_env.live.servers.fault import Cause
from llmserve_env.net.loops import forever

if TYPE_CHECKING:
    from llmserve_env.live.gateway.exchange import Exchange
    from llmserve_env.live.servers.upstreams import Upstream

LOG = logging.getLogger(__name__)

INTERVAL_S = 1.0
TIMEOUT_S = 2.0


class Probe:
    """Asks each upstream once a second, and tells its health. Bodies are not read.

    An upstream is well that answers with less than 500: servers other than vLLM may have no such path.

    Args:
        exchange: asks the upstreams.
        clock: the gateway's clock (s).
        interval_s: from one question to the next (s).
        timeout_s: time that an answer may take (s).
    """

    def __init__(
        self,
        exchange: Exchange,
        clock: Callable[[], float],
        *,
        interval_s: float = INTERVAL_S,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._exchange = exchange
        self._clock = clock
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._tasks: list[asyncio.Task[None]] = []
        self._asked: set[Upstream] = set()

    def begin(self) -> None:
        """Begin to ask, in the event loop that runs."""
        self._tasks = [
            asyncio.create_task(
                forever(partial(self.ask, each), self._interval_s, f"the probe of {each.shown_url}")
            )
            for each in self._exchange.gateway.upstreams
        ]

    async def end(self) -> None:
        """Ask no more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def ask(self, upstream: Upstream) -> None:
        """Ask one upstream once."""
        reason = cause = None
        health = upstream.health
        try:
            status = await asyncio.wait_for(self._status(upstream), self._timeout_s)
            if status >= 500:
                reason = f"HTTP {status}"
        except asyncio.TimeoutError:
            if self._clock() - health.came_s < self._timeout_s:
                return  # it is busy, and its answers go on
            reason = f"no answer within {self._timeout_s:g} s"
        except aiohttp.ClientConnectorError:
            reason, cause = "it takes no connection", Cause.UNREACHABLE
        except LOST as error:
            reason = type(error).__name__
        now_s = self._clock()
        if cause is not None and not health.out:
            health.failed(cause, now_s)
        health.answered(reason is None, now_s)
        if upstream not in self._asked:
            self._asked.add(upstream)
            if reason is not None:
                LOG.warning("%s is down at the start: /health: %s", upstream.shown_url, reason)

    async def _status(self, upstream: Upstream) -> int:
        async with await self._exchange.ask("GET", upstream, "/health", []) as response:
            if not response.content.at_eof():
                response.close()  # whatever it has to say, however long
            return response.status
