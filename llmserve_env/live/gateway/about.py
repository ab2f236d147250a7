"""What a gateway tells of its upstreams: their models, their health, their metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json

from llmserve_env.live.gateway.admission.passage import Refused
from llmserve_env.live.gateway.exchange import LOST, Exchange
from llmserve_env.live.gateway.relay.reply import JSON, Headers
from llmserve_env.live.gateway.several.metrics import merge_metrics
from llmserve_env.live.gateway.wire import as_error
from llmserve_env.live.servers.health import UP
from llmserve_env.live.servers.upstreams import Upstream

PATHS = ("/v1/models", "/health", "/metrics")


class About:
    """Answers for the paths of this module.

    Args:
        exchange: asks the upstreams.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.gateway = exchange.gateway
        self._exchange = exchange

    async def answer(self, path: str, headers: Headers) -> tuple[int, Headers, bytes]:
        """Status, headers and body for one of `PATHS`.

        Args:
            path: path that was asked for.
            headers: headers for the upstreams.

        Raises:
            Refused: no upstream answers.
        """
        answers = {"/v1/models": self._models, "/health": self._health, "/metrics": self._metrics}
        return await answers[path](headers)

    async def _models(self, headers: Headers) -> tuple[int, Headers, bytes]:
        asked = await self._ask_all("/v1/models", headers)
        answers = [each for each in asked if each is not None]
        good = [body for status, body in answers if status == 200]
        if not good:
            if answers:
                return answers[0][0], JSON, as_error(*answers[0])
            raise Refused(503, "No upstream can be reached", "upstream down", 1.0)
        if len(good) == 1:
            return 200, JSON, good[0]
        models = {each["id"]: each for body in good for each in json.loads(body)["data"]}
        return 200, JSON, json.dumps({"object": "list", "data": list(models.values())}).encode()

    async def _health(self, headers: Headers) -> tuple[int, Headers, bytes]:
        """From the last known state: whatever upstreams do, it is told at once."""
        gateway = self.gateway
        upstreams = [
            {
                "url": each.shown_url,
                "well": (state := gateway.state(each)) in UP,
                "state": state.value,
                "cause": None if each.health.cause is None else each.health.cause.value,
                "running": each.running,
                "kv_usage": gateway.kv_usage(each),
            }
            for each in gateway.upstreams
        ]
        well = any(each["well"] for each in upstreams)
        body = {"well": well, "waiting": gateway.waiting, "upstreams": upstreams}
        return 200 if well else 503, JSON, json.dumps(body).encode()

    async def _metrics(self, headers: Headers) -> tuple[int, Headers, bytes]:
        answers = await self._ask_all("/metrics", [])
        texts = {
            each.shown_url: answer[1].decode()
            for each, answer in zip(self.gateway.upstreams, answers, strict=True)
            if answer is not None and answer[0] == 200
        }
        if not texts:
            raise Refused(503, "No upstream can be reached", "upstream down", 1.0)
        return (
            200,
            [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")],
            merge_metrics(texts)[0].encode(),
        )

    async def _ask_all(self, path: str, headers: Headers) -> list[tuple[int, bytes] | None]:
        """Status and body of each upstream's answer; None without one."""

        async def ask(upstream: Upstream) -> tuple[int, bytes] | None:
            try:
                async with await self._exchange.ask("GET", upstream, path, headers) as response:
                    return response.status, await response.read()
            except LOST:
                return None

        async def bounded(upstream: Upstream) -> tuple[int, bytes] | None:
            with contextlib.suppress(asyncio.TimeoutError):
                return await asyncio.wait_for(ask(upstream), self._exchange.connect_timeout_s)
            return None

        return await asyncio.gather(*map(bounded, self.gateway.upstreams))
