"""A service that an agent steers, over HTTP: what goes on while the agent errs, thinks or is cut off."""

from __future__ import annotations

import asyncio
import shutil
import threading
from contextlib import asynccontextmanager

import aiohttp
import numpy as np
import pytest

from llmserve_env.backend import WINDOW
from llmserve_env.live.gateway.callers import Callers, task_tenants
from llmserve_env.live.gateway.deployment import Deployment
from llmserve_env.live.gateway.gateway import Gateway
from llmserve_env.live.gateway.proxy import Proxy
from llmserve_env.live.gateway.steering import RunningReward, steer
from llmserve_env.live.pilot.change_limits import ChangeLimits
from llmserve_env.live.pilot.decision_log import DecisionLog, read_decisions
from llmserve_env.live.pilot.pilot import Pilot
from llmserve_env.live.servers.engine_settings import EngineSettings, read_settings, write_settings
from llmserve_env.live.servers.telemetry import Telemetry
from llmserve_env.live.servers.upstreams import Upstream
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import load_task

from ..agents import Scripted
from ..control_folder import FolderEngine
from ..endpoint_server import Running, ScriptedEndpoint, event, piece

WINDOW_S = 0.05
TASK = load_task("static_workload", controls={"batch_cap": [1, 8, 64, 512]}, window_s=WINDOW_S)
START, SAFE = ServeAction(batch_cap=64), ServeAction(batch_cap=100)
METRICS = {"/metrics": b"# TYPE vllm:kv_cache_usage_perc gauge\nvllm:kv_cache_usage_perc 0.25\n"}


class Service:
    """A gateway before a scripted endpoint, steered.

    Attributes:
        told: what was told of each window.
    """

    def __init__(self, endpoint, url, *answers, control=None, metrics=False, **options):
        self.endpoint = endpoint
        known = task_tenants(TASK.tenants) if TASK.tenants else Callers()
        upstream = Upstream(url, control=control)
        telemetry = Telemetry([url], interval_s=0.02, stale_after_s=0.3) if metrics else None
        self.gateway = Gateway([upstream], known.all, START)
        self.deployment = Deployment(self.gateway, telemetry)
        self.proxy = Proxy(self.gateway, known)
        self.agent = Scripted(list(answers))
        options = {"limits": ChangeLimits(), "decide_limit_s": 30.0, "shield": False, **options}
        self.pilot = Pilot(self.agent, TASK, START, safe=SAFE, endless=True, **options)
        self.told = asyncio.Queue()

    async def until(self, condition):
        """The first decision of which this is true."""

        async def found():
            while True:
                decision = (await self.told.get())[1]
                if condition(decision):
                    return decision

        return await asyncio.wait_for(found(), 60)

    async def complete(self):
        """Have a completion answered."""
        async with self.client.post("/v1/completions", json={"prompt": [1], "stream": True}) as response:
            assert response.status == 200
            assert b"DONE" in await response.read()


@asynccontextmanager
async def serving(*answers, others=None, **options):
    endpoint = ScriptedEndpoint(
        lambda asked: [event(piece("a", "length")), event("[DONE]")], others=dict(others or {})
    )
    async with Running(endpoint) as upstream:
        here = Service(endpoint, upstream.url, *answers, **options)
        async with Running(here.proxy, lifespan="on") as server, here.deployment:
            here.deployment.apply(START)
            told = lambda *what: here.told.put_nowait(what)  # noqa: E731
            steering = asyncio.create_task(steer(here.deployment, WINDOW_S, here.pilot, told))
            async with aiohttp.ClientSession(server.url) as here.client:
                try:
                    yield here
                finally:
                    steering.cancel()
                    await asyncio.gather(steering, return_exceptions=True)


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario, 90))


def test_the_agent_steers_and_what_was_found_returns(tmp_path):
    folder, log = tmp_path / "control", tmp_path / "log"
    folder.mkdir()
    FolderEngine(folder)
    write_settings(folder, EngineSettings(batch_cap=7))

    async def scenario():
        answers = [ServeAction(batch_cap=8), ServeAction(batch_cap=512)]
        async with serving(*answers, control=folder, log=DecisionLog(log)) as here:
            first = await here.until(lambda decision: True)
            assert (first.window, first.by, first.applied.batch_cap) == (0, "agent", 8)
            assert "speculation_depth" not in first.not_applied
            await here.complete()
            while not (await asyncio.wait_for(here.told.get(), 60))[0].completed:
                pass
            assert (await here.until(lambda decision: True)).applied.batch_cap == 512
            assert read_settings(folder).batch_cap == 512
        assert read_settings(folder).batch_cap == 7
        assert here.gateway.action == START
        here.pilot.close()

    run(scenario())
    (kept,) = read_decisions([log])
    assert [each.applied.batch_cap for each in kept.decisions][:2] == [8, 512]
    assert kept.windows["completed"].sum() == 1
    assert (kept.rewards > 0).sum() == 1
    assert kept.beginning.reward == "the task's"


def test_requests_do_not_wait_for_an_agent_that_thinks():
    async def scenario():
        thinks = threading.Event()
        async with serving(thinks, ServeAction(batch_cap=8)) as here:
            while not here.agent.seen:
                await asyncio.sleep(0)
            for _ in range(5):
                await here.complete()
            assert here.told.empty()  # it still thinks
            thinks.set()
            assert (await here.until(lambda decision: True)).applied.batch_cap == 1

    run(scenario())


def test_an_agent_that_errs_jumps_and_hangs_never_stops_the_service():
    async def scenario():
        hangs = threading.Event()
        answers = [RuntimeError("boom"), ServeAction(batch_cap=1), hangs]
        limits = ChangeLimits.model_validate({"batch_cap": {"most_factor": 2}})
        async with serving(*answers, limits=limits) as here:
            first = await here.until(lambda decision: True)
            assert (first.by, first.rule, first.applied) == ("fallback", "exception", SAFE)
            await here.complete()
            second = await here.until(lambda decision: True)
            here.pilot._limit_s = 0.05  # from the next decision on, in which it hangs
            assert (second.by, second.applied.batch_cap) == ("limit", 50)
            assert here.gateway.action.batch_cap == 50
            third = await here.until(lambda decision: decision.rule == "slow")
            assert here.gateway.action == third.applied == SAFE
            await here.complete()
            hangs.set()

    run(scenario())


def test_stale_metrics_lead_to_the_safe_configuration_until_they_are_back():
    async def scenario():
        async with serving(ServeAction(batch_cap=8), metrics=True) as here:
            lost = await here.until(lambda decision: decision.rule == "stale")
            assert "no metrics" in lost.reason
            assert here.gateway.action == SAFE
            await here.complete()
            here.endpoint.others = METRICS
            back = await here.until(lambda decision: decision.by == "agent")
            assert back.applied.batch_cap == 8
            here.endpoint.others = {}
            await here.until(lambda decision: decision.rule == "stale")

    run(scenario())


def test_decisions_that_cannot_be_written_down_are_not_taken():
    async def scenario():
        async with serving(ServeAction(batch_cap=8), log=DecisionLog("/dev/full")) as here:
            found = await here.until(lambda decision: True)
            assert (found.by, found.rule) == ("fallback", "exception")
            assert "No space left" in found.reason
            assert here.gateway.action == SAFE
            await here.complete()
            here.pilot.close()

    run(scenario())


def test_a_control_folder_that_is_gone_leaves_the_gateway_safe(tmp_path):
    folder = tmp_path / "control"
    folder.mkdir()

    async def scenario():
        async with serving(ServeAction(batch_cap=8), ServeAction(batch_cap=512), control=folder) as here:
            shutil.rmtree(folder)
            found = await here.until(lambda decision: decision.by == "fallback")
            assert found.rule == "exception"
            assert here.gateway.action == SAFE
            await here.complete()
            folder.mkdir()
            found = await here.until(lambda decision: decision.by == "agent")
            assert found.applied.batch_cap == 512

    run(scenario())


def test_a_window_that_cannot_be_recorded_is_not_the_last(monkeypatch):
    async def scenario():
        async with serving(ServeAction(batch_cap=8)) as here:
            await here.until(lambda decision: decision.by == "agent")
            failed = asyncio.Event()

            def fail():
                failed.set()
                raise RuntimeError("boom")

            with monkeypatch.context() as patched:
                patched.setattr(here.deployment, "window", fail)
                await asyncio.wait_for(failed.wait(), 60)
                assert here.gateway.action == SAFE
                await here.complete()
            while not here.told.empty():
                here.told.get_nowait()
            await here.until(lambda decision: decision.by == "agent")
            assert here.gateway.action.batch_cap == 8

    run(scenario())


def test_a_window_that_cannot_be_told_is_not_the_last():
    async def scenario():
        async with serving(ServeAction(batch_cap=8)) as here:
            tell, here.told.put_nowait = here.told.put_nowait, None
            while not here.agent.seen:
                await asyncio.sleep(0)
            await here.complete()
            here.told.put_nowait = tell
            await here.until(lambda decision: decision.by == "agent")

    run(scenario())


def test_rewards_of_a_service_without_an_end():
    task = load_task("static_workload", horizon_s=3.0, window_s=1.0)
    rewards, parts = RunningReward(task), task.reward
    window = np.zeros((), WINDOW)
    window["busy_s"] = task.cell.engines * task.window_s
    window["tenant_arrived"][0], window["tenant_in_slo"][0] = 4, 2
    # Half of what arrived met its SLO, without headroom; the KV cache was empty.
    first = rewards.of(window)
    assert first == pytest.approx((parts.goodput + parts.memory) / 2)
    assert rewards.of(window, {"kv_cache_occupancy"}) == pytest.approx(parts.goodput / 2)
    window["tenant_arrived"][0] = 0  # what arrived before is still to be answered
    assert rewards.of(window) == pytest.approx(first * 4 / (8 / 3))
    assert rewards.of(window) == pytest.approx(first * 4 / (4 / 3))  # the first one is forgotten
    idle = RunningReward(task)
    assert idle.of(np.zeros((), WINDOW)) == 0


def test_while_an_upstream_is_silent_the_safe_configuration_is_in_force():
    async def scenario():
        async with serving(ServeAction(batch_cap=8)) as here:
            await here.until(lambda decision: decision.by == "agent")
            (upstream,) = here.gateway.upstreams
            upstream.health.silent(here.gateway.clock())
            decision = await here.until(lambda decision: decision.by != "agent")
            assert (decision.by, decision.rule, decision.applied) == ("fallback", "stale", SAFE)
            assert decision.reason == f"{upstream.url}: requests run, and nothing moves"
            upstream.health.moved(here.gateway.clock())
            assert (await here.until(lambda decision: decision.by == "agent")).applied.batch_cap == 8

    run(scenario())
