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

from llmserve_env.live.gateway.admission.held_bodies import HeldBody
from llmserve_env.live.gateway.admission.passage import Passage
from llmserve_env.live.gateway.relay.answer import Answer

from .accounts import Counts, differences
from .answers import Asked, Response, Violation, judged
from .clients import CLIENTS, PATIENCE_S
from .connection import Connection
from .schedule import PHASE_S, Schedule, Visit
from .service import START, TENANTS, Service

RECOVERY_S = 10.0
"""Time that an upstream which is well again has until it serves (s)."""
PROBED = ("/health", "/v1/models", "/metrics", "/gateway/metrics", "/dashboard/data?after=-1")
OF_REQUESTS = (Passage, HeldBody, Answer)
"""What the gateway has for a request, and for no longer than that."""
BLOCKS_A_REQUEST = 100
"""Growth of memory for each request that is no leak: blocks of Python's allocator. Windows are kept for the
dashboard, and the upstreams here keep whom they met."""


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
        phases = self.schedule.phases
        async with Service(self.schedule.upstreams, steered=True) as self.service:
            probing = asyncio.create_task(self._probe())
            await self._phases(phases[: len(phases) // 2])
            await self._rest()
            before = self.requests, _blocks()
            await self._phases(phases[len(phases) // 2 :])
            await self._rest()
            self._check_memory(*before)
            await self._check_accounts()
            if probing.done():
                self._note(f"nobody asks for the gateway's pages any more: {probing!r}")
            probing.cancel()
        await asyncio.sleep(1.0)
        for task in asyncio.all_tasks() - tasks:
            self._note(f"a task is left: {task!r}")
        if _fds() > fds:
            self._note(f"{_fds() - fds} files or sockets are open that were not before")

    # ---------------------------------------------------------------------------------------- what happens

    async def _phases(self, phases) -> None:
        clients = []
        for phase in phases:
            for upstream, kind, side in zip(self.service.upstreams, phase.kinds, phase.sides, strict=True):
                await upstream.become(kind, side)
            self.service.deployment.apply(phase.action)
            began_s = asyncio.get_running_loop().time()
            for visit in phase.visits:
                await asyncio.sleep(began_s + visit.at_s - asyncio.get_running_loop().time())
                clients.append(asyncio.create_task(self._visit(visit)))
            await asyncio.sleep(began_s + PHASE_S - asyncio.get_running_loop().time())
        for each in self.service.upstreams:
            await each.become("good")
        self.service.deployment.apply(START)
        await asyncio.gather(*clients)

    async def _visit(self, visit: Visit) -> None:
        client = self.service.client(Asked(visit.tag), visit.tenant)
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
            await asyncio.sleep(1.5)

    async def get(self, path: str) -> Response:
        connection = await Connection.to(self.service.port)
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
        missing = {each.index for each in self.service.upstreams}
        while missing and loop.time() - began_s < RECOVERY_S:
            tag = f"rest-{began_s:.0f}-{number}"
            asked = Asked(tag, stream=bool(number % 2))
            client = self.service.client(asked)
            number += 1
            with contextlib.suppress(Violation):
                await CLIENTS["plain"](client)
            missing -= {each.index for each in self.service.upstreams if tag in each.met}
            await asyncio.sleep(0.1)
        for index in missing:
            self._note(f"upstream {index} got nothing within {RECOVERY_S:g} s of being well")
        await asyncio.sleep(10.0)
        gateway = self.service.gateway
        for what, count in (
            ("waiting", gateway.waiting),
            ("in flight", sum(each.in_flight for each in gateway.ledger.totals)),
            ("at upstreams", sum(each.running for each in gateway.upstreams)),
            ("held bytes", self.service.proxy._held.bytes),
        ):
            if count:
                self._note(f"at rest: {count} {what}")
        gc.collect()
        kept = Counter(
            type(each).__name__ for each in gc.get_objects() if issubclass(type(each), OF_REQUESTS)
        )
        if kept:
            self._note(f"at rest: {kept} are kept")
        history = self.service.history
        if self.service.steering.done() or history.decisions.total() != history.windows:
            self._note(f"{history.windows} windows, decisions {history.decisions}: {self.service.steering!r}")
        if history.last is None or history.last.by == "fallback":
            self._note(f"at rest: the agent is not trusted: {history.last}")
        for replica in self.service.deployment.telemetry.replicas:
            if replica.error is not None or replica.stale(loop.time()):
                self._note(f"at rest: no metrics of {replica.url}: {replica.error}")

    # ---------------------------------------------------------------------------------------- what holds

    def _note(self, text: str, tag: str | None = None) -> None:
        if tag is not None:
            met = {each.index: each.met[tag] for each in self.service.upstreams if tag in each.met}
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
        grown = (_blocks() - blocks) / (self.requests - requests)
        if grown > BLOCKS_A_REQUEST:
            self._note(f"memory grew by {grown:.0f} blocks a request")

    async def _check_accounts(self) -> None:
        service = self.service
        counts = Counts.read((await self.get("/gateway/metrics")).body.decode())
        for text in differences(counts, service.tallies, service.turned_away):
            self._note(text)


def _blocks() -> int:
    """Blocks of Python's allocator that are in use."""
    gc.collect()
    return sys.getallocatedblocks()


def _fds() -> int:
    return len(os.listdir("/proc/self/fd"))
