"""A gateway, its upstreams and its clients in one process, who play a schedule; and what must hold of it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from llmserve_env.live.gateway.callers import Caller, Callers
from llmserve_env.live.gateway.deployment import SCRAPE_S, STALE_S, Deployment
from llmserve_env.live.gateway.gateway import Gateway
from llmserve_env.live.gateway.history import History
from llmserve_env.live.gateway.proxy import Proxy
from llmserve_env.live.gateway.steering import steer
from llmserve_env.live.gateway.wire import error_json
from llmserve_env.live.servers.telemetry import Telemetry
from llmserve_env.live.servers.upstreams import Upstream
from llmserve_env.net.connections import ConnectionLimits
from llmserve_env.net.protocols import bounded
from llmserve_env.schema import ServeAction
from tests.live.endpoint_server import Running

from .answers import Asked, Response, Violation, judged
from .clients import CLIENTS, MAX_BODY_BYTES, PATIENCE_S, Client, Connection, Tally
from .schedule import PHASE_S, Schedule, Visit
from .upstream_server import UpstreamServer

TENANTS = (
    Caller(name="free", key="k-free", priority=1),
    Caller(name="paid", key="k-paid", priority=0),
)
LIMITS = ConnectionLimits(header_timeout_s=5.0, body_timeout_s=15.0, write_timeout_s=30.0)
WINDOW_S = 5.0
RECOVERY_S = 10.0
"""Time that an upstream which is well again has until it serves (s)."""
PROBED = ("/health", "/v1/models", "/metrics", "/gateway/metrics", "/dashboard/data?after=-1")
BLOCKS_A_REQUEST = 25
"""Growth of memory for each request that is no leak: blocks of Python's allocator. A request that is kept
has hundreds."""


@dataclass
class Counts:
    """What the gateway says that it has counted, by its metrics."""

    arrived: Counter[str] = field(default_factory=Counter)
    ended: dict[str, Counter[str]] = field(default_factory=dict)
    in_flight: float = 0
    waiting: float = 0
    at_upstreams: float = 0
    turned_away: float = 0

    @classmethod
    def read(cls, text: str) -> Counts:
        found = cls()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name, labels = sample.name.removeprefix("llmserve_gateway_"), sample.labels
                if name == "requests_arrived_total":
                    found.arrived[labels["tenant"]] += sample.value
                elif name == "requests_total" and labels["outcome"] == "turned_away":
                    found.turned_away += sample.value
                elif name == "requests_total":
                    of_tenant = found.ended.setdefault(labels["tenant"], Counter())
                    of_tenant[labels["outcome"]] += sample.value
                elif name == "requests_in_flight":
                    found.in_flight += sample.value
                elif name == "requests_waiting":
                    found.waiting += sample.value
                elif name == "requests_at_upstream":
                    found.at_upstreams += sample.value
        return found


@dataclass
class World:
    """What stands and plays.

    Attributes:
        violations: what was seen that should never be, each with what it takes to find it.
        requests: clients that came.
    """

    schedule: Schedule
    violations: list[str] = field(default_factory=list)
    requests: int = 0

    async def play(self) -> None:
        """The whole schedule, in two halves, with a rest after each."""
        fds = _fds()
        tasks = asyncio.all_tasks()
        self.upstreams = [UpstreamServer(index) for index in range(self.schedule.upstreams)]
        for each in self.upstreams:
            await each.become("good")
        self.tallies = [Tally() for _ in TENANTS]
        self.turned_away: Counter[bool] = Counter()
        await self._stand_up()
        phases = self.schedule.phases
        try:
            await self._phases(phases[: len(phases) // 2])
            await self._rest()
            before = self.requests, sys.getallocatedblocks()
            await self._phases(phases[len(phases) // 2 :])
            await self._rest()
            self._check_memory(*before)
            await self._check_accounts()
        finally:
            await self._take_down()
        await asyncio.sleep(1.0)
        for task in asyncio.all_tasks() - tasks:
            self._note(f"a task is left: {task!r}")
        if _fds() > fds:
            self._note(f"{_fds() - fds} files or sockets are open that were not before")

    # ---------------------------------------------------------------------------------------- what stands

    async def _stand_up(self) -> None:
        clock = asyncio.get_running_loop().time
        tenants = Callers(TENANTS)
        self.gateway = Gateway(
            [Upstream(each.url) for each in self.upstreams],
            tenants.all,
            ServeAction(batch_cap=64),
            max_waiting=40,
            queue_timeout_s=15.0,
            idle_timeout_s=20.0,
            clock=clock,
        )
        urls = [each.url for each in self.upstreams]
        telemetry = Telemetry(urls, interval_s=SCRAPE_S, stale_after_s=STALE_S)
        self.deployment = Deployment(self.gateway, telemetry, clock=clock)
        self.history = History(self.gateway, self.deployment, window_s=WINDOW_S)
        self.proxy = Proxy(
            self.gateway,
            tenants,
            history=self.history,
            max_body_bytes=MAX_BODY_BYTES,
            max_answer_bytes=4 << 20,
            body_timeout_s=10.0,
            connect_timeout_s=2.0,
        )
        self._stack = contextlib.AsyncExitStack()
        options = {"lifespan": "on", **bounded(LIMITS, _error_body)}
        self.running = await self._stack.enter_async_context(Running(self.proxy, **options))
        await self._stack.enter_async_context(self.deployment)
        self._steering = asyncio.create_task(steer(self.deployment, WINDOW_S, told=self._told))
        self._probing = asyncio.create_task(self._probe())

    def _told(self, record, decision, reward) -> None:
        self.history.add(record, decision, reward)

    async def _take_down(self) -> None:
        for task in (self._steering, self._probing):
            task.cancel()
        await asyncio.gather(self._steering, self._probing, return_exceptions=True)
        await self._stack.aclose()
        for each in self.upstreams:
            await each.close()

    # ---------------------------------------------------------------------------------------- what happens

    async def _phases(self, phases) -> None:
        clients = []
        for phase in phases:
            for upstream, kind, side in zip(self.upstreams, phase.kinds, phase.sides, strict=True):
                await upstream.become(kind, side)
            self.deployment.apply(phase.action)
            began_s = asyncio.get_running_loop().time()
            for visit in phase.visits:
                await asyncio.sleep(began_s + visit.at_s - asyncio.get_running_loop().time())
                clients.append(asyncio.create_task(self._visit(visit)))
            await asyncio.sleep(began_s + PHASE_S - asyncio.get_running_loop().time())
        for each in self.upstreams:
            await each.become("good")
        self.deployment.apply(ServeAction(batch_cap=64))
        await asyncio.gather(*clients)

    async def _visit(self, visit: Visit) -> None:
        tenant = visit.tenant
        key = TENANTS[tenant].key
        asked = Asked(visit.tag)
        client = Client(self.running.port, asked, key, self.tallies[tenant], self.turned_away)
        self.requests += 1
        try:
            await asyncio.wait_for(CLIENTS[visit.kind](client), PATIENCE_S)
        except Violation as error:
            self._note(f"{visit.kind} {visit.tag}: {error}", error.tag or visit.tag)
        except asyncio.TimeoutError:
            self._note(f"{visit.kind} {visit.tag}: no end after {PATIENCE_S:g} s", visit.tag)
        except Exception as error:
            self._note(f"{visit.kind} {visit.tag}: {error!r}", visit.tag)

    async def _probe(self) -> None:
        """The gateway's own pages answer all the time."""
        loop = asyncio.get_running_loop()
        for number in range(sys.maxsize):
            path = PROBED[number % len(PROBED)]
            began_s = loop.time()
            try:
                response = await asyncio.wait_for(self.get(path), PATIENCE_S)
            except (Violation, asyncio.TimeoutError) as error:
                self._note(f"GET {path}: {error!r}")
            else:
                self._check_page(path, response, loop.time() - began_s)
            await asyncio.sleep(0.7)

    async def get(self, path: str) -> Response:
        connection = await Connection.to(self.running.port)
        try:
            lines = (f"GET {path} HTTP/1.1", "host: g", f"authorization: Bearer {TENANTS[0].key}", "", "")
            await connection.send("\r\n".join(lines).encode())
            response = await connection.response()
            if response is None or not response.whole:
                raise Violation("no whole response")
            return response
        finally:
            await connection.close()

    async def _rest(self) -> None:
        """All upstreams are well: they serve again, and when all is quiet nothing is in flight."""
        loop = asyncio.get_running_loop()
        began_s, number = loop.time(), 0
        missing = {each.index for each in self.upstreams}
        while missing and loop.time() - began_s < RECOVERY_S:
            tag = f"rest-{began_s:.0f}-{number}"
            asked = Asked(tag, stream=bool(number % 2))
            client = Client(self.running.port, asked, TENANTS[0].key, self.tallies[0], self.turned_away)
            number += 1
            with contextlib.suppress(Violation):
                await CLIENTS["plain"](client)
            missing -= {each.index for each in self.upstreams if tag in each.met}
            await asyncio.sleep(0.1)
        for index in missing:
            self._note(f"upstream {index} got nothing within {RECOVERY_S:g} s of being well")
        await asyncio.sleep(10.0)
        gateway = self.gateway
        for what, count in (
            ("waiting", gateway.waiting),
            ("in flight", sum(each.in_flight for each in gateway.ledger.totals)),
            ("at upstreams", sum(each.running for each in gateway.upstreams)),
            ("held bytes", self.proxy._held.bytes),
        ):
            if count:
                self._note(f"at rest: {count} {what}")
        for task in (self._steering, self._probing):
            if task.done():
                self._note(f"a loop has ended: {task!r}")

    # ---------------------------------------------------------------------------------------- what holds

    def _note(self, text: str, tag: str | None = None) -> None:
        if tag is not None:
            met = {each.index: each.met[tag] for each in self.upstreams if tag in each.met}
            text += f"; {tag} met at upstreams {met}"
        self.violations.append(text)

    def _check_page(self, path: str, response: Response, took_s: float) -> None:
        if path == "/health" and took_s > 1.0:
            self._note(f"GET {path}: took {took_s:.1f} s")
        try:
            if response.status != 200 and path != "/health":
                judged(response)
            elif "metrics" not in path:
                json.loads(response.body)
        except (Violation, ValueError) as error:
            self._note(f"GET {path}: HTTP {response.status}: {error}")

    def _check_memory(self, requests: int, blocks: int) -> None:
        gc.collect()
        grown = (sys.getallocatedblocks() - blocks) / (self.requests - requests)
        if grown > BLOCKS_A_REQUEST:
            self._note(f"memory grew by {grown:.0f} blocks a request")

    async def _check_accounts(self) -> None:
        """The gateway's counts are its clients'."""
        counts = Counts.read((await self.get("/gateway/metrics")).body.decode())
        for name in ("in_flight", "waiting", "at_upstreams"):
            if getattr(counts, name):
                self._note(f"accounts: {name} {getattr(counts, name):g}")
        for tenant, tally in zip(TENANTS, self.tallies, strict=True):
            ended = counts.ended[tenant.name]
            if counts.arrived[tenant.name] != ended.total():
                self._note(f"accounts: {counts.arrived[tenant.name]:g} arrived, ended {ended}")
            stayed = tally.verdicts.total()
            surely, perhaps = stayed + tally.left, stayed + tally.left + tally.unsure
            if not surely <= ended.total() <= perhaps:
                self._note(f"accounts: {ended} of {tenant.name}, clients say {surely} to {perhaps}")
            answered = tally.verdicts["answer"]
            if not answered <= ended["completed"] <= answered + tally.left + tally.unsure:
                self._note(
                    f"accounts: {ended['completed']:g} completed of {tenant.name}, clients have {tally}"
                )
        if not self.turned_away[True] <= counts.turned_away <= self.turned_away.total():
            self._note(f"accounts: {counts.turned_away:g} turned away, clients say {self.turned_away}")


def _error_body(message: str, status: int) -> bytes:
    return error_json(message, "invalid_request_error", status)


def _fds() -> int:
    return len(os.listdir("/proc/self/fd"))
