"""Queues, sends and follows the requests of a live episode, in an event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np

from llmserve_env.live.ledger import Ledger, LiveRequest
from llmserve_env.live.stream import RequestFailed, stream_completion
from llmserve_env.live.traffic import Prompts

if TYPE_CHECKING:
    import httpx
    from numpy.typing import NDArray

    from llmserve_env.live.settings import EndpointSettings
    from llmserve_env.schema import ServeAction
    from llmserve_env.workloads.workload import Workload

_PLAIN_AFTER = (400, 422)  # how servers refuse a parameter that they do not know
_EXTRAS = {"ignore_eos": True, "stream_options": {"include_usage": True}}


class Sender:
    """Queues, sends and follows requests; lives in the event loop's thread.

    Attributes:
        ledger: counts.
        plain: whether the endpoint refused ignore_eos and usage: answers may end early then.
        prompt_asked: prompt tokens of the answers that the endpoint gave usage for, as asked.
        prompt_counted: the same as the endpoint counted them.
    """

    def __init__(self, settings: EndpointSettings, workload: Workload, engines: int, seed: int) -> None:
        self._settings = settings
        self._workload = workload
        self._engines = engines
        self._prompts = Prompts(workload, seed, settings.token_ids)
        self.ledger = Ledger(workload.tenants, engines, settings.precision)
        self.plain = False
        self.prompt_asked = self.prompt_counted = 0
        self._client: httpx.AsyncClient | None = None
        self._next = 0
        self._now_s = 0.0  # of the episode
        self._cap = engines
        self._by_priority = False
        self._waiting: list[LiveRequest] = []
        self._tasks: dict[LiveRequest, asyncio.Task[None]] = {}
        self._serving: asyncio.Task[Any] | None = None

    async def serve(
        self, action: ServeAction, window_s: float
    ) -> tuple[NDArray[np.void], NDArray[np.int64], NDArray[np.int64]]:
        """One window: what `Ledger.close` gives."""
        loop = asyncio.get_running_loop()
        self._serving = asyncio.current_task()
        self._connected()  # takes a while the first time: not out of a request's time
        self._cap, self._by_priority = action.batch_cap * self._engines, action.priority_routing
        begun_s = loop.time()
        self.ledger.open(begun_s)
        self._dispatch()
        end_s = self._now_s + window_s
        arrivals = self._workload.arrival_s
        while self._next < len(arrivals) and arrivals[self._next] < end_s:
            due_s = begun_s + float(arrivals[self._next]) - self._now_s
            await asyncio.sleep(due_s - loop.time())
            self._arrive(self._next, due_s)
            self._next += 1
        await asyncio.sleep(begun_s + window_s - loop.time())
        self._serving = None
        start_s, self._now_s = self._now_s, end_s
        return self.ledger.close(loop.time(), start_s, end_s, [*self._waiting, *self._tasks])

    async def close(self) -> None:
        """Cancel what is at the endpoint, and send no more."""
        self._waiting.clear()
        # Only our own: those of the HTTP client are for it to cancel.
        tasks = [*self._tasks.values(), *([self._serving] if self._serving else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()
        await asyncio.get_running_loop().shutdown_asyncgens()

    def _arrive(self, index: int, due_s: float) -> None:
        tenant = int(self._workload.tenant[index])
        sender = self._workload.tenants[tenant]
        request = LiveRequest(index, tenant, sender.priority, due_s)
        self.ledger.arrived(request, int(self._workload.prompt_tokens[index]))
        self._waiting.append(request)
        if np.isfinite(sender.patience_s):
            loop = asyncio.get_running_loop()
            loop.call_at(due_s + sender.patience_s, self._lose_patience, request)
        self._dispatch()

    def _dispatch(self) -> None:
        """Send waiting requests while there is room at the endpoint."""
        while self._waiting and len(self._tasks) < self._cap:
            first = min(
                self._waiting, key=lambda each: (each.priority if self._by_priority else 0, each.arrival_s)
            )
            self._waiting.remove(first)
            loop = asyncio.get_running_loop()
            self.ledger.sent(first, loop.time())
            self._tasks[first] = loop.create_task(self._follow(first))

    def _lose_patience(self, request: LiveRequest) -> None:
        """Its client gives up, if its first token has not come."""
        if request.over or request.steps:
            return
        if request in self._tasks:
            self._tasks[request].cancel()
        elif request in self._waiting:
            self._waiting.remove(request)
        self._fail(request, "patience")

    def _fail(self, request: LiveRequest, reason: str) -> None:
        if not request.over:
            self.ledger.failed(request, asyncio.get_running_loop().time(), reason)
            self._tasks.pop(request, None)
            self._dispatch()

    def _complete(self, request: LiveRequest, usage: dict[str, int]) -> None:
        if request.over:
            return
        self.ledger.completed(request, asyncio.get_running_loop().time(), usage.get("completion_tokens"))
        if "prompt_tokens" in usage:
            self.prompt_asked += int(self._workload.prompt_tokens[request.index])
            self.prompt_counted += usage["prompt_tokens"]
        del self._tasks[request]
        self._dispatch()

    async def _follow(self, request: LiveRequest) -> None:
        """A request from its sending to its end."""
        import httpx

        try:
            usage = await asyncio.wait_for(self._send(request), self._settings.request_timeout_s)
        except (RequestFailed, asyncio.TimeoutError, httpx.HTTPError, OSError) as error:
            self._fail(request, _reason(error))
        except Exception as error:
            # Whatever nobody foresaw must not leave its request in flight for ever.
            self._fail(request, f"unexpected {type(error).__name__}")
        else:
            self._complete(request, usage)

    async def _send(self, request: LiveRequest) -> dict[str, int]:
        loop = asyncio.get_running_loop()
        body = {
            "model": self._settings.model,
            "prompt": self._prompts.of(request.index),
            "max_tokens": int(self._workload.output_tokens[request.index]),
            "temperature": 0.0,
            "stream": True,
        }

        def step() -> None:
            if not request.over:  # cancelled a moment ago
                self.ledger.step(request, loop.time())

        if self.plain:
            return await stream_completion(self._connected(), body, step)
        try:
            return await stream_completion(self._connected(), {**body, **_EXTRAS}, step)
        except RequestFailed as refused:
            if refused.status not in _PLAIN_AFTER:
                raise
        usage = await stream_completion(self._connected(), body, step)
        self.plain = True  # without the extras it is served: all others go without them, too
        return usage

    def _connected(self) -> httpx.AsyncClient:
        """The client, made in the loop that uses it."""
        import httpx

        if self._client is None:
            key = self._settings.api_key
            self._client = httpx.AsyncClient(
                base_url=self._settings.base_url.rstrip("/") + "/",
                headers={"Authorization": f"Bearer {key}"} if key else {},
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
                timeout=None,  # of the whole request: see _follow
            )
        return self._client


def _reason(error: Exception) -> str:
    if isinstance(error, RequestFailed):
        return error.reason
    return "timeout" if isinstance(error, asyncio.TimeoutError) else "connection"
