"""`llmserve gateway` as a process of its own."""

from __future__ import annotations

import asyncio
import signal
import sys

import aiohttp

from llmserve_env.cli import main
from tests.live.endpoint_server import Running, ScriptedEndpoint, event, piece

SECRET = "xyzzy-secret"


def test_it_serves_tells_of_its_windows_and_ends(tmp_path):
    tenants = tmp_path / "tenants.toml"
    tenants.write_text(f'[[tenants]]\nname = "a"\nkey = "{SECRET}"\n', encoding="utf-8")
    answer = [event(piece(SECRET, "length")), event("[DONE]")]

    async def run():
        async with Running(ScriptedEndpoint(lambda asked: answer)) as upstream:
            command = [
                "-m",
                "llmserve_env",
                "gateway",
                "--upstream",
                f"{upstream.url}/v1,tier=INT8",
                "--port",
                "0",
            ]
            options = ["--tenants", str(tenants), "--window-s", "0.1", "--quantization-tier", "INT8"]
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *command,
                *options,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            try:
                said = [(await asyncio.wait_for(process.stdout.readline(), 60)).decode()]
                url = said[0].removeprefix("listening on ").strip()
                headers = {"authorization": f"Bearer {SECRET}"}
                async with aiohttp.ClientSession(url, headers=headers) as client:
                    for body in ({"prompt": SECRET, "stream": True}, SECRET):
                        async with client.post("/v1/completions", json=body) as response:
                            await response.read()
                while "arrived" not in said[-1]:
                    said.append((await asyncio.wait_for(process.stdout.readline(), 60)).decode())
                process.send_signal(signal.SIGTERM)
                rest, _ = await asyncio.wait_for(process.communicate(), 60)
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
            return process.returncode, said, rest.decode()

    status, said, rest = asyncio.run(run())
    assert (status, rest) == (0, "")
    assert [line.split(":")[1].strip() for line in said if line.startswith("not applied")] == [
        "prefill_decode_split",
        "speculation_depth",
    ]
    assert "1 arrived, 1 completed, 0 failed (0 refused)" in said[-1]
    assert SECRET not in "".join(said)


def test_what_cannot_be_used_is_refused(capsys):
    for options in (["--upstream", "host:8000"], ["--upstream", "http://h", "--window-s", "0"]):
        assert main(["gateway", *options]) == 2
    assert main(["gateway", "--upstream", "http://h", "--tenants", "none.toml"]) == 2
    assert "none.toml" in capsys.readouterr().err
