"""What a gateway tells of its upstreams: their models, their health, their metrics.

Each upstream is asked by itself, within bounds of bytes and time. What cannot be read of one is left out and
told in the log, once until it changes; the others are shown.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from llmserve_env.errors import InputError
from llmserve_env.live.gateway.admission.passage import Refused
from llmserve_env.live.gateway.exchange import LOST, Exchange
from llmserve_env.live.gateway.relay.reply import JSON, Headers
from llmserve_env.live.gateway.several.metrics import merge_metrics
from llmserve_env.live.gateway.several.models import Models, read_models
from llmserve_env.live.gateway.wire import as_error
from llmserve_env.live.servers.health import UP
from llmserve_env.live.servers.telemetry import MAX_BYTES
from llmserve_env.live.servers.upstreams import Upstream
from llmserve_env.net.loops import Failures

PATHS = ("/v1/models", "/health", "/metrics")
_MODEL = "/v1/models/"
_MODELS_BYTES = 4 << 20

Found = tuple[int, bytes] | InputError
"""Status and body of an upstream's answer, or why there is none."""


def is_about(path: str) -> bool:
    """Whether a path is one of this module's."""
    return path in PATHS or path.startswith(_MODEL)


def for_callers(path: str) -> bool:
    """Whether a path is for those alone who may send requests."""
    return path.startswith("/v1/")


class About:
    """Answers for the paths of this module.

    Args:
        exchange: asks the upstreams.

    Attributes:
        models: which upstream serves which model.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.gateway = exchange.gateway
        self.models = Models(exchange.gateway.upstreams, self._ask_for_models)
        self._exchange = exchange
        self._asking: asyncio.Task[tuple[int, Headers, bytes]] | None = None
        self._failures: dict[tuple[str, Upstream], Failures] = {}

    def close(self) -> None:
        """Ask the upstreams no more."""
        self.models.stop()
        if self._asking is not None:
            self._asking.cancel()

    async def answer(self, path: str, headers: Headers) -> tuple[int, Headers, bytes]:
        """Status, headers and body for a path.

        Args:
            path: path that was asked for.
            headers: headers for the upstreams.

        Raises:
            Refused: no upstream answers, or none with what can be read.
        """
        if path == "/health":
            return self._health()
        try:
            if path == "/metrics":
                # Anybody may ask, and what is asked for costs the upstreams something: once at a time.
                if self._asking is None or self._asking.done():
                    self._asking = asyncio.create_task(self._metrics())
                return await asyncio.shield(self._asking)
            if path == "/v1/models":
                return await self._all_models(headers)
            return await self._one_model(path.removeprefix(_MODEL), headers)
        except _Refusal as refusal:
            return refusal.answer

    async def _all_models(self, headers: Headers) -> tuple[int, Headers, bytes]:
        found = await self._ask_all("/v1/models", headers, _MODELS_BYTES)
        good = self._readable("/v1/models", found, read_models)
        if len(good) == 1:
            ((upstream, _),) = good.items()
            return 200, JSON, found[upstream][1]  # type: ignore[index]  # it is there, as it could be read
        models = {each["id"]: each for listed in reversed(good.values()) for each in listed}
        ordered = {each["id"]: models[each["id"]] for listed in good.values() for each in listed}
        return 200, JSON, json.dumps({"object": "list", "data": list(ordered.values())}).encode()

    async def _one_model(self, name: str, headers: Headers) -> tuple[int, Headers, bytes]:
        """Of the lists: vLLM does not show one model by itself."""
        found = await self._ask_all("/v1/models", headers, _MODELS_BYTES)
        for listed in self._readable("/v1/models", found, read_models).values():
            for each in listed:
                if each["id"] == name:
                    return 200, JSON, json.dumps(each).encode()
        raise no_model(name)

    def _health(self) -> tuple[int, Headers, bytes]:
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

    async def _metrics(self) -> tuple[int, Headers, bytes]:
        found = await self._ask_all("/metrics", [], MAX_BYTES)
        bodies = self._readable("/metrics", found, lambda body: body)
        by_url = {each.shown_url: each for each in bodies}
        texts = {url: bodies[each].decode(errors="replace") for url, each in by_url.items()}
        # Not in this loop, which has streams to pass on.
        text, unread = await asyncio.to_thread(merge_metrics, texts)
        for url, upstream in by_url.items():
            reason = unread.get(url)
            self._tell("/metrics", upstream, None if reason is None else InputError(reason))
        if len(texts) == len(unread) and not text.strip():
            raise Refused(502, "No upstream's metrics can be read", "unreadable", 1.0)
        return 200, [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")], text.encode()

    def _readable(
        self, path: str, found: dict[Upstream, Found], read: Callable[[bytes], Any]
    ) -> dict[Upstream, Any]:
        """What is read of the answers, without those that cannot be.

        Raises:
            Refused: there is none.
            _Refusal: none is good, and there is an upstream's own refusal.
        """
        good, refusals = {}, []
        for upstream, answer in found.items():
            if not isinstance(answer, InputError) and answer[0] != 200:
                refusals.append(answer)
                if answer[0] < 500:
                    continue  # it may be about what its caller sent, so it is no news
                answer = InputError(f"HTTP {answer[0]}", field=path)
            error = answer if isinstance(answer, InputError) else None
            if not isinstance(answer, InputError):
                try:
                    good[upstream] = read(answer[1])
                except InputError as unread:
                    error = unread
            if error is not None or path != "/metrics":  # of which more is to be seen
                self._tell(path, upstream, error)
        if good:
            return good
        if refusals:
            raise _Refusal(refusals[0][0], JSON, as_error(*refusals[0]))
        if all(isinstance(each, _Unreached) for each in found.values()):
            raise Refused(503, "No upstream can be reached", "upstream down", 1.0)
        raise Refused(502, f"No upstream's answer for {path} can be read", "unreadable", 1.0)

    def _tell(self, path: str, upstream: Upstream, error: Exception | None) -> None:
        name = f"{path} of {upstream.shown_url}"
        failures = self._failures.setdefault((path, upstream), Failures(name))
        if error is None:
            failures.end()
        else:
            failures.tell(error)

    async def _ask_for_models(self, upstream: Upstream) -> bytes:
        """An upstream's list, with the gateway's own key for it."""
        found = await self._ask(upstream, "/v1/models", [], _MODELS_BYTES)
        if isinstance(found, InputError):
            raise found
        status, body = found
        if status == 404:
            return b'{"data": []}'  # it has no such path, and serves what it serves
        if status != 200:
            raise InputError(f"expected HTTP 200, found {status}", field="/v1/models")
        return body

    async def _ask_all(self, path: str, headers: Headers, max_bytes: int) -> dict[Upstream, Found]:
        upstreams = self.gateway.upstreams
        found = await asyncio.gather(*(self._ask(each, path, headers, max_bytes) for each in upstreams))
        return dict(zip(upstreams, found, strict=True))

    async def _ask(self, upstream: Upstream, path: str, headers: Headers, max_bytes: int) -> Found:
        limit_s = self._exchange.connect_timeout_s
        try:
            return await asyncio.wait_for(self._exchange.get(upstream, path, headers, max_bytes), limit_s)
        except InputError as error:
            return InputError(error.reason, field=path)
        except asyncio.TimeoutError:
            return _Unreached(f"no answer within {limit_s:g} s", field=path)
        except LOST as error:
            return _Unreached(f"{type(error).__name__}: {error}", field=path)


class _Unreached(InputError):
    """An upstream does not answer."""


class _Refusal(Exception):
    """An upstream's own refusal is the answer."""

    def __init__(self, status: int, headers: Headers, body: bytes) -> None:
        super().__init__(status)
        self.answer = status, headers, body


def no_model(name: str) -> Refused:
    """A refusal in vLLM's words, of a model that nobody lists."""
    return Refused(404, f"The model `{name[:200]}` does not exist.", "unknown model", param="model")
