"""What a gateway shows of itself, over real HTTP: every request counted once, and nothing that falls."""

from __future__ import annotations

import asyncio
import json
import re
from importlib import resources
from itertools import count
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from llmserve_env.live.gateway.callers import Caller, Callers
from llmserve_env.live.gateway.deployment import Deployment
from llmserve_env.live.gateway.gateway import Gateway
from llmserve_env.live.gateway.history import History
from llmserve_env.live.gateway.proxy import Proxy
from llmserve_env.live.pilot.decisions import Decision
from llmserve_env.live.servers.telemetry import Telemetry
from llmserve_env.live.servers.upstreams import Upstream
from llmserve_env.schema import QuantizationTier, ServeAction

from ..endpoint_server import BREAK, Running, ScriptedEndpoint, event, piece
from ..vllm_server import metrics as vllm_metrics
from .test_gateway import ANSWER, answering, ask, asking, held, standing, until

ROOT = Path(__file__).parents[3]
PAID = Caller(name='pa"id\\', key="k-paid", ttft_slo_s=30, tpot_slo_s=30)
SLOW = Caller(name="slow", value="slow", ttft_slo_s=1e-9)
SECRET = "a secret nobody shows"


def decision(by="agent", rule=None, **fields):
    action = ServeAction(batch_cap=8, quantization_tier=QuantizationTier.INT8, priority_routing=True)
    given = {"window": 1, "time_s": 1.0, "proposed": action, "decided": action, "applied": action}
    return Decision(**given | {"by": by, "rule": rule, **fields})


async def get(here, path):
    async with here.client.get(path) as response:
        return response.status, response.headers, await response.text()


async def metrics(here):
    """Samples by name and labels, in the order of the labels' names."""
    status, headers, text = await get(here, "/gateway/metrics")
    assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            key = sample.name.removeprefix("llmserve_gateway_"), *dict(sorted(sample.labels.items())).values()
            assert key not in found  # Prometheus refuses a page with one sample twice
            found[key] = sample.value
    return found


async def data(here, after=-1):
    status, headers, text = await get(here, f"/dashboard/data?after={after}")
    assert (status, headers["content-type"], headers["cache-control"]) == (
        200,
        "application/json",
        "no-store",
    )
    return json.loads(text)


def test_every_request_is_counted_once_by_its_outcome():
    def script(asked):
        if asked.body["prompt"] == "break":
            return [event(piece("a")), BREAK]
        return held(asked) if asked.body["prompt"] == "wait" else ANSWER

    async def main():
        endpoint = ScriptedEndpoint(script)
        paid, slow = {"authorization": "Bearer k-paid"}, {"x-tenant": "slow"}
        action = ServeAction(admission_rate=4)
        clock = count(1000, 1e-6).__next__  # no token comes back meanwhile
        async with standing(endpoint, callers=(PAID, SLOW), action=action, clock=clock) as here:
            for headers in (paid, slow):
                assert (await ask(here, headers))[0] == 200
            assert (await ask(here, paid, prompt="break"))[0] == 200
            gone = asking(here, paid, prompt="wait")
            await endpoint.came(4)
            gone.cancel()
            await until(lambda: here.gateway.ledger.totals[0].in_flight == 0)
            before = await metrics(here)
            assert (await ask(here, slow))[0] == 429  # the bucket holds four
            assert (await ask(here))[0] == 401
            async with here.client.post("/v1/completions", data=b"[]", headers=paid) as response:
                assert response.status == 400
            here.gateway.apply(ServeAction())
            going = asking(here, slow, prompt="wait")
            (await endpoint.came(5)).go.release()
            await going
            waiting = asking(here, slow, prompt="wait")
            await endpoint.came(6)
            now = await metrics(here)
            endpoint.asked[5].go.release()
            await waiting

            requests = {key[1:]: value for key, value in now.items() if key[0] == "requests_total" and value}
            assert requests == {
                ("completed", PAID.name): 1,
                ("failed", PAID.name): 1,
                ("given_up", PAID.name): 1,
                ("completed", "slow"): 2,
                ("refused", "slow"): 1,
                ("turned_away", ""): 2,
            }
            in_flight = {key[1]: value for key, value in now.items() if key[0] == "requests_in_flight"}
            assert in_flight == {PAID.name: 0, "slow": 1}
            assert sum(requests.values()) + sum(in_flight.values()) == 9  # as many as were sent
            failures = {key[-1]: value for key, value in now.items() if key[0] == "failures_total"}
            assert sum(failures.values()) == 5
            assert failures["unknown tenant"] == failures["invalid body"] == failures["admission rate"] == 1
            assert (now["requests_in_slo_total", PAID.name], now["requests_in_slo_total", "slow"]) == (1, 0)
            assert now["output_tokens_total", PAID.name] == 3
            assert now["time_to_first_token_seconds_count", PAID.name] == 2
            assert now["time_to_first_token_seconds_bucket", "+Inf", PAID.name] == 2
            assert now["e2e_latency_seconds_count", "slow"] == 2
            assert now["inter_token_latency_seconds_count", "slow"] == 2
            assert now["slo_seconds", "ttft", PAID.name] == 30
            assert [value for key, value in now.items() if key[0] == "requests_at_upstream"] == [1]
            counts = re.compile(r"_(total|bucket|count|sum)$")
            fallen = [key for key, value in before.items() if counts.search(key[0]) and now[key] < value]
            assert not fallen

    asyncio.run(main())


def test_windows_and_decisions_are_told_once_and_in_order():
    async def main():
        async with standing(ScriptedEndpoint(answering)) as here:
            history = here.proxy.history
            assert (await data(here))["entries"] == []
            history.add(here.gateway.window())
            await ask(here)
            here.gateway.apply(decision().applied)
            history.add(here.gateway.window(), decision(), 0.25)
            first = await data(here)
            kinds = [each["kind"] for each in first["entries"]]
            assert kinds == ["window", "window", "decision"]
            empty, full, made = first["entries"]
            assert (empty["arrived"], empty["p99_ttft_s"], empty["tenants"][0]["p99_ttft_s"]) == (
                0,
                None,
                None,
            )
            assert (made["by"], made["before"]["batch_cap"], made["applied"]["batch_cap"]) == (
                "agent",
                256,
                8,
            )
            assert (full["arrived"], full["completed"], full["output_tokens"], full["reward"]) == (
                1,
                1,
                2,
                0.25,
            )
            assert full["tenants"][0]["p50_ttft_s"] == pytest.approx(full["p50_ttft_s"])
            assert (full["action"]["batch_cap"], first["action"]["batch_cap"]) == (256, 8)  # that served it
            assert full["preemptions"] is None  # nobody tells
            number = first["entries"][-1]["number"]
            history.add(here.gateway.window(), decision("limit", "batch_cap"))
            window, made = (await data(here, number))["entries"]
            assert (window["action"]["batch_cap"], made["by"]) == (8, "limit")
            for after in ("-5", "x", "9" * 30, ""):
                assert len((await data(here, after))["entries"]) == 5

    asyncio.run(main())


def test_decisions_and_the_action_in_force_are_metrics():
    async def main():
        async with standing(ScriptedEndpoint(answering)) as here:
            before = await metrics(here)
            assert before["action", "batch_cap"] == 256
            assert ("action", "admission_rate") not in before
            for by, rule in (("agent", None), ("fallback", "stale"), ("shield", "veto"), ("shield", "veto")):
                here.proxy.history.add(here.gateway.window(), decision(by, rule, decision_s=0.02))
            here.proxy.history.add(
                here.gateway.window(), decision("limit", "batch_cap,admission_rate", decision_s=9e9)
            )
            now = await metrics(here)
            decided = {key[1]: value for key, value in now.items() if key[0] == "decisions_total"}
            assert decided == {"agent": 1, "shield": 2, "limit": 1, "fallback": 1}
            found = {key[1:]: value for key, value in now.items() if key[0] == "interventions_total"}
            assert found == {
                ("fallback", "stale"): 1,
                ("shield", "veto"): 2,
                ("limit", "batch_cap"): 1,
                ("limit", "admission_rate"): 1,
            }
            assert (now["decision_seconds_bucket", "0.025"], now["decision_seconds_count",]) == (4, 5)
            action = {key[1]: value for key, value in now.items() if key[0] == "action"}
            assert (action["batch_cap"], action["quantization_tier"], action["priority_routing"]) == (8, 8, 1)
            not_applied = [now["action_not_applied", name] for name in ("quantization_tier", "batch_cap")]
            assert not_applied == [1, 0]  # no upstream is stated to have a precision

    asyncio.run(main())


def test_only_the_last_windows_are_kept():
    gateway = Gateway([Upstream("http://127.0.0.1:1")])
    history = History(gateway, keep=3)
    for _ in range(5):
        history.add(gateway.window())
    assert [each["number"] for each in history.since(-1)] == [2, 3, 4]
    assert history.windows == 5


def test_an_upstream_that_takes_no_connection_is_down():
    async def main():
        async with standing(ScriptedEndpoint(answering)) as here:
            url = here.servers[0].url
            assert (await metrics(here))["upstream_up", url] == 1
            await here.servers[0].kill()
            assert (await ask(here))[0] == 503
            assert (await metrics(here))["upstream_up", url] == 0
            assert (await data(here))["upstreams"][0]["up"] is False

    asyncio.run(main())


def test_the_page_stands_alone_and_shows_nothing_that_clients_sent():
    async def main():
        async with standing(ScriptedEndpoint(answering)) as here:
            await ask(here, {"authorization": f"Bearer {SECRET}"}, prompt=SECRET)
            here.proxy.history.add(here.gateway.window())
            status, headers, page = await get(here, "/dashboard")
            assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
            assert "default-src 'none'" in headers["content-security-policy"]
            assert not re.findall(r"(?:src|href)=\"?https?:|@import|url\(", page)
            for path in ("/dashboard", "/dashboard/data", "/gateway/metrics"):
                assert SECRET not in (await get(here, path))[2]
                async with here.client.post(path) as response:
                    assert response.status == 405

    asyncio.run(main())


def test_what_grafana_asks_for_is_there_and_all_of_it_is_described():
    path = resources.files("llmserve_env.live") / "data" / "grafana.json"
    dashboard = json.loads(path.read_text(encoding="utf-8"))
    assert dashboard["schemaVersion"] >= 36
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    queries += [each["definition"] for each in dashboard["templating"]["list"] if "definition" in each]
    queries += [each["expr"] for each in dashboard["annotations"]["list"] if "expr" in each]
    asked = set(re.findall(r"\bllmserve_gateway_\w+", " ".join(queries)))
    of_vllm = set(re.findall(r"\bvllm:\w+", " ".join(queries)))
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(places)
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}

    async def main():
        endpoint = ScriptedEndpoint(answering, others={"/metrics": vllm_metrics("0.32-idle").encode()})
        async with Running(endpoint) as server:
            gateway, tenants = Gateway([Upstream(server.url)]), Callers()
            telemetry = Telemetry([server.url])
            history = History(gateway, Deployment(gateway, telemetry))
            proxy = Proxy(gateway, tenants, history=history)
            async with telemetry, Running(proxy) as here, aiohttp.ClientSession(here.url) as here.client:
                await until(lambda: telemetry.replicas[0].last is not None)
                async with here.client.post("/v1/completions", data=b"[]") as response:
                    assert response.status == 400
                history.add(gateway.window(), decision("limit", "batch_cap"), reward=0.5)
                shown = {f"llmserve_gateway_{key[0]}" for key in await metrics(here)}
                theirs = (await get(here, "/metrics"))[2]
            await proxy.close()
        assert asked <= shown, asked - shown
        assert {name for name in of_vllm if f"\n{name}{{" not in theirs} == set()
        left_out = (
            shown - asked - {each for each in shown if re.search(r"_(bucket|sum|count)$|_process_", each)}
        )
        assert left_out == {"llmserve_gateway_windows_total"}
        told = (ROOT / "docs" / "gateway.md").read_text(encoding="utf-8").partition("## Dashboard")[2]
        names = {re.sub(r"llmserve_gateway_|_(bucket|sum|count)$", "", each) for each in shown}
        assert {each for each in names if f"`{each}`" not in told and "process_" not in each} == set()

    asyncio.run(main())
