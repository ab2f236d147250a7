"""The gateway's HTTP side: an ASGI application that streams between clients and vLLM servers.

    POST /v1/completions, /v1/chat/completions, /v1/responses   by the gateway's rules, streamed or not
    GET  /v1/models, /v1/models/ID               of all upstreams that answer
    GET  /health                                 200 while an upstream is well, else 503; as last known
    GET  /metrics                                of all upstreams that answer, each with a label `upstream`
    GET  /gateway/metrics, /dashboard            of the gateway itself, see `dashboard`
    POST /v1/embeddings, /tokenize, ...          passed on as they are, see `relay.aside`

Bodies pass as they are, but for a request's `priority`. Errors have OpenAI's form, whoever makes them. What
clients send or get is never logged.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from llmserve_env.errors import InputError
from llmserve_env.live.gateway import about
from llmserve_env.live.gateway.admission.held_bodies import HeldBodies, HeldBody
from llmserve_env.live.gateway.admission.passage import Refused
from llmserve_env.live.gateway.callers import Callers
from llmserve_env.live.gateway.dashboard import PATHS, Dashboard
from llmserve_env.live.gateway.exchange import Exchange, Request, sent_on, sent_to
from llmserve_env.live.gateway.gateway import Gateway
from llmserve_env.live.gateway.history import History
from llmserve_env.live.gateway.relay.aside import ASIDE, Aside, AsideRequest, form_model
from llmserve_env.live.gateway.relay.probe import Probe
from llmserve_env.live.gateway.relay.reply import Headers, Message, Receive, Send, refuse, reply
from llmserve_env.live.gateway.several.models import NoModel
from llmserve_env.live.gateway.wire import RequestBody
from llmserve_env.live.servers.upstreams import Upstream
from llmserve_env.net.cutoff import Cutoff
from llmserve_env.net.loops import forever

LOG = logging.getLogger(__name__)

MAX_HELD_BYTES = 512 << 20
"""Most bytes of all bodies that are held, if nothing else is said."""
_COMPLETIONS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
_TICK_S = 0.1
_LAST_WORDS_S = 1.0


class Proxy:
    """Serves a gateway over HTTP.

    Args:
        gateway: the gateway that decides.
        tenants: tells callers apart; the same as the gateway's.
        history: what the dashboard shows; None for one without windows.
        max_body_bytes: most bytes of a request.
        max_held_bytes: most bytes of all requests that come in, wait, or have no answer yet. Beyond, tenants
            give way as in the queue, with 429.
        max_answer_bytes: most bytes of an answer that is not streamed.
        body_timeout_s: time that a client has to send a request (s).
        connect_timeout_s: time that an upstream has to take a connection (s).

    Raises:
        InputError: tenants that are not the gateway's.
    """

    def __init__(
        self,
        gateway: Gateway,
        tenants: Callers,
        *,
        history: History | None = None,
        max_body_bytes: int = 8 << 20,
        max_held_bytes: int = MAX_HELD_BYTES,
        max_answer_bytes: int = 64 << 20,
        body_timeout_s: float = 30.0,
        connect_timeout_s: float = 5.0,
    ) -> None:
        if tenants.all != gateway.tenants:
            raise InputError("expected the gateway's", field="tenants")
        self.gateway = gateway
        self.history = history or History(gateway)
        self._dashboard = Dashboard(self.history)
        self._exchange = Exchange(
            gateway, max_answer_bytes=max_answer_bytes, connect_timeout_s=connect_timeout_s
        )
        self._about = about.About(self._exchange)
        self._aside = Aside(self._exchange, gateway.idle_timeout_s)
        self._tenants = tenants
        self._turning_away = _TurningAway(self.history)
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s
        self._held = HeldBodies(
            [each.priority for each in tenants.all], lambda: gateway.action.priority_routing, max_held_bytes
        )

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        path, method = scope["path"], scope["method"]
        try:
            if path in _COMPLETIONS:
                _only(method, "POST")
                await self._complete(scope, receive, send)
            elif path in ASIDE:
                _only(method, ASIDE[path])
                await self._pass_on(scope, receive, send)
            elif about.is_about(path):
                _only(method, "GET")
                await reply(send, *await self._about.answer(path, self._headers_of(path, scope["headers"])))
            elif path in PATHS:
                _only(method, "GET")
                await reply(send, *await self._dashboard.answer(path, scope["query_string"]))
            else:
                raise Refused(
                    404, f"No such path here; there are {', '.join((*_COMPLETIONS, *ASIDE))}", "path"
                )
        except Refused as refused:
            await refuse(send, refused)
        except Exception as error:  # its message might quote what somebody sent
            LOG.error("unexpected %s at %s", type(error).__name__, path)
            await refuse(send, Refused(500, "The gateway failed", "unexpected"))

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        working: list[asyncio.Task[None]] = []
        probe = Probe(self._exchange, self.gateway.clock)
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self._exchange.open()
                working = [
                    asyncio.create_task(forever(self.gateway.tick, _TICK_S, "the gateway's tick")),
                    asyncio.create_task(self._about.models.keep()),
                ]
                probe.begin()
                await send({"type": "lifespan.startup.complete"})
            else:
                for each in working:
                    each.cancel()
                await probe.end()
                await self.close()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def close(self) -> None:
        """Close the connections to upstreams."""
        self._about.close()
        await self._exchange.close()

    # ------------------------------------------------------------------------------------------- completions

    async def _complete(self, scope: Message, receive: Receive, send: Send) -> None:
        """A completion, from its arrival to its end."""
        with self._turning_away:
            tenant, by_key = self._tenant(scope["headers"])
            held = HeldBody(tenant)
        try:
            with self._turning_away:
                content = await self._content(held, scope["headers"], receive)
                if content is None:
                    return
                body = self._read(scope["path"], content)
                headers = sent_on(scope["headers"], by_key)
                places = await self._places(body.model, held)
            del content  # the body has it, as long as it is needed
            passage = self.gateway.enter(tenant, body.prompt_tokens, sequences=body.sequences, places=places)
            held.give_way = partial(self.gateway.displace, passage)
            passage.on_answer = partial(self._answered, held, body)
            url = sent_to(scope["path"], scope["query_string"])
            serving = asyncio.create_task(self._exchange.serve(Request(passage, url, headers, body), send))
            hung_up = asyncio.create_task(_hung_up(receive))
            try:
                await _first_of(serving, hung_up)
                if hung_up.done():
                    passage.moving = passage.silent = False  # whatever it was taken from its upstream for
                serving.cancel()  # does nothing where it is done
                await serving
            except asyncio.CancelledError:
                if not serving.done():  # the server ends: the client is told
                    passage.displaced = Refused(503, "The gateway stops", "gateway stopped", 1.0)
                    serving.cancel()
                    await asyncio.wait({serving}, timeout=_LAST_WORDS_S)
                    self.gateway.fail(passage, "gateway stopped")
                    raise
            finally:
                # Only now that the upstream's connection is closed: its place is free.
                reason = "client went away" if hung_up.done() else "client does not read"
                self.gateway.fail(passage, reason, given_up=True)  # unless it is over
                hung_up.cancel()
        finally:
            self._held.release(held)
            held.give_way = _nothing  # body and passage know each other: garbage would have to be looked for

    async def _places(self, model: str | None, held: HeldBody) -> frozenset[Upstream] | None:
        """Upstreams that serve the model of a request, whose body is held meanwhile; None for all."""
        try:
            places = await self._about.models.places(model)
        except NoModel:
            raise about.no_model(str(model)) from None
        if held.lost:
            raise _displaced()
        return places

    # ------------------------------------------------------------------------------------------------- others

    async def _pass_on(self, scope: Message, receive: Receive, send: Send) -> None:
        """A request that takes no place in a batch, from its arrival to its end."""
        with self._turning_away:
            tenant, by_key = self._tenant(scope["headers"])
            held = HeldBody(tenant)
        try:
            with self._turning_away:
                content = await self._content(held, scope["headers"], receive)
                if content is None:
                    return
                headers = sent_on(scope["headers"], by_key)
                places = await self._places(_model_of(content), held)
            request = AsideRequest(
                scope["method"],
                sent_to(scope["path"], scope["query_string"]),
                headers,
                content,
                places,
                on_answer=partial(self._held.release, held),
            )
            serving = asyncio.create_task(self._aside.serve(request, send))
            held.give_way = serving.cancel
            hung_up = asyncio.create_task(_hung_up(receive))
            try:
                await asyncio.wait({serving, hung_up}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                serving.cancel()  # does nothing where it is done
                hung_up.cancel()
            try:
                await serving
            except asyncio.CancelledError:
                if held.lost and not hung_up.done():
                    raise _displaced() from None
        finally:
            self._held.release(held)

    def _headers_of(self, path: str, headers: Headers) -> Headers:
        """Headers for upstreams: their models are for those who may send requests, the rest is for all."""
        return sent_on(headers, self._tenant(headers)[1]) if about.for_callers(path) else []

    def _tenant(self, headers: Headers) -> tuple[int, bool]:
        """Who sends a request, and whether the gateway's key told."""
        tenant, by_key = self._tenants.of(headers)
        if tenant is None:
            raise Refused(401, "Incorrect API key provided", "unknown tenant")
        return tenant, by_key

    async def _content(self, held: HeldBody, headers: Headers, receive: Receive) -> bytes | None:
        """A request's body, counted as held; None of one whose client hung up."""
        stated = next((value for name, value in headers if name == b"content-length"), b"0")
        self._check_size(int(stated) if stated.isdigit() else 0)
        parts: list[bytes] = []
        more = True
        try:
            with Cutoff(self._body_timeout_s) as cutoff:
                held.give_way = cutoff.cut
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    parts.append(part)
                    self._check_size(held.size + len(part))
                    self._held.grow(held, len(part))
                    more = message.get("more_body", False)
        except asyncio.TimeoutError:
            if not held.lost:
                raise Refused(408, "The request's body did not come in time", "body timeout") from None
        if held.lost:
            raise _displaced()
        return b"".join(parts)

    def _check_size(self, size: int) -> None:
        if size > self._max_body_bytes:
            raise Refused(413, f"A request may have {self._max_body_bytes} bytes", "body too large")

    def _read(self, path: str, content: bytes) -> RequestBody:
        try:
            body = RequestBody(content)
        except InputError as error:
            field = None if error.field == "body" else error.field
            where = "body" if field is None else field
            raise Refused(400, f"Invalid {where}: {error.reason}", "invalid body", param=field) from None
        several = len(self.gateway.upstreams) > 1
        if path == "/v1/responses" and body.keeps is not None and (several or body.keeps == "background"):
            raise Refused(
                501,
                f"Invalid {body.keeps}: responses are not kept here for later requests",
                "not supported",
                param=body.keeps,
            )
        most = self.gateway.max_sequences
        if body.sequences > most:
            raise Refused(
                400,
                f"Invalid {body.multiplied_by}: n times the prompts of a request may be {most} at most",
                "too many sequences",
                param=body.multiplied_by,
            )
        return body

    def _answered(self, held: HeldBody, body: RequestBody) -> None:
        """A request's answer has begun: it will not be sent again."""
        self._held.release(held)
        body.forget()


def _nothing() -> None:
    pass


async def _first_of(*tasks: asyncio.Task[None]) -> None:
    """Wait for one of several tasks; as `asyncio.wait`, for less."""
    ended = asyncio.get_running_loop().create_future()

    def end(_: object) -> None:
        if not ended.done():
            ended.set_result(None)

    for task in tasks:
        task.add_done_callback(end)
    await ended


class _TurningAway:
    """Counts a request that is refused within it, before it is one of a tenant's."""

    def __init__(self, history: History) -> None:
        self._history = history

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Refused):
            self._history.turned_away[error.reason] += 1


def _only(method: str, expected: str) -> None:
    if method != expected:
        raise Refused(405, f"Expected {expected}", "method")


def _displaced() -> Refused:
    return Refused(429, "Others need its place here: try again later", "displaced", 1.0)


def _model_of(content: bytes) -> str | None:
    """The model that a body names, JSON or a form; None where it names none."""
    try:
        return RequestBody(content).model
    except InputError:
        return form_model(content)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
