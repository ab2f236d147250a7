"""Gateway, telemetry and scheduler class before a real vLLM. Bytes, orders and counts, never times."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import os
import re
import subprocess
import time
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from types import SimpleNamespace

import httpx
import pytest

from llmserve_env import cli
from llmserve_env.agents import RandomAgent
from llmserve_env.grading import grade, read_log
from llmserve_env.live import endpoint, sender
from llmserve_env.live.servers.engine_settings import EngineSettings
from llmserve_env.live.servers.metrics import METRICS
from llmserve_env.live.servers.telemetry import Telemetry
from llmserve_env.schema import ServeAction

from ._gateway import (
    DONE,
    LONG,
    ask,
    failures,
    gateway_process,
    held,
    ran_together,
    scraped,
    standing,
    stream,
    tokens_of,
    until,
)  # fmt: skip
from .conftest import (
    BLOCK_TOKENS,
    BLOCKS,
    MAX_QUEUED,
    START_S,
    STEP_S,
    TRIES,
    completion,
    prompt,
    wait_for,
)  # fmt: skip

# Telemetry


def test_all_metrics_are_there_by_their_newest_names(server):
    async def main():
        async with standing(server) as here:
            last = here.replica.last
            assert {*last.gauges, *last.counters, *last.histograms} == set(METRICS)
            assert last.started
            assert last.kv_tokens == (BLOCKS + 1) * BLOCK_TOKENS

    asyncio.run(main())
    text = httpx.get(f"{server.url}/metrics", timeout=STEP_S).text
    shown = set(re.findall(r"^vllm:(\w+)[ {]", text, re.MULTILINE))
    suffix = {"gauge": "", "counter": "_total", "histogram": "_count"}
    assert {metric.names[0] + suffix[metric.kind] for metric in METRICS.values()} <= shown


def test_server_and_gateway_count_the_same(server):
    async def main():
        async with standing(server) as here:
            here.deployment.telemetry.windows()
            here.gateway.window()
            lengths = [3, 9, 17, 30, 8, 24]
            before = server.metric("request_success_total")
            answers = await asyncio.gather(
                *(ask(here, stream(seed, tokens, 20 + seed)) for seed, tokens in enumerate(lengths))
            )
            assert [tokens_of(each) for each in answers] == lengths
            await until(lambda: server.metric("request_success_total") == before + len(lengths))
            await scraped(here)
            (told,) = here.deployment.telemetry.windows()
            record = here.gateway.window()
            assert told.output_tokens == record.output_tokens == sum(lengths)
            assert told.prompt_tokens == record.arrived_prompt_tokens == sum(20 + seed for seed in range(6))
            assert told.finished["length"] == record.completed == record.first_tokens == 6
            assert told.ttft_s.count == told.e2e_s.count == told.queue_s.count == 6
            assert (told.preemptions, told.restarts, told.stale) == (0, 0, 0)

    asyncio.run(main())


# Streams


@asynccontextmanager
async def recording(server):
    """A relay before the server: its URL, and the bytes that went either way."""
    sent, got = bytearray(), bytearray()

    async def pump(reader, writer, kept):
        while data := await reader.read(1 << 16):
            kept += data
            writer.write(data)
            await writer.drain()
        writer.close()

    async def relay(reader, writer):
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(pump(reader, up_writer, sent), pump(up_reader, writer, got))

    relaying = await asyncio.start_server(relay, "127.0.0.1", 0)
    async with relaying:
        host, port = relaying.sockets[0].getsockname()
        yield SimpleNamespace(url=f"http://{host}:{port}", sent=sent, got=got)


def http_body(raw):
    """Of the bytes of an answer, which may be chunked."""
    answer = http.client.HTTPResponse(SimpleNamespace(makefile=lambda mode: io.BytesIO(bytes(raw))))
    answer.begin()
    return answer.read()


def test_bytes_pass_as_the_server_sent_them(server):
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "Grüße \N{SLIGHTLY SMILING FACE}"}]}
    chat |= {"max_tokens": 40, "ignore_eos": True, "seed": 1}
    requests = {
        "/v1/completions": [
            stream(1, 60),
            stream(2, 20, n=3, temperature=1.0, seed=2),
            completion(prompt(30, 3), 20, logprobs=2),
        ],
        "/v1/chat/completions": [chat | {"stream": True}, chat | {"stream": True, "logprobs": True}, chat],
    }

    async def main():
        async with recording(server) as relay, standing(server, url=relay.url, control=False) as here:
            for path, bodies in requests.items():
                for body in bodies:
                    relay.sent.clear()
                    relay.got.clear()
                    content = json.dumps(body, ensure_ascii=False, indent=1).encode()
                    kind = {"content-type": "application/json"}
                    async with here.client.post(path, data=content, headers=kind) as response:
                        answer = await response.read()
                    assert response.status == 200, answer
                    assert relay.sent.endswith(b"\r\n\r\n" + content)
                    assert answer == http_body(relay.got)
                    assert (response.content_type, answer.endswith(DONE)) == (
                        ("text/event-stream", True) if body.get("stream") else ("application/json", False)
                    )
            assert failures(here) == {}

    asyncio.run(main())


def test_clients_that_go_away_free_the_engine(server):
    async def main():
        async with standing(server, ServeAction(batch_cap=4)) as here:
            here.deployment.telemetry.windows()
            async with AsyncExitStack() as clients:
                for seed in range(4):
                    await clients.enter_async_context(held(here, seed))
                await until(lambda: server.metric("num_requests_running") == 4)
                waiting = [asyncio.create_task(ask(here, stream(seed, LONG))) for seed in range(3)]
                await until(lambda: here.gateway.waiting == 3)
                for each in waiting:
                    each.cancel()
                await until(lambda: here.gateway.waiting == 0)
            await until(lambda: server.metric("num_requests_running") == 0)
            await scraped(here)
            (told,) = here.deployment.telemetry.windows()
            assert sum(told.finished.values()) == 0  # vLLM does not count what nobody waited for
            record = here.gateway.window()
            assert (record.arrived, record.timeouts, record.in_flight) == (7, 7, 0)
            assert failures(here) == {"client went away": 7}
            assert server.metric("kv_cache_usage_perc") == 0

    asyncio.run(main())


# Errors


def test_refusals_of_the_server_reach_clients(server):
    too_long = completion(prompt(3000, 0), 1)
    unknown = completion(prompt(10, 0), 1) | {"model": "unknown"}

    async def main():
        async with standing(server) as here:
            for body, status in ((too_long, 400), (unknown, 404)):
                for each in (body, body | {"stream": True}):
                    async with here.client.post(f"{server.url}/v1/completions", json=each) as response:
                        said = await response.json()
                    got = await ask(here, each)
                    assert (got[0], json.loads(got[2])) == (status, said)
            assert failures(here) == {"http 400": 2, "http 404": 2}

    asyncio.run(main())


def test_a_full_queue_reaches_clients(server):
    # More pieces than the queue has places are refused at once; as many prompts, when the stream has begun.
    pieces = stream(0, 4, n=MAX_QUEUED + 1, temperature=1.0)
    prompts = stream(0, 4) | {"prompt": [prompt(8, i) for i in range(MAX_QUEUED + 1)]}

    async def main():
        async with standing(server) as here:
            here.deployment.telemetry.windows()
            for body, status in ((pieces, 503), (prompts, 200)):
                async with here.client.post(f"{server.url}/v1/completions", json=body) as response:
                    said = await response.read()
                assert response.status == status
                if status == 200:
                    said = said.split(b"\n\n")[0].removeprefix(b"data: ")
                error = json.loads(said)["error"]
                assert error["code"] == 503
                status, headers, got = await ask(here, body)
                assert (status, headers["retry-after"]) == (503, "1")
                assert json.loads(got)["error"]["message"] == error["message"]
            assert failures(here) == {"http 503": 1, "refused with 503": 1}
            await until(lambda: sum(here.replica.last.counters["rejected"].values()) >= 4)
            (told,) = here.deployment.telemetry.windows()
            assert told.rejected["max_num_queued_reqs"] == 4

    asyncio.run(main())


# What is set


@pytest.mark.parametrize("where", ["gateway", "engine"])
@pytest.mark.parametrize(("routing", "order"), [(True, "bdac"), (False, "abcd")])
def test_the_urgent_go_first_under_priority_routing(server, where, routing, order):
    """Where the queue is: in the gateway, or in vLLM, which is told priorities."""
    finished = []

    async def send(here, name, key):
        assert tokens_of(await ask(here, stream(name, 8), key)) == 8
        finished.append(name)

    async def main():
        cap = 1 if where == "gateway" else 64
        async with standing(
            server, ServeAction(batch_cap=cap, priority_routing=routing), control=False
        ) as here:
            if where == "engine":
                await asyncio.to_thread(server.set, batch_cap=1)
            async with held(here):
                tasks = []
                for name, key in zip("abcd", ["k-free", "k-paid", "k-free", "k-paid"], strict=True):
                    tasks.append(asyncio.create_task(send(here, name, key)))
                    await until(
                        lambda: len(tasks) == server.metric("num_requests_waiting") + here.gateway.waiting
                    )
                assert here.gateway.waiting == (4 if where == "gateway" else 0)
            await asyncio.gather(*tasks)

    asyncio.run(main())
    assert "".join(finished) == order


@pytest.mark.parametrize("control", [False, True], ids=["gateway", "gateway and engine"])
def test_the_batch_cap_holds_and_is_reached(server, control):
    async def main():
        async with standing(server, ServeAction(batch_cap=3), control=control) as here:
            within = here.deployment.capabilities()["batch_cap"].split(":")[0]
            assert within == ("engine" if control else "gateway")

            async def send():
                answers = await asyncio.gather(*(ask(here, stream(seed, 24)) for seed in range(9)))
                assert [tokens_of(each) for each in answers] == 9 * [24]

            assert await ran_together(server, send, 3) == 3
            here.deployment.apply(ServeAction(batch_cap=6))
            if control:
                await until(lambda: server.status().applied.batch_cap == 6)
            assert await ran_together(server, send, 6) == 6

    asyncio.run(main())
    wait_for(lambda: server.status().asked == EngineSettings())  # what was found returns


def test_the_scheduler_s_cap_holds_what_the_gateway_lets_through(server):
    server.set(batch_cap=2)

    async def main():
        async with standing(server, control=False) as here:
            first = server.last_iteration()
            async with held(here, "one"), held(here, "two"):
                answers = [asyncio.create_task(ask(here, stream(seed, 16))) for seed in range(6)]
                await until(lambda: server.metric("num_requests_waiting") >= 6)
                assert here.gateway.waiting == 0
            assert [tokens_of(await each) for each in answers] == 6 * [16]
            await until(lambda: server.metric("num_requests_running") == 0)
            assert max(each.running for each in server.iterations(first)) == 2

    asyncio.run(main())


def test_a_full_kv_cache_preempts_and_all_are_answered(server):
    # 5 blocks of prompt, 2 more of answer each: 12 requests ask for 84 blocks of 64.
    async def main():
        async with standing(server, ServeAction(batch_cap=64)) as here:
            here.deployment.window()
            body = {"prompt_tokens": 5 * BLOCK_TOKENS - 4, "tokens": 2 * BLOCK_TOKENS}

            async def served():
                answers = await asyncio.gather(*(ask(here, stream(seed, **body)) for seed in range(12)))
                assert [tokens_of(each) for each in answers] == 12 * [2 * BLOCK_TOKENS]
                await scraped(here)
                record = here.deployment.window()
                assert (record.completed, record.failed) == (12, 0)
                return record

            for _ in range(TRIES):  # until they meet in the cache, and a scrape sees them there
                record = await served()
                assert {"preemptions", "kv_cache_occupancy"}.isdisjoint(here.deployment.unmeasured)
                if record.preemptions and record.mean_kv_occupancy > 0.5:
                    break
            assert record.preemptions > 0
            assert record.mean_kv_occupancy > 0.5

            # Under half of the blocks 6 are admitted at most, and 6 at their longest fit.
            here.deployment.apply(ServeAction(batch_cap=64, kv_budget_fraction=0.5))
            await until(lambda: server.status().applied.kv_budget_fraction == 0.5)
            record = await served()
            assert (record.preemptions, record.not_applied.get("kv_budget_fraction")) == (0, None)

    asyncio.run(main())


def test_without_the_scheduler_the_gateway_holds_back_while_the_kv_cache_is_full(server):
    async def main():
        action = ServeAction(batch_cap=64, kv_budget_fraction=0.2)
        async with standing(server, action, control=False) as here:
            async with held(here, "full"):  # in the end 60 blocks of 64
                await until(lambda: (here.gateway.kv_usage(here.gateway.upstreams[0]) or 0) >= 0.2)
                late = asyncio.create_task(ask(here, stream(1, 4)))
                await until(lambda: here.gateway.waiting == 1)
                assert server.metric("num_requests_running") == 1
            assert tokens_of(await late) == 4

    asyncio.run(main())


def test_speculation_follows_the_action(server):
    async def main():
        async with standing(server, ServeAction(batch_cap=64)) as here:
            assert here.deployment.capabilities()["speculation_depth"] == "engine: 0 to 4"
            for depth in (0, 4, 0):
                here.deployment.apply(ServeAction(batch_cap=64, speculation_depth=depth))
                await until(lambda depth=depth: server.status().applied.speculation_depth == depth)
                here.deployment.window()
                body = completion(12 * prompt(8, 0), 40, stream=True, stream_options={"include_usage": True})
                assert tokens_of(await ask(here, body)) == 40
                await scraped(here)
                record = here.deployment.window()
                assert (record.drafted_tokens > 0) == (depth > 0)
                assert record.output_tokens == 40

    asyncio.run(main())


# Live episodes


@pytest.fixture
def unhurried(monkeypatch):
    """Nobody in a live episode is in a hurry: before each window, what was sent is answered and counted."""
    senders, act = [], RandomAgent.act

    def made(*args):
        senders.append(sender.Sender(*args))
        return senders[-1]

    def wait_and_act(agent, observations, windows):
        for each in senders:  # at first there is no episode yet
            wait_for(lambda each=each: not each._tasks)
            (replica,), answered_s = each.deployment.telemetry.replicas, time.monotonic()
            wait_for(lambda replica=replica, then_s=answered_s: replica.last.at_s > then_s)
        return act(agent, observations, windows)

    monkeypatch.setattr(RandomAgent, "act", wait_and_act)
    monkeypatch.setattr(endpoint, "Sender", made)
    monkeypatch.setattr(sender, "Telemetry", partial(Telemetry, timeout_s=STEP_S))
    monkeypatch.setattr(sender, "STALE_S", START_S)
    monkeypatch.setattr(sender, "_PROBE_S", STEP_S)


def test_an_agent_plays_an_episode(server, unhurried, tmp_path, capsys):
    server.set(batch_cap=5)
    log, decisions, tenants = tmp_path / "log.json", tmp_path / "decisions.jsonl", tmp_path / "anybody.toml"
    tenants.write_text("[anybody]\nttft_slo_s = 1e6\ntpot_slo_s = 1e6\n")
    arguments = [
        "run", "--agent", "random", "--task", "static_workload", "--horizon-s", "6", "--model", "tiny",
        "--workload", f"poisson://?rate=6&duration=60&lengths=fixed:40,12&tenants={tenants}",
        "--live", f"{server.url},control={server.control}",
        "--request-timeout-s", str(START_S), "--decide-limit-s", str(START_S),
        "--log", str(log), "--decisions", str(decisions),
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "engine: up to 64" in said
    assert "engine: 0 to 4" in said
    result = grade(read_log(log), allow_files=True)
    assert (result.windows, result.verified) == (6, False)
    assert result.components["goodput"] > 0
    lines = [json.loads(line) for line in decisions.read_text().splitlines()]
    assert "fallback" not in [line["decision"]["by"] for line in lines if line["kind"] == "decision"]
    records = [line["record"] for line in lines if line["kind"] == "result"]
    assert len(records) == 6
    arrived, completed = (sum(record[name] for record in records) for name in ("arrived", "completed"))
    assert sum(record["failed"] for record in records) == 0
    assert arrived == completed + records[-1]["in_flight"]
    # All but the last window's are answered, and the engine tells so.
    assert completed >= arrived - records[-1]["arrived"] > 0
    assert sum(record["prefill_tokens"] for record in records) >= 40 * (arrived - records[-1]["arrived"])
    wait_for(lambda: server.status().asked == EngineSettings(batch_cap=5))  # what was found returns


# A public load generator


def test_vllm_bench_serve_gets_all_its_answers(server, vllm_python, tmp_path):
    requests, tokens = 80, 16
    flags = ["--batch-cap", "12", "--window-s", "2"]
    with gateway_process(server, tmp_path, *flags) as here:
        first = server.last_iteration()
        done = subprocess.run(
            [
                vllm_python.parent / "vllm", "bench", "serve", "--backend", "openai", "--base-url", here.url,
                "--model", vllm_python.parents[2] / "model", "--served-model-name", "tiny",
                "--dataset-name", "random", "--random-input-len", "64", "--random-output-len", str(tokens),
                "--num-prompts", str(requests), "--max-concurrency", "24", "--ignore-eos", "--disable-tqdm",
                "--save-result", "--result-dir", tmp_path, "--result-filename", "bench.json",
            ],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=START_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:]
        result = json.loads((tmp_path / "bench.json").read_text())
        assert (result["completed"], result["failed"]) == (requests, 0)
        assert result["total_output_tokens"] == requests * tokens
        assert max(each.running for each in server.iterations(first)) == 12
    assert here.process.returncode == 0, here.out()
