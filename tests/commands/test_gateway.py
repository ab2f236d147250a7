"""`llmserve gateway` as a process of its own."""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import asynccontextmanager

import aiohttp

from llmserve_env.cli import main
from tests.live.endpoint_server import Running, ScriptedEndpoint, event, piece

SECRET = "xyzzy-secret"


@asynccontextmanager
async def started(upstream, *options):
    """The command before this upstream, and what it said first."""
    command = ["-m", "llmserve_env", "gateway", "--upstream", f"{upstream.url}/v1,tier=INT8", "--port", "0"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, *options, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        yield process, await line(process)
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


def url(listening):
    return listening.removeprefix("listening on ").strip()


def test_what_cannot_be_used_is_refused(capsys):
    for options in (["--upstream", "host:8000"], ["--upstream", "http://h", "--window-s", "0"]):
        assert main(["gateway", *options]) == 2
    assert main(["gateway", "--upstream", "http://h", "--tenants", "none.toml"]) == 2
    assert "none.toml" in capsys.readouterr().err
