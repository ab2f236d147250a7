"""`llmserve gateway` as a process of its own."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from contextlib import asynccontextmanager

import aiohttp
import pytest

from llmserve_env.cli import main
from llmserve_env.live.pilot.decision_log import read_decisions
from llmserve_env.live.servers.engine_settings import EngineSettings, read_settings, write_settings
from llmserve_env.schema import ServeAction
from tests.live.control_folder import FolderEngine
from tests.live.endpoint_server import WAIT, Running, ScriptedEndpoint, closed_url, event, piece

SECRET = "xyzzy-secret"


@asynccontextmanager
async def started(upstream, *options, control=None):
    """The command before this upstream, and where it says that it listens."""
    server = f"{upstream.url}/v1,tier=INT8" + ("" if control is None else f",control={control}")
    command = ["-m", "llmserve_env", "gateway", "--upstream", server, "--port", "0"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, *options, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        said = await line(process)
        while said and not said.startswith("listening"):  # it may have to compile first, and says so
            said = await line(process)
        yield process, said
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()  # to the end of its pipe, which closes it


async def line(process):
    return (await asyncio.wait_for(process.stdout.readline(), 60)).decode()


def test_it_serves_tells_of_its_windows_and_ends(tmp_path):
    tenants = tmp_path / "tenants.toml"
    tenants.write_text(f'[[tenants]]\nname = "a"\nkey = "{SECRET}"\n', encoding="utf-8")
    endpoint = ScriptedEndpoint(lambda asked: [event(piece(SECRET, "length")), event("[DONE]")])
    options = ["--tenants", str(tenants), "--window-s", "0.1", "--quantization-tier", "INT8"]

    async def run():
        async with Running(endpoint) as upstream, started(upstream, *options) as (process, listening):
            said = [listening]
            headers = {"authorization": f"Bearer {SECRET}"}
            async with aiohttp.ClientSession(url(listening), headers=headers) as client:
                for body in ({"prompt": SECRET, "stream": True}, SECRET):
                    async with client.post("/v1/completions", json=body) as response:
                        await response.read()
            while "arrived" not in said[-1]:
                said.append(await line(process))
            process.send_signal(signal.SIGTERM)
            rest, _ = await asyncio.wait_for(process.communicate(), 60)
            return process.returncode, said, rest.decode()

    status, said, rest = asyncio.run(run())
    assert (status, rest) == (0, "")
    assert [each.split(":")[1].strip() for each in said if each.startswith("not applied")] == [
        "prefill_decode_split",
        "speculation_depth",
    ]
    assert "1 arrived, 1 completed, 0 failed (0 refused)" in said[-1]
    assert SECRET not in "".join(said)


def test_it_reads_how_full_kv_caches_are():
    def metrics(usage):
        text = f"# TYPE vllm:kv_cache_usage_perc gauge\nvllm:kv_cache_usage_perc {usage}\n"
        return {"/metrics": text.encode(), "/health": b""}

    async def run():
        endpoint = ScriptedEndpoint(lambda asked: [event(piece("a", "length"))], others=metrics(0.9))
        async with (
            Running(endpoint) as upstream,
            started(upstream, "--kv-budget-fraction", "0.5") as (_, said),
            aiohttp.ClientSession(url(said)) as client,
        ):

            async def until(condition):
                while True:
                    async with client.get("/health") as response:
                        if condition(await response.json()):
                            return

            await asyncio.wait_for(until(lambda found: found["upstreams"][0]["kv_usage"] == 0.9), 60)
            asked = asyncio.create_task(client.post("/v1/completions", json={"prompt": "p"}))
            await asyncio.wait_for(until(lambda found: found["waiting"] == 1), 60)
            assert endpoint.asked == []
            endpoint.others = metrics(0.4)
            async with await asyncio.wait_for(asked, 60) as response:
                assert response.status == 200
                await response.read()

    asyncio.run(run())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_agent_steers_until_a_signal_and_what_was_found_returns(tmp_path, number):
    folder, log = tmp_path / "control", tmp_path / "decisions.jsonl"
    folder.mkdir()
    FolderEngine(folder)
    write_settings(folder, EngineSettings(batch_cap=7))
    options = ["--agent", "best-constant", "--task", "static_workload", "--window-s", "0.25"]
    options += ["--no-metrics", "--decisions", str(log), "--batch-cap", "100"]

    async def run():
        endpoint = ScriptedEndpoint(lambda asked: [event(piece("a", "length")), event("[DONE]")])
        async with (
            Running(endpoint) as upstream,
            started(upstream, *options, control=folder) as (process, listening),
            aiohttp.ClientSession(url(listening)) as client,
        ):
            said = [listening]
            while not said[-1].startswith("decision 0"):
                said.append(await line(process))
            assert "limit (kv_budget_fraction: 1 to 0.8, not 0.2): batch_cap 100 to 64, " in said[-1]
            async with client.post("/v1/completions", json={"prompt": "p"}) as response:
                await response.read()
            while "1 completed" not in said[-1]:
                said.append(await line(process))
            assert read_settings(folder).batch_cap == 64
            process.send_signal(number)
            rest, _ = await asyncio.wait_for(process.communicate(), 60)
            assert process.returncode == 0, rest
            assert b"Traceback" not in rest
        assert read_settings(folder) == EngineSettings(batch_cap=7)

    asyncio.run(run())
    (kept,) = read_decisions([log])
    assert kept.before.batch_cap == 100
    assert kept.decisions[0].applied.kv_budget_fraction == 0.8
    assert kept.beginning.capabilities["batch_cap"].startswith("gateway: sequences at each engine")
    assert set(kept.decisions[0].not_applied) == {"quantization_tier", "prefill_decode_split"}
    assert kept.windows["completed"].sum() == 1


def test_a_dry_run_says_what_would_be_done_and_does_not(tmp_path):
    options = ["--agent", "best-constant", "--task", "static_workload", "--window-s", "0.2", "--no-metrics"]
    options += ["--dry-run", "--decisions", str(tmp_path / "log")]

    async def run():
        endpoint = ScriptedEndpoint(lambda asked: [])
        async with Running(endpoint) as upstream, started(upstream, *options) as (process, _):
            said = ""
            while not said.startswith("decision 0"):
                said = await line(process)
            assert "if this were no dry run" in said
            while len((tmp_path / "log").read_text().splitlines()) < 6:
                await asyncio.sleep(0)
            process.send_signal(signal.SIGTERM)
            await asyncio.wait_for(process.communicate(), 60)

    asyncio.run(run())
    (kept,) = read_decisions([tmp_path / "log"])
    for decision in kept.decisions:
        assert decision.dry_run
        assert decision.applied == kept.beginning.start == ServeAction()
        assert decision.decided != decision.applied


def url(listening):
    return listening.removeprefix("listening on ").strip()


def test_what_cannot_be_used_is_refused(capsys):
    for options in (["--upstream", "host:8000"], ["--upstream", "http://h", "--window-s", "0"]):
        assert main(["gateway", *options]) == 2
    assert main(["gateway", "--upstream", "http://h", "--tenants", "none.toml"]) == 2
    assert "none.toml" in capsys.readouterr().err


AGENT = ["--agent", "defaults", "--task", "static_workload"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--agent", "defaults"], "expected --agent and --task"),
        (["--dry-run"], "expected --agent and --task"),
        (["--agent", "nobody", "--task", "static_workload"], "nobody"),
        (["--agent", "defaults", "--task", "nothing"], "nothing"),
        ([*AGENT, "--decide-limit-s", "1000"], "decide_limit_s"),
        ([*AGENT, "--decide-limit-s", "0"], "decide_limit_s"),
        ([*AGENT, "--safe.batch-cap", "0"], "safe.batch_cap"),
        ([*AGENT, "--decisions", "."], "cannot be written"),
        ([*AGENT, "--window-s", "0.7"], "horizon_s"),
    ],
)
def test_an_agent_that_cannot_steer_is_refused(capsys, options, told):
    assert main(["gateway", "--upstream", "http://h", *options]) == 2
    assert told in capsys.readouterr().err


def test_it_says_which_upstreams_are_dead_and_ends_what_does_not_end_in_time(tmp_path):
    dead = closed_url().removesuffix("/v1")
    options = ["--upstream", dead, "--drain-timeout-s", "1", "--drained", str(tmp_path / "drained")]

    async def run():
        endpoint = ScriptedEndpoint(lambda asked: [event(piece("a")), WAIT])
        async with (
            Running(endpoint) as upstream,
            started(upstream, *options) as (process, listening),
            aiohttp.ClientSession(url(listening)) as client,
        ):
            while f"{dead} is down at the start" not in (said := await line(process)):
                assert said
            response = await client.post("/v1/completions", json={"prompt": "p", "stream": True})
            assert await response.content.readany() == event(piece("a"))
            process.send_signal(signal.SIGTERM)
            rest = await asyncio.wait_for(response.content.read(), 60)
            said, _ = await asyncio.wait_for(process.communicate(), 60)
            return process.returncode, rest, said.decode()

    status, rest, said = asyncio.run(run())
    assert (status, json.loads(rest.removeprefix(b"data: "))["error"]["code"]) == (0, 503)
    assert "draining: 1 requests under way have up to 1 s" in said
    assert "ended 1 requests that were still under way" in said


def test_an_upstream_is_drained_by_a_file(tmp_path):
    drained = tmp_path / "drained"

    async def run():
        endpoint = ScriptedEndpoint(lambda asked: [event(piece("a", "length"))])
        async with Running(endpoint) as upstream, Running(endpoint) as other:
            drained.write_text(f"{other.url}\n")
            options = ["--upstream", other.url, "--drained", str(drained)]
            async with (
                started(upstream, *options) as (_, listening),
                aiohttp.ClientSession(url(listening)) as client,
            ):

                async def until(states):
                    found = None
                    while found != states:
                        async with client.get("/health") as response:
                            found = [each["state"] for each in (await response.json())["upstreams"]]

                await asyncio.wait_for(until(["well", "draining"]), 60)
                drained.unlink()
                await asyncio.wait_for(until(["well", "well"]), 60)

    asyncio.run(run())


def test_what_anybody_may_send_is_bounded_and_pages_of_other_sites_may_send_nothing():
    endpoint = ScriptedEndpoint(lambda asked: [event(piece("a", "length")), event("[DONE]")])
    body = {"prompt": "a", "stream": True}

    async def run():
        async with Running(endpoint) as upstream, started(upstream) as (process, listening):
            async with aiohttp.ClientSession(url(listening)) as client:
                for other in ({"origin": "https://other.example"}, {"sec-fetch-site": "cross-site"}):
                    async with client.post("/v1/completions", json=body, headers=other) as response:
                        assert response.status == 403
                        assert "other sites" in (await response.json())["error"]["message"]
                for own in ({}, {"sec-fetch-site": "same-origin"}):
                    async with client.post("/v1/completions", json=body, headers=own) as response:
                        assert response.status == 200
                async with client.get("/dashboard", headers={"host": "rebound.example"}) as response:
                    assert response.status == 400
                async with client.get("/dashboard") as response:
                    assert response.headers.getall("x-content-type-options") == ["nosniff"]
                    assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
            place = url(listening).rpartition(":")
            reader, writer = await asyncio.open_connection("127.0.0.1", int(place[2].rstrip("/")))
            writer.write(b"GET /health HTTP/1.1\r\nX: " + b"a" * 100_000)
            assert (await asyncio.wait_for(reader.readline(), 60)).startswith(b"HTTP/1.1 431 ")
            assert b'"error": {' in await asyncio.wait_for(reader.read(), 60)
            writer.close()
            process.send_signal(signal.SIGTERM)
            await asyncio.wait_for(process.communicate(), 60)

    asyncio.run(run())
    assert len(endpoint.asked) == 2


def test_pages_of_stated_origins_may_ask_and_requests_go_where_their_model_is(tmp_path):
    tenants = tmp_path / "tenants.toml"
    tenants.write_text(f'[[tenants]]\nname = "a"\nkey = "{SECRET}"\n', encoding="utf-8")
    page = {"origin": "http://ui.example"}
    preflight = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }

    def endpoint(name):
        return ScriptedEndpoint(
            lambda asked: [event(piece("a", "length")), event("[DONE]")],
            headers={"access-control-allow-origin": "*"},
            others={"/v1/models": f'{{"data": [{{"id": "{name}"}}]}}'.encode(), "/health": b""},
        )

    async def run():
        first, second = endpoint("m1"), endpoint("m2")
        async with Running(first) as one, Running(second) as two:
            options = ["--upstream", two.url, "--tenants", str(tenants), "--cors-origin", "http://ui.example"]
            async with (
                started(one, *options) as (process, said),
                aiohttp.ClientSession(url(said)) as client,
            ):
                while "listening on" not in said:
                    said = await line(process)
                async with client.options("/v1/completions", headers=page | preflight) as answer:
                    assert answer.status == 204
                    assert answer.headers["access-control-allow-origin"] == "http://ui.example"
                    assert answer.headers["access-control-allow-headers"] == "authorization,content-type"
                key = {"authorization": f"Bearer {SECRET}"}
                for origin, status, allowed in (
                    ("http://ui.example", 200, "http://ui.example"),
                    ("http://other.example", 403, None),
                ):
                    body = {"model": "m2", "prompt": "p"}
                    sent = client.post("/v1/completions", json=body, headers={"origin": origin} | key)
                    async with sent as answer:
                        assert answer.status == status
                        assert answer.headers.get("access-control-allow-origin") == allowed
            assert (len(first.asked), len(second.asked)) == (0, 1)

    asyncio.run(run())


def test_what_is_no_origin_is_named(capsys):
    assert main(["gateway", "--upstream", "http://127.0.0.1:1", "--cors-origin", "ui.example"]) != 0
    assert "cors-origin" in capsys.readouterr().err
