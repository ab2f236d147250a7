"""Sends the requests of a live episode through a gateway, and follows them, in an event loop."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from llmserve_env.live.gateway.admission.passage import Passage, Refused
from llmserve_env.live.gateway.deployment import SCRAPE_S, STALE_S, Deployment
from llmserve_env.live.gateway.gateway import Gateway
from llmserve_env.live.servers.metrics import Scrape, read_metrics
from llmserve_env.live.servers.stream import RequestFailed, stream_completion
from llmserve_env.live.servers.telemetry import MAX_BYTES, Telemetry
from llmserve_env.live.traffic import Prompts
from llmserve_env.net.http import bearer, fetch, open_session
from llmserve_env.net.loops import forever

if TYPE_CHECKING:
    import aiohttp

    from llmserve_env.backend import WindowRecord
    from llmserve_env.live.servers.upstreams import Upstream
    from llmserve_env.live.settings import EndpointSettings
    from llmserve_env.schema import ServeAction
    from llmserve_env.workloads.workload import Workload

_PLAIN_AFTER = (400, 422)  # how servers refuse a parameter that they do not know
_EXTRAS = {"ignore_eos": True, "stream_options": {"include_usage": True}}
_TICK_S = 0.1
_PROBE_S = 2.0


class Sender:
    """Sends and follows requests; lives in the event loop's thread.

    What the gateway refuses is not sent again, whatever the task says of retries.

    Attributes:
        gateway: decides who goes where and when, and keeps account.
        deployment: the gateway and what is behind it; there from `begin` on.
        plain: whether the endpoint refused ignore_eos and usage: answers may end early then.
        takes_priority: whether it took `priority` so far.
        prompt_asked: prompt tokens of the answers that the endpoint gave usage for, as asked.
        prompt_counted: the same as the endpoint counted them.
    """

    deployment: Deployment

    def __init__(
        self, settings: EndpointSettings, workload: Workload, engines: int, seed: int, start: ServeAction
    ) -> None:
        self._settings = settings
        self._workload = workload
        self._prompts = Prompts(workload, seed, settings.token_ids)
        self._roots = dict(settings.servers())
        if len(self._roots) == 1:
            (only,) = self._roots
            only.engines = max(only.engines, engines)
        # Nobody is turned away but by the action; what takes too long is ended here.
        self.gateway = Gateway(
            list(self._roots),
            workload.tenants,
            start,
            max_waiting=sys.maxsize,
            queue_timeout_s=math.inf,
            idle_timeout_s=math.inf,
        )
        self.plain = False
        self.takes_priority = True
        self.prompt_asked = self.prompt_counted = 0
        self._session: aiohttp.ClientSession | None = None
        self._next = 0
        self._now_s = 0.0  # of the episode
        self._tasks: dict[Passage, asyncio.Task[None]] = {}
        self._given_up: dict[Passage, str] = {}
        self._ticking: asyncio.Task[None] | None = None
        self._serving: asyncio.Task[Any] | None = None

    async def begin(self) -> None:
        """Find out which servers show metrics, and begin to watch them; none is sent a request."""
        self._session = open_session(trust_env=True)  # the environment may name a proxy
        servers = list(self._roots)
        found = await asyncio.gather(*(self._probe(each) for each in servers))
        telling = [(each, scrape) for each, scrape in zip(servers, found, strict=True) if scrape is not False]
        telemetry = None
        if telling:
            telemetry = Telemetry(
                [each.url for each, _ in telling],
                api_key=self._settings.api_key,
                interval_s=SCRAPE_S,
                stale_after_s=STALE_S,
            )
            for replica, (_, scrape) in zip(telemetry.replicas, telling, strict=True):
                if isinstance(scrape, Scrape):
                    replica.took(scrape)
        self.deployment = Deployment(self.gateway, telemetry)
        await self.deployment.__aenter__()
        self._ticking = asyncio.create_task(forever(self.gateway.tick, _TICK_S, "the gateway's tick"))

    async def capabilities(self) -> dict[str, str]:
        """As `Deployment.capabilities`."""
        return self.deployment.capabilities()

    async def cannot_apply(self, action: ServeAction) -> dict[str, str]:
        """As `Deployment.cannot_apply`."""
        return self.deployment.cannot_apply(action)

    async def serve(self, action: ServeAction, window_s: float) -> WindowRecord:
        """One window."""
        self._serving = asyncio.current_task()
        begun_s = time.monotonic()
        self.gateway.open_window()
        self.deployment.apply(action)
        end_s = self._now_s + window_s
        arrivals = self._workload.arrival_s
        while self._next < len(arrivals) and arrivals[self._next] < end_s:
            due_s = begun_s + float(arrivals[self._next]) - self._now_s
            await asyncio.sleep(due_s - time.monotonic())
            self._arrive(self._next, due_s)
            self._next += 1
        await asyncio.sleep(begun_s + window_s - time.monotonic())
        self._serving = None
        start_s, self._now_s = self._now_s, end_s
        return self.deployment.close_window(start_s, end_s)

    async def close(self) -> None:
        """Cancel what is at the endpoint, send no more, and bring back the settings that were found."""
        # Only our own: those of the HTTP clients are for them to cancel.
        tasks = [*self._tasks.values(), *(each for each in (self._serving, self._ticking) if each)]
        for task in tasks:
            task.cancel()
        try:
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._session is not None:
                await self._session.close()
        finally:
            if hasattr(self, "deployment"):
                await self.deployment.__aexit__()
            await asyncio.get_running_loop().shutdown_asyncgens()

    def _arrive(self, index: int, due_s: float) -> None:
        tenant = int(self._workload.tenant[index])
        try:
            passage = self.gateway.enter(tenant, int(self._workload.prompt_tokens[index]), due_s)
        except Refused:
            return
        loop = asyncio.get_running_loop()
        self._tasks[passage] = loop.create_task(self._follow(passage, index))
        sender = self._workload.tenants[tenant]
        late_s = due_s - time.monotonic()
        for reason, limit_s in (("patience", sender.patience_s), ("deadline", sender.deadline_s)):
            if np.isfinite(limit_s):
                loop.call_later(late_s + limit_s, self._give_up, passage, reason)

    def _give_up(self, passage: Passage, reason: str) -> None:
        """Its client goes away: one without patience, if its first token has not come."""
        if passage in self._tasks and not (reason == "patience" and passage.steps):
            self._given_up[passage] = reason
            self._tasks[passage].cancel()

    async def _follow(self, passage: Passage, index: int) -> None:
        """A request from its arrival to its end."""
        import aiohttp

        try:
            usage = await self._exchange(passage, index)
        except asyncio.CancelledError:
            if passage not in self._given_up:
                raise
            self.gateway.fail(passage, self._given_up[passage], given_up=True)
        except (RequestFailed, Refused, asyncio.TimeoutError, aiohttp.ClientError, OSError) as error:
            self.gateway.fail(passage, _reason(error))
        except Exception as error:
            # Whatever nobody foresaw must not leave its request in flight for ever.
            self.gateway.fail(passage, f"unexpected {type(error).__name__}")
        else:
            self.gateway.complete(passage, usage.get("completion_tokens"))
            if "prompt_tokens" in usage:
                self.prompt_asked += int(self._workload.prompt_tokens[index])
                self.prompt_counted += usage["prompt_tokens"]
        finally:
            self._given_up.pop(passage, None)
            self._tasks.pop(passage, None)

    async def _exchange(self, passage: Passage, index: int) -> dict[str, int]:
        """Wait for its turn, and send it to one server after the other until one takes the connection."""
        import aiohttp

        while True:
            assert passage.turn is not None
            await passage.turn
            try:
                return await asyncio.wait_for(self._send(passage, index), self._settings.request_timeout_s)
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
                self.gateway.unreachable(passage)

    async def _send(self, passage: Passage, index: int) -> dict[str, int]:
        assert passage.upstream is not None
        assert self._session is not None
        session, on_step = self._session, partial(self.gateway.got, passage)
        url = f"{self._roots[passage.upstream]}/completions"
        headers = bearer(url, passage.upstream.key)

        def stream(body: dict[str, Any]) -> Awaitable[dict[str, int]]:
            return stream_completion(session, url, body, on_step, headers)

        body = {
            "model": self._settings.model,
            "prompt": self._prompts.of(index),
            "max_tokens": int(self._workload.output_tokens[index]),
            "temperature": 0.0,
            "stream": True,
        }
        priority = self.gateway.priority_of(passage)
        if priority and self.takes_priority:
            try:
                return await stream({**body, **self._extras, "priority": priority})
            except RequestFailed as refused:
                if refused.status not in _PLAIN_AFTER:
                    raise
            usage = await self._without_priority(stream, body)
            self.takes_priority = False  # without it the request is served: all others go without, too
            return usage
        return await self._without_priority(stream, body)

    async def _without_priority(
        self, stream: Callable[[dict[str, Any]], Awaitable[dict[str, int]]], body: dict[str, Any]
    ) -> dict[str, int]:
        if self.plain:
            return await stream(body)
        try:
            return await stream({**body, **_EXTRAS})
        except RequestFailed as refused:
            if refused.status not in _PLAIN_AFTER:
                raise
        usage = await stream(body)
        self.plain = True  # as with priority
        return usage

    @property
    def _extras(self) -> dict[str, Any]:
        return {} if self.plain else _EXTRAS

    async def _probe(self, upstream: Upstream) -> Scrape | bool:
        """Its metrics; False where it has none; True where it does not answer now."""
        import aiohttp

        assert self._session is not None
        at_s = time.monotonic()
        url = f"{upstream.url}/metrics"
        asking = fetch(self._session, url, bearer(url, upstream.key), max_bytes=MAX_BYTES)
        try:
            status, content = await asyncio.wait_for(asking, _PROBE_S)
            if status != 200:
                return False
            scrape = read_metrics(content.decode(errors="replace"), at_s)
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError):
            return True
        except Exception:  # whatever it says, it is not vLLM that says it
            return False
        return scrape if scrape.gauges else False


def _reason(error: Exception) -> str:
    if isinstance(error, RequestFailed):
        return error.reason
    return "timeout" if isinstance(error, asyncio.TimeoutError) else "connection"
