"""What is found out of a server before a run."""

from __future__ import annotations

import json
import re
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import httpx
import pytest

from llmserve_env.cli import main
from llmserve_env.live.servers.doctor import TOKENS, Diagnosis, controls, diagnose, note_clock
from llmserve_env.schema import ServeAction

from ..endpoint_server import Reply, closed_url, serving
from ..vllm_server import RecordedServer, metrics, recorded


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def found(answers=None, **given):
    server = RecordedServer(recorded() | (answers or {}))
    with serving(server) as url:
        return diagnose(url, **given), server


def check(diagnosis, name):
    (one,) = (each for each in diagnosis.checks if each.name == name)
    return one


def test_a_real_server_is_fine():
    diagnosis, server = found()
    assert not diagnosis.has("missing")
    assert not diagnosis.has("unreachable")
    assert diagnosis.version.startswith("0.32.0")
    assert diagnosis.models == {"tiny": 2048}
    assert diagnosis.scrape.kv_tokens == 160 * 32
    assert abs(diagnosis.clock_ahead_s) < 2
    assert check(diagnosis, "prefix caching").found == "on"
    assert check(diagnosis, "ignore_eos").status == "ok"
    assert check(diagnosis, "usage in streams").status == "ok"
    posts = [json.loads(body) for method, _, _, body in server.asked if method == "POST"]
    assert len(posts) == 1
    assert posts[0]["max_tokens"] == TOKENS
    assert posts[0]["model"] == "tiny"


def test_metrics_that_are_mounted_below_a_slash_are_found():
    moved = Reply("", 307, {"location": "/metrics/"})
    diagnosis, _ = found({"/metrics": moved, "/metrics/": Reply(metrics("0.32-idle"))})
    assert not diagnosis.has("missing")
    assert diagnosis.scrape.kv_tokens == 160 * 32


def test_every_field_of_an_action_has_its_ways():
    diagnosis, _ = found()
    ways = controls([diagnosis])
    assert [each.field for each in ways] == list(ServeAction.model_fields)
    here = {each.field: each.here for each in ways}
    assert here["batch_cap"] == here["speculation_depth"] == here["kv_budget_fraction"] == ""
    assert "a server for each pool" in here["quantization_tier"]
    assert {each.field: each.here for each in controls([diagnosis] * 2)}["quantization_tier"] == ""


def test_an_old_server_lacks_nothing_but_the_scheduler_class():
    answers = {"/version": Reply('{"version":"0.6.3.post1"}'), "/metrics": Reply(metrics("0.6"))}
    diagnosis, _ = found(answers)
    assert not diagnosis.has("missing")
    assert check(diagnosis, "version").status == "note"
    assert "gpu_cache_usage_perc" in check(diagnosis, "metric names").found
    assert "prefix_queried_tokens" in check(diagnosis, "metrics").found
    here = {each.field: each.here for each in controls([diagnosis])}
    assert "0.32.0 only" in here["batch_cap"]
    assert "no server speculates" in here["speculation_depth"]


def test_a_server_that_refuses_priorities_says_how_to_start_it():
    refusal = Reply('{"error":{"message":"Got priority 1 but Priority scheduling is not enabled."}}', 400)
    diagnosis, _ = found({"/v1/completions": refusal})
    assert check(diagnosis, "completion").status == "missing"
    assert "--scheduling-policy priority" in check(diagnosis, "completion").mend


@pytest.mark.parametrize(
    ("answers", "name", "says"),
    [
        ({"/metrics": Reply("no", 404)}, "metrics", "HTTP 404"),
        ({"/metrics": Reply("# nothing\n")}, "metrics", "metrics of vLLM"),
        ({"/metrics": Reply("vllm:num_requests_running 1\n")}, "metrics", "no waiting, kv_occupancy"),
        ({"/v1/models": Reply('{"error":"Unauthorized"}', 401)}, "models", "HTTP 401"),
        ({"/v1/models": Reply('{"data":[]}')}, "models", "none at /v1/models"),
        ({"/v1/models": Reply("[1]")}, "models", "none at /v1/models"),
        ({"/health": Reply("", 503)}, "up", "HTTP 503"),
        ({"/v1/completions": Reply('{"choices":[{"text":"a"}]}')}, "completion", "no stream"),
        (
            {"/v1/completions": Reply('data: {"error":{"message":"queue is full","code":503}}\n\n')},
            "completion",
            "queue is full",
        ),
        ({"/v1/completions": Reply(None)}, "completion", "no answer in time"),
    ],
)
def test_what_is_missing_is_named_with_a_cure(answers, name, says):
    diagnosis, _ = found(answers, timeout_s=3.0 if says == "no answer in time" else 60.0)
    missing = [each for each in diagnosis.checks if each.status == "missing"]
    assert [each.name for each in missing] == [name]
    assert says in missing[0].found
    assert missing[0].mend


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        ('data: {"choices":[{"text":"a"}]}\n\ndata: [DONE]\n\n', "usage in streams", "not told"),
        (
            'data: {"choices":[{"text":"a"}]}\n\n'
            'data: {"choices":[],"usage":{"completion_tokens":1}}\n\ndata: [DONE]\n\n',
            "ignore_eos",
            "1 of 3 tokens",
        ),
    ],
)
def test_what_a_run_can_do_without_is_noted(text, name, says):
    diagnosis, _ = found({"/v1/completions": Reply(text)})
    assert not diagnosis.has("missing")
    assert check(diagnosis, name).status == "note"
    assert says in check(diagnosis, name).found


def test_a_server_that_is_no_vllm_is_told():
    server = RecordedServer({"/health": Reply("ok")})
    with serving(server) as url:
        diagnosis = diagnose(url)
    assert check(diagnosis, "vLLM").status == "missing"
    assert [method for method, *_ in server.asked].count("POST") == 0


def test_a_clock_that_is_off_is_noted():
    then = format_datetime(datetime.now(timezone.utc) - timedelta(minutes=5), usegmt=True)
    diagnosis = Diagnosis("http://vllm")
    note_clock(diagnosis, httpx.Response(200, headers={"date": then}))
    assert check(diagnosis, "clock").status == "note"
    assert re.match(r"the server's is (299|300) s behind", check(diagnosis, "clock").found)
    note_clock(silent := Diagnosis("http://vllm"), httpx.Response(200))
    assert check(silent, "clock").found == "the server does not tell its time"


def test_the_command_prints_and_writes_what_it_found(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = RecordedServer()
    with serving(server) as url:
        assert main(["doctor", "--url", url, "--json", str(tmp_path / "d.json")]) == 0
    out = capsys.readouterr().out
    assert "one completion of 3 tokens" in out
    assert "vLLM 0.32.0" in out
    assert "quantization_tier" in out
    assert "secret" not in out
    assert {key for _, _, key, _ in server.asked} == {"Bearer secret"}
    content = json.loads((tmp_path / "d.json").read_text())
    assert content["status"] == 0
    assert content["servers"][0]["metrics"]["kv_occupancy"] == "vllm:kv_cache_usage_perc"
    assert [each["field"] for each in content["controls"]] == list(ServeAction.model_fields)


def test_the_worst_of_several_servers_is_the_exit_status(capsys):
    lacking = RecordedServer(recorded() | {"/metrics": Reply("no", 404)})
    with serving(RecordedServer()) as fine, serving(lacking) as poor:
        assert main(["doctor", "--url", fine, "--url", poor]) == 1
        assert "let /metrics through" in capsys.readouterr().out
        assert main(["doctor", "--url", poor, "--url", closed_url()]) == 2
    assert "unreachable" in capsys.readouterr().out


def test_a_server_that_is_not_there_has_no_table_of_controls(capsys):
    assert main(["doctor", "--url", closed_url().replace("http://", "http://user:word@")]) == 2
    out = capsys.readouterr().out
    assert "start the server" in out
    assert "word@" not in out
    assert "gateway" not in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--url", "vllm:8000"],
        ["--url", "http://a", "--timeout-s", "0"],
        ["--url", "http://a", "--json", "/no/x"],
    ],
)
def test_bad_arguments_are_refused(arguments, capsys):
    assert main(["doctor", *arguments]) == 2
    assert capsys.readouterr().err.startswith("llmserve: ")
