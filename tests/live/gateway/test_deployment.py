"""Servers are steered and watched as one: what is applied where, what is told by whom, what is named."""

from __future__ import annotations

import asyncio
import time

import pytest

from llmserve_env.errors import InputError
from llmserve_env.live.gateway.deployment import ANSWER_S, Deployment
from llmserve_env.live.gateway.gateway import Gateway
from llmserve_env.live.gateway.ledger import UNMEASURED
from llmserve_env.live.servers.engine_settings import (
    AppliedSettings,
    EngineSettings,
    read_settings,
    write_settings,
)
from llmserve_env.live.servers.metrics import read_metrics
from llmserve_env.live.servers.telemetry import Telemetry
from llmserve_env.live.servers.upstreams import Upstream, parse_upstream
from llmserve_env.schema import QuantizationTier, ServeAction

from ..control_folder import FolderEngine
from ..endpoint_server import Reply, serving
from ..vllm_server import RecordedServer, metrics

URL, OTHER = "http://127.0.0.1:8101", "http://127.0.0.1:8102"
WITHIN = ServeAction(batch_cap=8, kv_budget_fraction=0.5, speculation_depth=2)


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


def deployment(*upstreams, action=None, told=None, **given):
    """Of these upstreams; `told` has, by upstream, the texts of its metrics, a second apart until now."""
    gateway = Gateway(upstreams or [Upstream(URL)], action=action or ServeAction())
    telemetry = None
    if told is not None:
        telemetry = Telemetry([each.url for each in gateway.upstreams])
        for replica, texts in zip(telemetry.replicas, told, strict=True):
            scrape(replica, *texts)
    return Deployment(gateway, telemetry, **given)


def scrape(replica, *texts):
    now_s = time.monotonic()
    for index, text in enumerate(texts):
        replica.took(read_metrics(text, now_s - len(texts) + 1 + index))


BUSY = (metrics("0.32-busy-1"), metrics("0.32-busy-2"))


# Steering


def test_engines_apply_what_they_can_and_the_gateway_does_not_do_it_again(tmp_path):
    engine = FolderEngine(tmp_path)
    here = deployment(Upstream(URL, control=tmp_path))
    assert set(here.apply(WITHIN)) == {"quantization_tier", "prefill_decode_split"}
    assert engine.look() == AppliedSettings(batch_cap=8, kv_budget_fraction=0.5, speculation_depth=2)
    # With a full cache the gateway would hold requests back: the engine does it.
    here.gateway.kv_usage = lambda upstream: 0.9
    assert here.gateway._free() is here.gateway.upstreams[0]
    ways = here.capabilities()
    assert ways["batch_cap"] == "engine: up to 64; the gateway keeps to it, too"
    assert ways["kv_budget_fraction"].startswith("engine:")
    assert ways["speculation_depth"] == "engine: 0 to 4"


def test_without_a_folder_the_gateway_applies_what_it_can(tmp_path):
    here = deployment(Upstream(URL, QuantizationTier.INT8, speculation=2), told=[BUSY])
    assert set(here.apply(WITHIN)) == {"quantization_tier", "prefill_decode_split"}
    assert here.gateway._free() is None  # its KV cache is fuller than half
    ways = dict.fromkeys(ServeAction.model_fields, "not applied") | {
        "batch_cap": "gateway",
        "kv_budget_fraction": "gateway",
        "speculation_depth": "routing",
        "quantization_tier": "routing",
        "priority_routing": "gateway",
        "admission_rate": "gateway",
    }
    assert {name: way.split(":")[0] for name, way in here.capabilities().items()} == ways
    assert list(here.capabilities()) == list(ServeAction.model_fields)


def test_what_an_engine_cannot_take_is_told(tmp_path):
    FolderEngine(tmp_path)
    here = deployment(Upstream(URL, control=tmp_path))
    told = here.apply(ServeAction(batch_cap=128, speculation_depth=8))
    assert told["batch_cap"] == f"{URL}: the engine was started with 64"
    assert told["speculation_depth"] == f"{URL}: the engine was started with 4"
    assert here.window().not_applied == told


def test_a_fixed_depth_is_left_to_routing(tmp_path):
    FolderEngine(tmp_path, fixed_depth=True)
    other = Upstream(OTHER, speculation=2)
    here = deployment(Upstream(URL, control=tmp_path), other)
    told = here.apply(ServeAction(speculation_depth=2, kv_budget_fraction=0.5, batch_cap=8))
    assert "speculation_depth" not in told  # the other server was started with it
    assert here.gateway._pool == (other,)
    assert "speculation_depth" not in here.apply(ServeAction(batch_cap=8, speculation_depth=4))
    assert here.gateway._pool == (here.gateway.upstreams[0],)  # as it said
    assert "no upstream is stated" in here.apply(ServeAction(speculation_depth=3))["speculation_depth"]


def test_an_engine_that_does_not_answer_leaves_it_to_the_gateway(tmp_path):
    clock = Clock()
    here = deployment(Upstream(URL, control=tmp_path), told=[BUSY], clock=clock)
    assert "LiveScheduler" in here.capabilities()["batch_cap"]
    assert "speculation_depth" in here.apply(WITHIN)
    assert here.gateway._free() is None

    engine = FolderEngine(tmp_path)  # it has come
    assert here.window().not_applied.keys() >= {"speculation_depth"}
    assert here.gateway._free() is not None
    assert "speculation_depth" not in here.window().not_applied

    here.apply(WITHIN.model_copy(update={"speculation_depth": 3}))
    assert "speculation_depth" not in here.window().not_applied  # it has a second
    clock.now_s += ANSWER_S + 0.1
    here.window()
    assert "speculation_depth" in here.window().not_applied  # and is gone
    engine.look()
    here.window()
    assert "speculation_depth" not in here.window().not_applied


def test_settings_that_an_engine_refuses_are_told(tmp_path):
    engine = FolderEngine(tmp_path)
    here = deployment(Upstream(URL, control=tmp_path))
    here.apply(WITHIN)
    (tmp_path / "settings.json").write_text("{")  # somebody else's
    engine.look()
    assert "refused its settings" in here.capabilities()["batch_cap"]
    here.window()
    assert "speculation_depth" in here.not_applied


@pytest.mark.parametrize("found", [None, EngineSettings(batch_cap=3)])
def test_settings_return_to_what_was_found(tmp_path, found):
    if found is not None:
        write_settings(tmp_path, found)
    FolderEngine(tmp_path)
    start = ServeAction(batch_cap=17, admission_rate=5)

    async def run():
        here = deployment(Upstream(URL, control=tmp_path), action=start)
        async with here:
            here.apply(WITHIN)
            assert read_settings(tmp_path) == EngineSettings.of(WITHIN)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        asyncio.run(run())
    assert (tmp_path / "settings.json").exists() == (found is not None)
    assert read_settings(tmp_path) == (found or EngineSettings())

    here = deployment(Upstream(URL, control=tmp_path), action=start)
    here.apply(WITHIN)
    here.restore()
    here.restore()
    assert here.action == start
    here.apply(WITHIN)  # and it can be steered again
    assert read_settings(tmp_path) == EngineSettings.of(WITHIN)


def test_nothing_is_written_where_nothing_was_applied(tmp_path):
    here = deployment(Upstream(URL, control=tmp_path))
    here.restore()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected an existing folder"):
        deployment(Upstream(URL, control=tmp_path / "none"))


# Watching


def test_engine_figures_join_those_of_clients():
    here = deployment(told=[BUSY])
    record = here.window()
    assert record.preemptions == 14
    assert (record.prefill_tokens, record.cached_tokens) == (10506 - 5273, 0)
    assert (record.drafted_tokens, record.accepted_tokens) == (4446 - 2169, 3516 - 1715)
    assert record.kv_occupancy == pytest.approx(0.9308, abs=1e-4)
    assert record.mean_kv_occupancy == pytest.approx((0.9119 + 0.9308) / 2, abs=1e-4)
    assert here.unmeasured.keys() == UNMEASURED.keys() - {
        "kv_cache_occupancy",
        "preemptions",
        "spec_acceptance_rate",
        "prefix_hit_rate",
    }
    assert here.row["preemptions"] == 14
    assert here.stale is None
    # Without a scrape since, gauges alone are known.
    record = here.window()
    assert (record.preemptions, record.kv_occupancy) == (0, pytest.approx(0.9308, abs=1e-4))
    assert "preemptions" in here.unmeasured


def test_cached_tokens_are_not_prefilled():
    lines = [line for line in BUSY[1].splitlines() if line.startswith("vllm:prefix_cache_hits_total{")]
    cached = [BUSY[0], BUSY[1].replace(lines[0], lines[0].replace(" 0.0", " 1000.0"))]
    record = deployment(told=[cached]).window()
    assert (record.prefill_tokens, record.cached_tokens) == (10506 - 5273 - 1000, 1000)


def test_figures_of_a_part_of_the_servers_are_none():
    here = deployment(Upstream(URL), Upstream(OTHER), told=[BUSY, ()])
    record = here.window()
    assert (record.preemptions, record.mean_kv_occupancy, record.drafted_tokens) == (0, 0, 0)
    assert record.kv_occupancy == 0
    assert here.unmeasured == UNMEASURED
    assert here.stale == f"{OTHER}: no metrics yet"
    scrape(here.telemetry.replicas[1], *BUSY)
    scrape(here.telemetry.replicas[0], BUSY[1])
    assert here.stale is None
    here.window()
    scrape(here.telemetry.replicas[0], BUSY[1])
    here.telemetry.replicas[1].stale_after_s = -1.0  # as if it had been silent
    assert here.window().preemptions == 0
    assert here.unmeasured == UNMEASURED
    assert here.stale.startswith(f"{OTHER}: no metrics for ")


def test_an_engine_whose_counters_stand_still_while_it_runs_something_is_silent():
    here = deployment(Upstream(URL), Upstream(OTHER), told=[[BUSY[1]] * 12, [BUSY[1]] * 11 + [BUSY[0]]])
    assert here.stale is None
    here.gateway.tick()
    assert [here.gateway.state(each).value for each in here.gateway.upstreams] == ["ejected", "well"]
    assert here.stale == f"{URL}: requests run, and nothing moves"
    assert here.window().engines_up == 1
    scrape(here.telemetry.replicas[0], BUSY[0])  # it goes on
    here.gateway.tick()
    assert here.stale is None
    assert here.window().engines_up == 2


def test_an_engine_that_ran_nothing_when_it_froze_is_back_when_its_counters_move():
    here = deployment(told=[[metrics("0.32-idle")] * 12])
    (upstream,) = here.gateway.upstreams
    upstream.health.silent(here.gateway.clock())
    here.gateway.tick()
    assert here.stale is not None  # its counters stand still, which of an idle engine says nothing
    scrape(here.telemetry.replicas[0], BUSY[1])
    here.gateway.tick()
    assert here.stale is None


def test_an_idle_engine_is_not_silent_however_long_nothing_changes():
    here = deployment(told=[[metrics("0.32-idle")] * 60])
    here.gateway.tick()
    assert here.stale is None


def test_without_telemetry_nothing_is_stale_and_nothing_made_up():
    here = deployment()
    record = here.window()
    assert here.stale is None
    assert here.unmeasured == UNMEASURED
    assert (record.kv_occupancy, record.preemptions) == (0, 0)
    assert "does not tell" in here.capabilities()["kv_budget_fraction"]


def test_it_watches_while_it_is_open():
    server = RecordedServer()

    async def run(url):
        gateway = Gateway([Upstream(url)])
        here = Deployment(gateway, Telemetry([url], interval_s=0.01, stale_after_s=30))
        async with here:
            while here.stale:
                await asyncio.sleep(0)
            server.answers["/metrics"] = Reply(metrics("0.32-busy-2"))
            while not here.window().preemptions:
                await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}  # nobody is left to ask

    with serving(server) as url:
        asyncio.run(run(url))


# Several engines


def test_the_cap_is_of_each_engine():
    async def run():
        one, three = Upstream(URL), Upstream(OTHER, engines=3)
        gateway = Gateway([one, three], action=ServeAction(batch_cap=2))
        for _ in range(9):
            gateway.enter(0, 10)
        assert (one.running, three.running, gateway.waiting) == (2, 6, 1)
        record = gateway.window()
        assert (record.running, record.waiting, record.engines_up) == (8, 1, 4)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://h:1,engines=0", "engines=1"),
        ("http://h:1,engines=", "URL"),
        ("http://h:1,control=", "URL"),
        ("http://h:1,pool=3", "URL"),
        ("ftp://h:1", "http://HOST"),
        ("http://h:99999", "http://HOST"),
    ],
)
def test_an_upstream_that_cannot_be_is_refused(text, expected):
    with pytest.raises(InputError, match=f"expected {expected}"):
        parse_upstream(text)


def test_an_upstream_is_read(tmp_path):
    found = parse_upstream(f"http://h:1/v1,tier=INT8,speculation=3,engines=2,key=k,control={tmp_path}")
    assert (found.url, found.tier, found.speculation, found.engines, found.key, found.control) == (
        "http://h:1",
        QuantizationTier.INT8,
        3,
        2,
        "k",
        tmp_path,
    )


def test_servers_of_one_folder_are_steered_as_one(tmp_path):
    FolderEngine(tmp_path)

    async def run():
        async with deployment(Upstream(URL, control=tmp_path), Upstream(OTHER, control=tmp_path)) as here:
            here.apply(WITHIN)
            assert read_settings(tmp_path) == EngineSettings.of(WITHIN)
            with pytest.raises(InputError, match="uses this folder"):
                deployment(Upstream(URL, control=tmp_path))
        assert read_settings(tmp_path) == EngineSettings()

    asyncio.run(run())
    with pytest.raises(InputError, match="expected an existing folder"):
        deployment(Upstream(URL, control=tmp_path), Upstream(OTHER, control=tmp_path / "none"))
    deployment(Upstream(URL, control=tmp_path))  # what was refused keeps nothing
