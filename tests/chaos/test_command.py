"""The command itself on a bad day, in real time and with its own event loop."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

from .accounts import Counts, differences
from .answers import Asked, Violation
from .clients import CLIENTS, MAX_BODY_BYTES, Client, Tally
from .connection import Connection
from .schedule import draw
from .service import TENANTS
from .upstream_server import UpstreamServer

PHASES = 6
LIMIT_S = 1.0
"""Time limits of the gateway for upstreams, and for what waits (s)."""
END_S = 120.0
"""Time in which all is over, however slow the machine is (s)."""
PEAK_MB = 150.0
"""Growth of its memory that is no leak, with bodies that have no end (MB)."""
SLOW = {"reads_nothing", "half_a_body", "half_a_head", "no_head"}
"""Clients who wait for time limits that have to be long in real time."""


def memory_mb(pid: int, name: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise AssertionError(name)


def test_the_command_stands_a_bad_day_and_ends_as_it_is_told(tmp_path):
    tenants = tmp_path / "tenants.toml"
    tenants.write_text(
        "".join(
            f'[[tenants]]\nname = "{each.name}"\nkey = "{each.key}"\npriority = {each.priority}\n'
            for each in TENANTS
        )
    )
    asyncio.run(asyncio.wait_for(_bad_day(tenants), END_S))


async def _bad_day(tenants: Path) -> None:
    async with AsyncExitStack() as stack:
        upstreams = [UpstreamServer(index) for index in range(3)]
        for each in upstreams:
            await each.become("good")
            stack.push_async_callback(each.close)
        gateway = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "llmserve_env", "gateway", "--port", "0", "--tenants", str(tenants)),
            *(part for each in upstreams for part in ("--upstream", each.url)),
            *("--batch-cap", "32", "--max-body-mb", str(MAX_BODY_BYTES / 1e6), "--window-s", "1"),
            *("--queue-timeout-s", str(LIMIT_S), "--first-byte-timeout-s", str(LIMIT_S)),
            *("--idle-timeout-s", str(LIMIT_S), "--drain-timeout-s", str(LIMIT_S)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        line = await gateway.stdout.readline()
        port = int(line.decode().rsplit(":", 1)[1])
        said = asyncio.create_task(gateway.communicate())
        try:
            before_mb = memory_mb(gateway.pid, "VmRSS")
            violations = await _phases(upstreams, port)
            grown_mb = memory_mb(gateway.pid, "VmHWM") - before_mb
        finally:
            gateway.send_signal(signal.SIGTERM)
            _, errors = await said
        assert not violations, "\n".join(violations)
        assert grown_mb < PEAK_MB
        assert gateway.returncode in (0, -signal.SIGTERM)
        assert "Traceback" not in errors.decode()


async def _phases(upstreams: list[UpstreamServer], port: int) -> list[str]:
    tallies, turned_away = {each.name: Tally() for each in TENANTS}, Counter()
    violations: list[str] = []

    async def visit(kind: str, tag: str, tenant: int) -> None:
        of = TENANTS[tenant]
        try:
            await CLIENTS[kind](Client(port, Asked(tag), of.key, tallies[of.name], turned_away))
        except Violation as violation:
            met = {each.index: each.met.get(violation.tag or tag) for each in upstreams}
            violations.append(f"{kind} {tag}: {violation}; met {met}")

    for phase in draw(2).phases[:PHASES]:
        for upstream, kind, side in zip(upstreams, phase.kinds, phase.sides, strict=True):
            await upstream.become(kind, side)
        visits = [each for each in phase.visits if each.kind not in SLOW]
        await asyncio.gather(*(visit(each.kind, each.tag, each.tenant) for each in visits))
    for each in upstreams:
        await each.become("good")
    for tally in tallies.values():  # whether a busy gateway has seen a client who left soon is not sure
        tally.left, tally.unsure = 0, tally.left + tally.unsure
    while not (counts := await _counts(port)).at_rest:
        pass  # those whose clients went away are over when the gateway has seen it
    return [*violations, *differences(counts, tallies, turned_away)]


async def _counts(port: int) -> Counts:
    connection = await Connection.to(port)
    await connection.send(b"GET /gateway/metrics HTTP/1.1\r\nhost: g\r\n\r\n")
    response = await connection.response()
    await connection.close()
    assert response is not None
    return Counts.read(response.body.decode())
