"""`LiveScheduler` in a real vLLM: what is set holds while it serves. Orders and counts, never times."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from llmserve_env.live.servers.engine_settings import AppliedSettings, EngineSettings

from .conftest import BLOCK_TOKENS, ROOT, START_S, STEP_S, TRIES, completion, prompt, wait_for

STARTED = AppliedSettings(batch_cap=64, kv_budget_fraction=1.0, speculation_depth=4)


def complete(server, prompt, tokens, priority=0):
    """Tokens of a completion."""
    body = completion(prompt, tokens, priority=priority)
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=STEP_S)
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["completion_tokens"]


@contextmanager
def load(server, clients, prompt_tokens, tokens):
    """Clients who send their next request when they have their answer, until the block ends."""
    over = threading.Event()

    def client(number):
        sent = 0
        while not over.is_set():
            assert complete(server, prompt(prompt_tokens, (number, sent).__repr__()), tokens) == tokens
            sent += 1

    with ThreadPoolExecutor(clients) as pool:
        clients_at_work = [pool.submit(client, number) for number in range(clients)]
        try:
            yield
        finally:
            over.set()
        for done in clients_at_work:
            done.result()


def iterations_at(server, running, count):
    """Wait until so many more iterations have had exactly so many requests."""
    after = server.last_iteration()
    wait_for(lambda: sum(i.running == running for i in server.iterations(after)) >= count)


def first_within(server, cap, after):
    """Index of the first iteration after `after` that has no more than `cap` requests."""
    wait_for(lambda: any(i.running <= cap for i in server.iterations(after)))
    return next(i.index for i in server.iterations(after) if i.running <= cap)


# Without a server


@pytest.fixture(scope="module")
def asynchronous(launched_server, vllm_python, tmp_path_factory):
    """What async_scheduling.py prints; its iterations are (requests, blocks held, most drafts of one).

    It is done while the server starts.
    """
    done = subprocess.run(
        [
            vllm_python,
            ROOT / "tests" / "real_vllm" / "async_scheduling.py",
            vllm_python.parents[2] / "model",
            tmp_path_factory.mktemp("control"),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=START_S,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_a_version_that_it_does_not_know_is_refused(asynchronous):
    assert asynchronous["refusal"] == (
        "LiveScheduler does not know the scheduler of vLLM 0.33.1: it was tried with 0.32.0"
    )


def test_asynchronous_scheduling_keeps_its_own_scheduler(asynchronous):
    assert asynchronous["class"] == "LiveAsyncScheduler"
    for phase in ("start", "end"):
        assert max(running for running, _, _ in asynchronous["phases"][phase]) == 16
        assert max(drafts for _, _, drafts in asynchronous["phases"][phase]) == 4


def test_batch_cap_and_depth_hold_under_asynchronous_scheduling(asynchronous):
    capped = asynchronous["phases"]["cap"]
    running = [running for running, _, _ in capped]
    lowered = running.index(3)
    assert running[:lowered] == sorted(running[:lowered], reverse=True)
    assert set(running[lowered:]) == {3}
    assert max(drafts for _, _, drafts in capped[1:]) == 2  # the first verifies what was drafted before


def test_the_kv_budget_gates_admissions_under_asynchronous_scheduling(asynchronous):
    gated = asynchronous["phases"]["budget"]
    admitting = [now for before, now in itertools.pairwise(gated) if now[0] > before[0]]
    assert max(held for _, held, _ in admitting) == 16  # a quarter of 64 blocks
    assert max(running for running, _, _ in gated) == 8
    assert max(drafts for _, _, drafts in gated[1:]) == 0


# Start


def test_an_engine_answers_before_its_first_request(server):
    status = server.status()
    assert status.started == status.applied == STARTED
    assert (status.asked, status.not_applied, status.refused) == (EngineSettings(), {}, None)
    assert status.vllm_version == "0.32.0"
    os.kill(status.pid, 0)  # it is a process of now


# Batch cap


def test_the_batch_cap_holds_and_is_reached_while_load_goes_on(server):
    with load(server, clients=12, prompt_tokens=32, tokens=24):
        iterations_at(server, running=12, count=3)
        server.set(batch_cap=3)
        lowered = first_within(server, 3, server.last_iteration())
        iterations_at(server, running=3, count=15)
        under_3 = server.iterations(lowered - 1)
        server.set(batch_cap=7)
        raised = server.last_iteration()
        iterations_at(server, running=7, count=15)
        under_7 = server.iterations(raised)
        server.set()
        iterations_at(server, running=12, count=3)
    assert max(i.running for i in under_3) == 3
    assert max(i.running for i in under_7) == 7


def test_lowering_the_batch_cap_drains(server):
    preemptions = server.metric("num_preemptions_total")
    with load(server, clients=6, prompt_tokens=32, tokens=32):
        iterations_at(server, running=6, count=3)
        server.set(batch_cap=1)
        lowered = first_within(server, 1, server.last_iteration())
        iterations_at(server, running=1, count=5)
        assert {i.running for i in server.iterations(lowered - 1)} == {1}
        server.set()
    assert server.metric("num_preemptions_total") == preemptions


# KV budget and pressure


def test_the_kv_budget_gates_admissions(server):
    # 130 tokens and 28 more stay within 5 blocks: 3 requests fit into a quarter of 64 blocks, 12 into all.
    with load(server, clients=14, prompt_tokens=130, tokens=28):
        server.set(kv_budget_fraction=0.25, speculation_depth=0)
        gated = first_within(server, 3, server.last_iteration())
        iterations_at(server, running=3, count=15)
        under = server.iterations(gated - 1)
        server.set(speculation_depth=0)
        opened = server.last_iteration()
        wait_for(lambda: any(i.running >= 9 for i in server.iterations(opened)))
    assert max(i.running for i in under) == 3
    assert max(i.kv_percent for i in under) <= 25


def test_one_request_alone_may_outgrow_the_kv_budget(server):
    server.set(kv_budget_fraction=0.1)
    assert complete(server, prompt(20 * BLOCK_TOKENS, 0), 4) == 4


def test_running_requests_are_preempted_when_they_outgrow_the_cache_and_not_under_a_low_budget(server):
    # 5 blocks of prompt, 2 more of answer each: 12 requests ask for 84 blocks of 64.
    def all_served():
        with ThreadPoolExecutor(12) as pool:
            prompts = [prompt(5 * BLOCK_TOKENS - 4, seed) for seed in range(12)]
            return list(pool.map(lambda ids: complete(server, ids, 2 * BLOCK_TOKENS), prompts))

    before = server.metric("num_preemptions_total")
    for _ in range(TRIES):  # until they meet in the cache
        assert all_served() == 12 * [2 * BLOCK_TOKENS]
        pressed = server.metric("num_preemptions_total")
        if pressed > before:
            break
    assert pressed > before

    server.set(kv_budget_fraction=0.5)  # 6 are admitted at most, and 6 at their longest fit
    assert all_served() == 12 * [2 * BLOCK_TOKENS]
    assert server.metric("num_preemptions_total") == pressed


# Speculation


def drafted(server, depth):
    """Drafts and drafted tokens of some requests that have much to draft from."""
    server.set(speculation_depth=depth)
    names = ("spec_decode_num_drafts_total", "spec_decode_num_draft_tokens_total")
    before = [server.metric(name) for name in names]
    with ThreadPoolExecutor(3) as pool:
        sent = [pool.submit(complete, server, 12 * prompt(8, seed), 40) for seed in range(3)]
        assert [each.result() for each in sent] == 3 * [40]
    return [server.metric(name) - count for name, count in zip(names, before, strict=True)]


def test_speculation_keeps_to_its_depth(server):
    assert drafted(server, 0) == [0, 0]
    for depth in (4, 2, 1):
        drafts, tokens = drafted(server, depth)
        assert drafts > 0
        # An n-gram that is found near the end of the text has fewer tokens after it.
        assert (depth - 1) * drafts < tokens <= depth * drafts
    assert drafted(server, 0) == [0, 0]


# Settings that cannot be used


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"batch_cap": 0, "speculation_depth": 1}', "field 'batch_cap'"),
        ('{"batch_size": 2}', "field 'batch_size'"),
        ('{"batch_cap": 2', "expected a JSON object"),
    ],
    ids=["value", "field", "json"],
)
def test_bad_settings_are_refused_and_the_old_ones_stay(server, content, reason):
    server.set(batch_cap=2)
    temporary = server.control / "new"
    temporary.write_text(content)
    temporary.replace(server.control / "settings.json")
    wait_for(lambda: server.status().refused is not None)
    status = server.status()
    assert reason in status.refused
    assert (status.asked, status.applied.batch_cap) == (EngineSettings(batch_cap=2), 2)
    assert status.applied.speculation_depth == STARTED.speculation_depth
    wait_for(lambda: f"cannot be used: {status.refused}" in server.log())

    after = server.last_iteration()
    with load(server, clients=5, prompt_tokens=32, tokens=16):
        iterations_at(server, running=2, count=10)
    assert max(i.running for i in server.iterations(after)) == 2


def test_what_an_engine_cannot_do_is_told_by_field(server):
    status = server.set(batch_cap=100, speculation_depth=8)
    assert status.applied == STARTED
    assert set(status.not_applied) == {"batch_cap", "speculation_depth"}


def test_without_a_file_the_engine_runs_as_it_was_started(server):
    assert server.set(batch_cap=5).applied.batch_cap == 5
    (server.control / "settings.json").unlink()
    wait_for(lambda: server.status().applied == STARTED)
    assert server.status().asked == EngineSettings()


# Priorities


def test_priorities_order_the_queue(server):
    server.set(batch_cap=1)
    finished = []

    def send(name, priority):
        complete(server, prompt(32, name), 8, priority)
        finished.append(name)

    held = completion(prompt(32, "held"), 1900, stream=True)
    with ThreadPoolExecutor(4) as pool:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=held, timeout=STEP_S):
            wait_for(lambda: server.metric("num_requests_running") == 1)
            queued = []
            for name, priority in [("c", 9), ("d", 9), ("a", -1), ("b", 0)]:
                queued.append(pool.submit(send, name, priority))
                wait_for(lambda: server.metric("num_requests_waiting") == len(queued))
        for done in queued:
            done.result()
    assert finished == ["a", "b", "c", "d"]
