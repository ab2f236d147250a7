"""Every loop in the background of gateway, live episodes and service outlives a turn that raises."""

from __future__ import annotations

import ast
import asyncio
from collections.abc import Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from llmserve_env.commands import gateway as gateway_command
from llmserve_env.live.gateway import steering
from llmserve_env.live.gateway.callers import Callers
from llmserve_env.live.gateway.deployment import Deployment
from llmserve_env.live.gateway.gateway import Gateway
from llmserve_env.live.gateway.proxy import Proxy
from llmserve_env.live.gateway.relay.probe import Probe
from llmserve_env.live.gateway.several.models import Models
from llmserve_env.live.sender import Sender
from llmserve_env.live.servers import telemetry
from llmserve_env.live.servers.upstreams import Upstream
from llmserve_env.live.settings import EndpointSettings
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import load_task
from scripts.rooms import module_files
from server.guard import Guard
from server.service import Service
from server.settings import Settings

URL = "http://127.0.0.1:9"


class Turn:
    """A turn that raises a few times, and then does nothing.

    Attributes:
        works: set once it has not raised.
    """

    def __init__(self, error):
        self._left = 2
        self._error = error
        self.works = asyncio.Event()

    def __call__(self, *_: object, **__: object):
        self._left -= 1
        if self._left >= 0:
            raise self._error
        self.works.set()


@asynccontextmanager
async def sweeping(turn, monkeypatch):
    async def start(guard):
        """A process more, of which nothing is asked here."""

    monkeypatch.setattr(Guard, "start", start)
    service = Service(Settings(session_timeout_s=0.04))
    service.sessions.sweep = turn
    async with service.running():
        yield


@asynccontextmanager
async def scraping(turn, monkeypatch):
    async def scrape(*_):
        turn()
        raise telemetry.InputError("no server")

    monkeypatch.setattr(telemetry, "scrape", scrape)
    async with telemetry.Telemetry([URL], interval_s=0.01):
        yield


@asynccontextmanager
async def ticking_proxy(turn, monkeypatch):
    gateway = Gateway([Upstream(URL)])
    gateway.tick = turn
    came, told = asyncio.Queue(), asyncio.Queue()
    serving = asyncio.create_task(Proxy(gateway, Callers())({"type": "lifespan"}, came.get, told.put))
    came.put_nowait({"type": "lifespan.startup"})
    await told.get()
    yield
    came.put_nowait({"type": "lifespan.shutdown"})
    await serving


@asynccontextmanager
async def ticking_sender(turn, monkeypatch):
    task = load_task("static_workload")
    sender = Sender(EndpointSettings(URL, "none"), task.requests(1), 1, 0, ServeAction())
    sender.gateway.tick = turn
    await sender.begin()
    yield
    await sender.close()


@asynccontextmanager
async def steering_service(turn, monkeypatch):
    """As a whole: what falls back raises, too."""
    deployment = Deployment(Gateway([Upstream(URL)]))
    pilot = SimpleNamespace(task=load_task("static_workload"), fall_back=turn, result=turn)
    serving = asyncio.create_task(steering.steer(deployment, 0.01, pilot))
    yield
    assert not serving.done()
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


@asynccontextmanager
async def probing(turn, monkeypatch):
    gateway = Gateway([Upstream(URL)])
    probe = Probe(SimpleNamespace(gateway=gateway), gateway.clock, interval_s=0.01)
    probe.ask = turn
    probe.begin()
    yield
    await probe.end()


@asynccontextmanager
async def looking_at_models(turn, monkeypatch):
    models = Models([Upstream(URL), Upstream(URL)], None)
    models.refresh = turn
    serving = asyncio.create_task(models.keep(interval_s=0.01))
    yield
    assert not serving.done()
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


@asynccontextmanager
async def looking_for_drains(turn, monkeypatch):
    deployment, drains = Deployment(Gateway([Upstream(URL)])), SimpleNamespace(look=turn)
    serving = asyncio.create_task(
        gateway_command._windows(deployment, ServeAction(), 60.0, None, turn, drains=drains)
    )
    yield
    assert not serving.done()
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


LOOPS: dict[str, list[Callable]] = {
    "llmserve_env.commands.gateway": [looking_for_drains],
    "llmserve_env.live.gateway.proxy": [ticking_proxy],
    "llmserve_env.live.gateway.relay.probe": [probing],
    "llmserve_env.live.gateway.several.models": [looking_at_models],
    "llmserve_env.live.gateway.steering": [steering_service],
    "llmserve_env.live.sender": [ticking_sender],
    "llmserve_env.live.servers.telemetry": [scraping],
    "server.service": [sweeping],
}
"""Loops by the module that runs them."""


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RecursionError("deep")], ids=["os", "other"])
@pytest.mark.parametrize("loop", [each for loops in LOOPS.values() for each in loops])
def test_a_turn_that_raises_is_followed_by_the_next(loop, error, monkeypatch, caplog):
    async def scenario():
        turn = Turn(error)
        async with loop(turn, monkeypatch):
            await asyncio.wait_for(turn.works.wait(), 60)

    asyncio.run(scenario())
    told = [record for record in caplog.records if "failed" in record.getMessage()]
    assert len([record for record in told if str(error) in record.getMessage()]) == 1


def test_all_loops_are_tried():
    found = {}
    for name, path in module_files().items():
        content = path.read_bytes()
        tree = ast.parse(content) if b"forever(" in content else ast.Module([], [])
        calls = [each for each in ast.walk(tree) if isinstance(each, ast.Call)]
        count = sum(isinstance(each.func, ast.Name) and each.func.id == "forever" for each in calls)
        if count:
            found[name] = count
    assert found == {name: len(loops) for name, loops in LOOPS.items()}
