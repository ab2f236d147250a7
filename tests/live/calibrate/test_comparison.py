"""One trace on a server and in the simulator."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llmserve_env.cli import main
from llmserve_env.hardware import load_profile
from llmserve_env.hardware.profile import Server, save_profile
from llmserve_env.live.calibrate.comparison import as_sent, of_answers, simulate
from llmserve_env.live.calibrate.load import Answer, Target, open_loop
from llmserve_env.schema import ServeAction
from llmserve_env.sim.simulator import Simulator
from llmserve_env.workloads import open_workload

from ..endpoint_server import CompletionEndpoint, closed_url, serving
from .test_calibration import LOG, VllmEndpoint

BASE = load_profile("rtx4090-llama-3.1-8b")
PROFILE = BASE.model_copy(
    update={
        "server": Server(request_us=2500.0, step_us=0.0, sequence_us=0.0, source="test"),
        "engine": BASE.engine.model_copy(update={"max_num_seqs": 16, "async_scheduling": False}),
    }
)


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_simulated_gaps_are_those_of_the_requests():
    """Every gap of every request, and no others: they add up to the times from first to last tokens."""
    workload = open_workload("gamma://?rate=9&duration=20&lengths=azure-conv&seed=3")
    served = simulate(PROFILE, workload)
    simulator = Simulator(PROFILE, workload, action=ServeAction(batch_cap=16))
    outcomes = simulator.serve_out()
    assert not outcomes.preemptions.any()
    np.testing.assert_allclose(served.ttft_s, outcomes.ttft_s + 0.0025)
    np.testing.assert_allclose(served.e2e_s, outcomes.e2e_s + 0.0025)
    assert len(served.itl_s) == (workload.output_tokens - 1).sum()
    assert served.itl_s.sum() == pytest.approx((outcomes.e2e_s - outcomes.ttft_s).sum(), rel=1e-6)
    assert served.itl_s.max() == pytest.approx(np.nanmax(outcomes.worst_gap_s), rel=0.02)
    assert served.output_tokens == workload.output_tokens.sum()


def test_what_clients_saw():
    whole = Answer(3, 3, 0.0, 1.0, [1.5, 1.6, 1.8])
    broken = Answer(3, 3, 0.0, 0.5, [0.9], "stream broken off")
    refused = Answer(3, 3, 0.0, 2.0, [], "HTTP 503")
    served = of_answers([whole, broken, refused])
    np.testing.assert_allclose(served.ttft_s, [0.4, 0.5, np.nan])  # in the order in which they were sent
    np.testing.assert_allclose(served.e2e_s, [np.nan, 0.8, np.nan])
    np.testing.assert_allclose(served.itl_s, [0.1, 0.2])
    assert served.span_s == pytest.approx(1.3)
    assert served.tokens_per_s == pytest.approx(3 / 1.3)


def test_the_simulator_gets_the_trace_as_it_was_sent():
    workload = open_workload("poisson://?rate=5&requests=3&lengths=fixed:8,4")
    workload.prompt_tokens[:] = [1, 2, 3]
    sent = as_sent(workload, [Answer(n, 4, 0.0, sent_s) for n, sent_s in ((1, 7.0), (2, 9.0), (3, 8.5))])
    assert sent.arrival_s.tolist() == [0.0, 1.5, 2.0]
    assert sent.prompt_tokens.tolist() == [1, 3, 2]


def test_requests_are_sent_as_the_trace_says():
    workload = open_workload("poisson://?rate=100&requests=30&lengths=azure-conv&seed=2")
    endpoint = CompletionEndpoint()
    with serving(endpoint) as url:
        answers = open_loop(Target(url, "tiny", (100, 200)), workload)
    lengths = list(zip(workload.prompt_tokens.tolist(), workload.output_tokens.tolist(), strict=True))
    asked = [(len(each["prompt"]), each["max_tokens"]) for each in endpoint.requests]
    assert sorted(asked) == sorted(lengths)
    assert [len(answer.token_s) for answer in answers] == workload.output_tokens.tolist()
    assert all(answer.due_s <= answer.sent_s for answer in answers)
    due_s = np.array([answer.due_s for answer in answers])
    np.testing.assert_allclose(due_s - due_s[0], workload.arrival_s - workload.arrival_s[0], atol=1e-9)


def test_the_last_token_may_be_no_text():
    def lines(body):
        return [
            '{"choices": [{"index": 0, "text": "a", "finish_reason": null}]}',
            '{"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}',
            "[DONE]",
        ]

    workload = open_workload("poisson://?rate=5&requests=1&lengths=fixed:8,2")
    with serving(CompletionEndpoint(lines)) as url:
        (answer,) = open_loop(Target(url, "tiny", (100, 200)), workload)
    assert len(answer.token_s) == 2


def run(tmp_path, *args):
    profile = tmp_path / "profile.toml"
    save_profile(PROFILE, profile)
    return main(["compare", "--profile", str(profile), *map(str, args)])


def test_the_command_tells_both_sides(tmp_path, capsys):
    report, picture = tmp_path / "report.json", tmp_path / "picture.png"
    trace = "poisson://?rate=100&requests=20&lengths=fixed:8,4"
    with serving(VllmEndpoint()) as url:
        assert run(tmp_path, "--url", url, "--trace", trace, "--json", report, "--picture", picture) == 0
    said = capsys.readouterr()
    assert "TTFT p50 (ms)" in said.out
    assert "the server has KV tokens 5,088" in said.err
    found = json.loads(report.read_text())
    assert found["requests"] == 20
    assert found["unanswered"] == {}
    assert found["iterations"] is None
    for figures in (*found["latency"]["e2e"].values(), found["tokens_per_s"]):
        expected = 100 * (figures["simulated"] / figures["measured"] - 1)
        assert figures["error_percent"] == pytest.approx(expected)
    assert picture.stat().st_size > 1000


def test_what_cannot_be_compared_is_named(tmp_path, capsys):
    def refused(*args):
        assert run(tmp_path, *args) == 2
        return capsys.readouterr().err

    short = "poisson://?rate=100&requests=3&lengths=fixed:8,4"
    assert "cannot be used" in refused("--url", closed_url(), "--trace", short)
    with serving(VllmEndpoint()) as url:
        long = "poisson://?rate=100&requests=3&lengths=fixed:3000,4"
        assert "3,004 tokens, the server takes 2,048" in refused("--url", url, "--trace", long)
        assert "no iteration was logged" in refused("--url", url, "--trace", short, "--iteration-log", LOG)
    refusing = VllmEndpoint()
    refusing.completions.refuse = lambda body: 503 if body.get("stream") else None
    with serving(refusing) as url:
        assert "HTTP 503" in refused("--url", url, "--trace", short)
