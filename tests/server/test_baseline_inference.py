"""Baselines: the reference agents here and over HTTP, a language model behind a real HTTP server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from live.endpoint_server import ChatEndpoint, Reply, chat, closed_url, serving

from llmserve_env.actions import to_action
from llmserve_env.agents import AGENTS, load_agent, play
from llmserve_env.agents.llm import LLMAgent
from llmserve_env.agents.llm_settings import LLMSettings
from llmserve_env.agents.prompt import Unusable, answer_schema, parse, prompt
from llmserve_env.episode import Episode, EpisodeBatch
from llmserve_env.errors import InputError
from llmserve_env.grading import grade
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import EVALUATION_SEEDS, load_task
from llmserve_env.tasks.catalog import task_info
from server.baseline_http import HttpSession
from server.baseline_inference import deterministic_suite, main, openai_suite

SEED = EVALUATION_SEEDS.start
TASK = load_task("trace_replay")
BRIEF = task_info(TASK)
CHOICE = {
    "batch_cap": 64,
    "kv_budget_fraction": 0.75,
    "speculation_depth": 2,
    "quantization_tier": "INT8",
    "priority_routing": True,
}
GOOD = json.dumps(CHOICE)
CHOSEN = ServeAction(**CHOICE)


def changed(**changes):
    return json.dumps({**CHOICE, **changes})


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch):
    for name in ("MODEL", "BASE_URL", "API_KEY"):
        monkeypatch.delenv(f"OPENAI_{name}", raising=False)


def asked(url, windows=1, **settings):
    """The actions of a model in its first windows, and the agent that asks it."""
    agent = LLMAgent(LLMSettings("m", url, **{"max_retries": 0, **settings}))
    with agent:
        batch = EpisodeBatch(TASK)
        observations = batch.reset([SEED])
        agent.reset(TASK, [SEED])
        actions = []
        for _ in range(windows):
            rows = agent.act(observations, batch.windows)
            observations = batch.step(rows).observations
            actions.append(to_action(rows[0]))
    return actions, agent


# Reference agents


def test_deterministic_results_are_the_same_each_time_and_what_agents_score(tmp_path):
    for name in ("a", "b"):
        command = ["--task", "static_workload", "trace_replay", "--episodes", "2"]
        assert main([*command, "--output", str(tmp_path / name)]) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    content = json.loads((tmp_path / "a").read_text())
    assert list(content["summary"]) == ["static_workload", "trace_replay"]
    scores = play(load_agent("reactive", TASK), TASK, [SEED, SEED + 1]).scores
    found = content["summary"]["trace_replay"]["reactive"]
    assert found["mean"] == pytest.approx(scores.mean())
    low, high = found["interval"]
    assert low <= found["mean"] <= high
    assert {entry["agent"] for entry in content["episodes"]} - {"ppo"} == set(AGENTS)


def test_the_trained_policy_plays_the_tasks_that_it_has_weights_for(ship):
    ship("static_workload")
    content = deterministic_suite(["trace_replay", "static_workload"], 1)
    played = {task: list(agents) for task, agents in content["summary"].items()}
    assert played == {"trace_replay": [*AGENTS], "static_workload": [*AGENTS, "ppo"]}
    task = load_task("static_workload")
    score = play(load_agent("ppo", task), task, [SEED]).scores[0]
    assert content["episodes"][-1]["score"] == min(score, 1.0)
    assert content["settings"]["not_played"].keys() == {"ppo"}
    assert "static_workload" not in content["settings"]["not_played"]["ppo"]
    assert "trace_replay" in content["settings"]["not_played"]["ppo"]


def test_the_suite_is_ready_for_json_and_tells_its_progress(ship):
    ship()
    told = []
    content = deterministic_suite(["trace_replay"], 1, lambda done, total, what: told.append((done, total)))
    assert content == json.loads(json.dumps(content, allow_nan=False))
    assert content["summary"]["trace_replay"]["defaults"]["interval"] is None  # of one episode
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


def test_the_table_is_printed(capsys, ship):
    ship("static_workload")
    assert main(["--task", "trace_replay", "--episodes", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["task", "agent", "episodes", "mean", "score", "95%", "interval"]
    assert [line.split()[1] for line in lines[1:-1]] == ["random", "defaults", "best-constant", "reactive"]
    assert lines[-1].startswith("not played: ppo, which has no weights for ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "nothing"], "task_id"),
        (["--episodes", "0"], "episodes"),
        (["--output", "/nowhere/results.json"], "no folder"),
        (["--mode", "openai"], "OPENAI_MODEL"),
        (["--mode", "openai", "--model", "m"], "OPENAI_API_KEY"),
        (["--mode", "openai", "--model", "m", "--endpoint", "http://h/v1", "--history", "0"], "history"),
        (["--runtime", "http", "--base-url", closed_url()], "base_url"),
    ],
)
def test_what_cannot_be_used_is_refused(capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_over_http_agents_score_what_they_score_here(server_url):
    session = HttpSession(server_url)
    over_http = deterministic_suite(["trace_replay"], 1, session=session)
    session.close()
    here = deterministic_suite(["trace_replay"], 1)
    assert over_http["settings"]["not_played"] == here["settings"]["not_played"]
    entries = {entry["agent"]: entry for entry in here["episodes"]}
    assert [entry["agent"] for entry in over_http["episodes"]] == list(entries)
    assert set(AGENTS) <= set(entries)
    for entry in over_http["episodes"]:
        assert entry["score"] == entries[entry["agent"]]["score"]
        assert entry["requests"] == entries[entry["agent"]]["requests"]
        assert entry["components"] == pytest.approx(entries[entry["agent"]]["components"])


def test_a_full_service_is_waited_for_as_it_says():
    calls, waits = [], []

    async def full(scope, receive, send):
        calls.append(scope["path"])
        headers = [(b"retry-after", b"7")]
        await send({"type": "http.response.start", "status": 429, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"detail": "full"}'})

    with serving(full) as url:
        session = HttpSession(url, sleep=waits.append)
        with pytest.raises(InputError, match=r"429.*full"):
            session.reset(task_id="trace_replay", seed=1)
        session.close()
    assert len(calls) == 5
    assert waits == [7.0] * 4


def test_another_service_is_told_apart():
    async def other(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'{"hello": "world"}'})

    with serving(other) as url:
        session = HttpSession(url)
        for call in (session.tasks, lambda: session.reset(task_id="trace_replay", seed=1)):
            with pytest.raises(InputError, match="expected"):
                call()
        session.close()


# What a model is asked


def test_the_schema_keeps_to_what_strict_mode_takes():
    schema = answer_schema(BRIEF)
    assert set(schema) == {"type", "properties", "required", "additionalProperties"}
    assert schema["required"] == list(schema["properties"]) == list(TASK.controls)
    assert schema["additionalProperties"] is False
    assert all(set(each) == {"type", "enum"} for each in schema["properties"].values())
    types = {name: each["type"] for name, each in schema["properties"].items()}
    assert types == {
        "batch_cap": "integer",
        "kv_budget_fraction": "number",
        "speculation_depth": "integer",
        "quantization_tier": "string",
        "priority_routing": "boolean",
    }


def test_a_call_says_what_is_needed_and_no_more():
    endpoint = ChatEndpoint(lambda index, body: chat(GOOD))
    with serving(endpoint) as url:
        actions, agent = asked(url, 6, history=2, temperature=0.5)
    assert actions == [CHOSEN] * 6
    body = endpoint.requests[-1]
    assert (body["model"], body["temperature"], body["seed"]) == ("m", 0.5, SEED % 2**31)
    assert body["max_completion_tokens"] == 512
    assert body["response_format"]["json_schema"]["strict"] is True
    assert body["response_format"]["json_schema"]["schema"] == answer_schema(BRIEF)
    system, user = (message["content"] for message in body["messages"])
    for tenant in TASK.tenants:
        assert f"{tenant.name}: {tenant.ttft_slo_s * 1e3:g} ms, {tenant.tpot_slo_s * 1e3:g} ms" in system
    assert user.count("queue_depth") == 2
    assert '"batch_cap":64' in user  # in force
    assert agent.usage.calls == 6
    assert (agent.usage.prompt_tokens, agent.usage.completion_tokens) == (600, 60)
    assert not agent.usage.fallbacks


def test_temperature_can_be_left_to_the_endpoint_and_tokens_uncounted():
    endpoint = ChatEndpoint(lambda index, body: chat(GOOD, usage=False))
    with serving(endpoint) as url:
        _, agent = asked(url, temperature=None)
    assert "temperature" not in endpoint.requests[0]
    assert (agent.usage.prompt_tokens, agent.usage.uncounted) == (0, 1)


def test_prompts_are_bounded_by_leaving_out_the_oldest_windows():
    episode = Episode(TASK)
    seen = [episode.reset(SEED), *(episode.step(CHOSEN) for _ in range(5))]

    def said(max_chars):
        return prompt(BRIEF, seen, CHOSEN, held_s=5.0, max_chars=max_chars)

    def size(messages):
        return sum(len(message["content"]) for message in messages)

    whole = said(100_000)
    shown = whole[1]["content"].count("queue_depth")
    assert shown == 6
    fewer = said(size(whole) - 1)
    assert fewer[1]["content"].count("queue_depth") == 5
    assert size(fewer) < size(whole)
    assert whole[1]["content"].splitlines()[-3] == fewer[1]["content"].splitlines()[-3]  # the newest
    with pytest.raises(InputError) as caught:
        said(1000)
    assert caught.value.field == "max_prompt_chars"


def test_a_model_is_shown_what_the_schema_shows():
    choices = [{**CHOICE, "quantization_tier": "FP16", "batch_cap": 8 << index % 3} for index in range(8)]
    endpoint = ChatEndpoint(lambda index, body: chat(json.dumps(choices[index])))
    with serving(endpoint) as url:
        asked(url, len(choices), history=3)
    episode = Episode(TASK)
    seen, in_force = [episode.reset(SEED)], TASK.start
    for choice, body in zip(choices, endpoint.requests, strict=True):
        told = prompt(BRIEF, seen[-3:], in_force, held_s=BRIEF.window_s, max_chars=12_000)
        assert body["messages"] == told
        in_force = ServeAction(**choice)
        seen.append(episode.step(in_force))
    assert seen[-1].reward > 0


def test_an_answer_holds_for_several_windows():
    endpoint = ChatEndpoint(lambda index, body: chat(changed(batch_cap=[8, 16, 32][index])))
    with serving(endpoint) as url:
        actions, _ = asked(url, 7, windows_per_call=3)
    assert [action.batch_cap for action in actions] == [8, 8, 8, 16, 16, 16, 32]
    assert "next 15 s" in endpoint.requests[0]["messages"][0]["content"]


def test_an_episode_begins_without_the_last_one():
    endpoint = ChatEndpoint(lambda index, body: chat(GOOD))
    with serving(endpoint) as url, LLMAgent(LLMSettings("m", url)) as agent:
        for seed in (SEED, SEED + 1):
            batch = EpisodeBatch(TASK)
            observations = batch.reset([seed])
            agent.reset(TASK, [seed])
            agent.act(observations, batch.windows)
    for body in endpoint.requests:
        assert body["messages"][1]["content"].count("queue_depth") == 1
        assert '"batch_cap":256' in body["messages"][1]["content"]  # what the task starts in
    assert [body["seed"] for body in endpoint.requests] == [SEED % 2**31, (SEED + 1) % 2**31]
    assert agent.usage.calls == 1


# Answers that cannot be used


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (chat(GOOD[:-9]), "not_json"),
        (chat("I would set batch_cap to 64."), "not_json"),
        (chat("[" * 100_000), "not_json"),
        (chat(GOOD[:-9], finish="length"), "truncated"),
        (chat(None, refusal="I cannot"), "refused"),
        (chat(None, finish="content_filter"), "refused"),
        (chat(None), "empty"),
        (chat("  "), "empty"),
        (chat("[]"), "not_in_schema"),
        (chat(changed(batch_cap=65)), "not_in_schema"),
        (chat(changed(batch_cap=10**400)), "not_in_schema"),
        (chat(changed(batch_cap=[64])), "not_in_schema"),
        (chat(changed(speculation_depth=True)), "not_in_schema"),
        (chat(changed(priority_routing=1)), "not_in_schema"),
        (chat(changed(quantization_tier="int8")), "not_in_schema"),
        (chat(changed(prefill_decode_split=True)), "not_in_schema"),
        (chat(json.dumps({"batch_cap": 64})), "not_in_schema"),
        (Reply("<html>busy</html>", headers={"content-type": "text/html"}), "malformed"),
        (Reply('{"choices": ['), "malformed"),
        (Reply([1]), "malformed"),
        (Reply({}), "malformed"),
        (Reply({"choices": []}), "malformed"),
        (Reply({"choices": ["text"]}), "malformed"),
        (Reply({"error": "bad"}, status=400), "rejected"),
        (Reply({"error": "busy"}, status=500), "server_error"),
        (Reply({"error": "busy"}, status=429), "rate_limited"),
        (Reply(None), "timeout"),
    ],
)
def test_an_unusable_answer_leaves_the_configuration_and_is_counted(reply, reason):
    endpoint = ChatEndpoint(lambda index, body: chat(GOOD) if index == 0 else reply)
    with serving(endpoint) as url:
        actions, agent = asked(url, 2, timeout_s=0.2 if reason == "timeout" else 60.0)
    assert actions == [CHOSEN, CHOSEN]
    assert agent.usage.fallbacks == {reason: 1}
    assert agent.usage.calls == len(agent.usage.latency_s) == 2


def test_numbers_may_be_written_in_either_way():
    assert parse(changed(batch_cap=64.0, kv_budget_fraction=1), BRIEF).kv_budget_fraction == 1.0
    with pytest.raises(Unusable):
        parse(changed(kv_budget_fraction=True), BRIEF)


def test_failures_are_tried_again_with_back_off():
    soon = {"retry-after": "0.01"}  # seconds; without it the client would wait half a second and more
    bad = [Reply("busy", 500, soon), Reply("slow down", 429, soon), Reply("busy", 503, soon)]
    endpoint = ChatEndpoint(lambda index, body: [*bad, chat(GOOD)][index])
    with serving(endpoint) as url:
        actions, agent = asked(url, max_retries=3)
    assert actions == [CHOSEN]
    assert (agent.usage.calls, agent.usage.retries, len(endpoint.requests)) == (1, 3, 4)
    assert not agent.usage.fallbacks


def test_retries_come_to_an_end_and_are_counted():
    endpoint = ChatEndpoint(lambda index, body: Reply("busy", 500, {"retry-after": "0.01"}))
    with serving(endpoint) as url:
        _, agent = asked(url, max_retries=2)
    assert (agent.usage.retries, len(endpoint.requests)) == (2, 3)
    assert agent.usage.fallbacks == {"server_error": 1}


def test_retry_after_is_read():
    endpoint = ChatEndpoint(lambda index, body: Reply("come tomorrow", 429, {"retry-after": "86400"}))
    with serving(endpoint) as url:
        _, agent = asked(url, max_retries=5)
    assert len(endpoint.requests) == 1  # nobody waits so long, and nobody asks sooner
    assert agent.usage.fallbacks == {"rate_limited": 1}


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_ends_the_run(status):
    with (
        serving(ChatEndpoint(lambda index, body: Reply({"error": {"message": "no such"}}, status))) as url,
        pytest.raises(InputError, match="no such"),
    ):
        asked(url)


def test_an_endpoint_that_does_not_answer_is_given_up():
    with pytest.raises(InputError, match=r"3 times in a row.*connection"):
        asked(closed_url(), 4)
    wrong = ChatEndpoint(lambda index, body: chat("no JSON"))
    with serving(wrong) as url:
        _, agent = asked(url, 5)  # it answers: what it says is the model's own result
    assert agent.usage.fallbacks == {"not_json": 5}


# The suite of a language model


def test_a_model_scores_what_its_configuration_scores(tmp_path):
    output = tmp_path / "results.json"
    endpoint = ChatEndpoint(lambda index, body: chat("?" if index % 4 == 3 else GOOD))
    with serving(endpoint) as url:
        secret = url.replace("//", "//user:word@")
        llm = LLMSettings("m", secret, api_key="sesame", windows_per_call=10)
        content = openai_suite(["trace_replay"], 1, llm=llm, output=output)
    assert content == json.loads(output.read_text())
    (entry,) = content["episodes"]
    episode = Episode(TASK)
    episode.reset(SEED)
    while not episode.done:
        episode.step(CHOSEN)
    assert entry["score"] == grade(episode.log()).score
    assert entry["llm"]["calls"] == 12
    assert entry["llm"]["fallbacks"] == {"not_json": 3}
    assert (entry["llm"]["prompt_tokens"], entry["llm"]["completion_tokens"]) == (1200, 120)
    assert entry["llm"]["latency_s"]["p50"] > 0
    assert content["settings"]["endpoint"] == url
    assert content["settings"]["model"] == "m"
    assert not any(word in output.read_text() for word in ("sesame", "user", "word@"))


def test_a_model_plays_over_http_too(server_url):
    with serving(ChatEndpoint(lambda index, body: chat(GOOD))) as url:
        llm, session = LLMSettings("m", url, windows_per_call=40), HttpSession(server_url)
        over_http = openai_suite(["trace_replay"], 1, llm=llm, session=session)
        session.close()
        here = openai_suite(["trace_replay"], 1, llm=llm)
    assert over_http["episodes"][0]["score"] == here["episodes"][0]["score"]
    assert over_http["episodes"][0]["llm"]["calls"] == 3
    assert over_http["settings"]["runtime"] == "http"


def test_a_rerun_goes_on_after_finished_episodes(tmp_path):
    output = tmp_path / "results.json"
    endpoint = ChatEndpoint(lambda index, body: chat(GOOD) if index != 3 else Reply({"error": {}}, 401))
    with serving(endpoint) as url:
        llm = LLMSettings("m", url, windows_per_call=60)
        with pytest.raises(InputError):
            openai_suite(["trace_replay"], 3, llm=llm, output=output)
        assert [entry["seed"] for entry in json.loads(output.read_text())["episodes"]] == [SEED]
        asked_before = len(endpoint.requests)
        content = openai_suite(["trace_replay"], 3, llm=llm, output=output)
        assert len(endpoint.requests) - asked_before == 4  # two episodes
        assert [entry["seed"] for entry in content["episodes"]] == [SEED, SEED + 1, SEED + 2]
        with pytest.raises(InputError) as caught:
            openai_suite(["trace_replay"], 3, llm=LLMSettings("other", url), output=output)
    assert caught.value.field == "model"
    assert len(json.loads(output.read_text())["episodes"]) == 3


def test_a_file_that_is_something_else_is_left_alone(tmp_path, capsys):
    for content in ("hello", "{}", '{"settings": {}, "episodes": [{}]}', '{"settings": {}, "episodes": 1}'):
        (tmp_path / "notes").write_text(content)
        assert main(["--task", "trace_replay", "--output", str(tmp_path / "notes")]) == 2
        assert (tmp_path / "notes").read_text() == content
        assert "Traceback" not in capsys.readouterr().err


def test_an_interrupt_keeps_finished_episodes(tmp_path):
    output = tmp_path / "results.json"
    second = threading.Event()

    def reply(index, body):
        if index == 1:
            second.set()
            return Reply(None)
        return chat(GOOD)

    with serving(ChatEndpoint(reply)) as url:
        command = ["-m", "server.baseline_inference", "--mode", "openai", "--endpoint", url, "--model", "m"]
        options = ["--task", "trace_replay", "--windows-per-call", "120", "--output", str(output)]
        playing = subprocess.Popen(
            [sys.executable, *command, *options, "--episodes", "2"],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OPENAI_API_KEY": "k"},
        )
        assert second.wait(60)
        playing.send_signal(signal.SIGINT)
        _, error = playing.communicate(timeout=60)
    assert playing.returncode == 130
    assert "finished episodes are in" in error
    assert "Traceback" not in error
    assert len(json.loads(output.read_text())["episodes"]) == 1


def test_the_report_says_what_fell_back(capsys):
    with serving(ChatEndpoint(lambda index, body: chat(GOOD if index else "?"))) as url:
        command = ["--mode", "openai", "--endpoint", url, "--model", "m", "--windows-per-call", "60"]
        assert main([*command, "--task", "trace_replay"]) == 0
    report = capsys.readouterr().out
    assert "2 calls, 0 retries, 200 prompt tokens, 20 completion tokens" in report
    assert "calls that left the configuration as it was: 1 not_json" in report
