"""A profile of a running server: the log of its iterations, the fit, and what lies beside them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from llmserve_env.cli import main
from llmserve_env.errors import InputError
from llmserve_env.hardware import load_profile
from llmserve_env.hardware.iteration_fit import Iterations, fit_iterations, predicted_s, regimes
from llmserve_env.hardware.latency import compile_latency, iteration_time
from llmserve_env.hardware.memory import kv_blocks
from llmserve_env.hardware.model_config import read_model
from llmserve_env.live.calibrate import calibration
from llmserve_env.live.calibrate.calibration import EngineLimits, Phase, find_engine_limits, fit_profile
from llmserve_env.live.calibrate.iterations import read_iterations
from llmserve_env.live.calibrate.load import Answer, Load, Target, closed_loop

from ..endpoint_server import CompletionEndpoint, answer, closed_url, serving
from ..vllm_server import RecordedServer

LINE = (
    "Engine 000: Iteration({0}): {1} context requests, {2} context tokens, {3} generation requests, {3} "
    "generation tokens, iteration elapsed time: 1.00 ms, CPU KV cache usage: 2.0%\n"
)

LOG = Path(__file__).parent / "logs" / "vllm-0.32.log"
"""Of `scripts/vllm_cpu.sh serve FOLDER 8101 --enable-logging-iteration-details` on two CPU cores: its
settings, and 120 iterations while 1 client, then 16, asked for 64 tokens after prompts of 128."""

KV_TOKENS, BLOCK = 131072, 32
LIMITS = EngineLimits("tiny", 64, 2048, False, KV_TOKENS - BLOCK, BLOCK, 4096, False, "as given")

CONFIG = {
    "num_hidden_layers": 8,
    "hidden_size": 512,
    "vocab_size": 4096,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1408,
}


class VllmEndpoint:
    """What a recorded server tells, and completions of as many tokens as asked, one after the other."""

    def __init__(self, log=None):
        self.recorded, self.completions = RecordedServer(), CompletionEndpoint(lines=self.lines)
        self.log, self.logged = log, 0

    def lines(self, body):
        if self.log is not None:  # one request after the other, 1 ms an iteration
            kinds = [(1, len(body["prompt"]), 0), *[(0, 0, 1)] * (body["max_tokens"] - 1)]
            with self.log.open("a") as file:
                file.writelines(LINE.format(self.logged + i, *kind) for i, kind in enumerate(kinds))
            self.logged += len(kinds)
        return answer(body)

    async def __call__(self, scope, receive, send):
        async def paced(message):
            await send(message)
            await asyncio.sleep(0.002)

        if scope["path"] == "/v1/completions":
            await self.completions(scope, receive, paced)
        else:
            await self.recorded(scope, receive, send)


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


# ---------------------------------------------------------------------------------------- the recorded log


def test_the_log_of_a_real_server():
    found = read_iterations(LOG.read_text(), KV_TOKENS, BLOCK, "log")
    assert len(found) == 120
    many = np.flatnonzero(found.prefills > 1)[0]
    assert (found.prefills[many], found.prefill_tokens[many], found.decodes[many]) == (15, 1920, 1)
    assert found.elapsed_s[many] == pytest.approx(0.30471)
    # 16 sequences of 128 tokens and their answers; the usage is rounded to 131 tokens
    sixteen = found.decode_kv[many + 1 : many + 61]
    answered = np.arange(len(sixteen))
    assert np.abs(sixteen - 16 * (128 + answered)).max() < 16 * BLOCK
    assert (found.decode_kv[found.decodes == 0] == 0).all()


def test_contexts_are_those_that_an_iteration_begins_with():
    """The usage of a line leaves out what finished in it."""
    line = (
        "Engine 000: Iteration({}): 0 context requests, 0 context tokens, {} generation requests, {} "
        "generation tokens, iteration elapsed time: 5.00 ms, CPU KV cache usage: {}%"
    )
    text = "\n".join([line.format(7, 4, 4, 10.0), line.format(8, 4, 4, 5.0), line.format(9, 2, 2, 5.0)])
    found = read_iterations(text, 10_000, 1, "log")
    assert found.decode_kv.tolist() == [1000, 1000, 500]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("Iteration(", "Step("), "--enable-logging-iteration-details"),
        (lambda text: text.replace("Engine 000", "Engine 001", 1), "one engine"),
        (lambda text: text.replace(", CPU KV cache usage: 2.0%", ""), "usage"),
        (lambda text: text.replace("16 generation tokens", "48 generation tokens"), "speculation"),
    ],
)
def test_logs_that_cannot_be_used(change, message):
    with pytest.raises(InputError, match=message):
        read_iterations(change(LOG.read_text()), KV_TOKENS, BLOCK, "log")


# ------------------------------------------------------------------------------------------------- the fit


def compositions(rng, count):
    """Iterations of all kinds, their time left open."""
    kind = rng.integers(0, 3, count)  # decode, prefill, mixed
    prefills = np.where(kind > 0, rng.integers(1, 6, count), 0)
    prefill_tokens = prefills * rng.integers(8, 300, count)
    decodes = np.where(kind != 1, rng.integers(1, 65, count), 0)
    decode_kv = decodes * rng.integers(16, 1200, count)
    columns = (prefills, prefill_tokens, decodes, decode_kv)
    return Iterations(*(each.astype(float) for each in columns), np.zeros(count))


def true_us(of):
    """A machine: two slopes of dense time, and all the terms."""
    tokens = of.decodes + of.prefill_tokens
    prefill = of.prefill_tokens > 0
    chunk = of.prefill_tokens / np.maximum(of.prefills, 1)
    return (
        5000
        + 40 * np.minimum(tokens, 64)
        + 90 * np.maximum(tokens - 64, 0)
        + 25 * (of.decodes + of.prefills)
        + np.where(prefill, 1.1, 0.8) * of.decode_kv
        + prefill * (700 + 300 * of.prefills + 0.05 * of.prefill_tokens * chunk / 2)
    )


def timed(of, us):
    return Iterations(of.prefills, of.prefill_tokens, of.decodes, of.decode_kv, us * 1e-6)


def profile_of(latency, server=None):
    return load_profile("h100-llama-3.1-8b").model_copy(update={"latency": latency, "server": server})


def test_a_known_machine_is_recovered():
    rng = np.random.default_rng(1)
    fitted, judged = compositions(rng, 2000), compositions(rng, 500)
    latency = fit_iterations(timed(fitted, true_us(fitted)), 0.0, 0.0, "test")
    error = predicted_s(profile_of(latency), judged) / (1e-6 * true_us(judged)) - 1
    assert np.median(np.abs(error)) < 0.01
    assert np.abs(error).max() < 0.05


def test_noise_and_outliers_do_not_carry_the_fit_away():
    rng = np.random.default_rng(2)
    fitted, judged = compositions(rng, 3000), compositions(rng, 500)
    noise = np.exp(0.08 * rng.standard_normal(3000)) * np.where(rng.random(3000) < 0.02, 8.0, 1.0)
    latency = fit_iterations(timed(fitted, true_us(fitted) * noise), 0.0, 0.0, "test")
    found = regimes(timed(judged, true_us(judged)), predicted_s(profile_of(latency), judged))["all"]
    assert found.median_percent < 3
    assert abs(found.bias_percent) < 3


def test_too_few_iterations():
    few = compositions(np.random.default_rng(3), 99)
    with pytest.raises(InputError, match="too few"):
        fit_iterations(timed(few, true_us(few)), 0.0, 0.0, "test")
    decodes = compositions(np.random.default_rng(3), 900)
    decodes = decodes.take(decodes.prefill_tokens == 0)
    with pytest.raises(InputError, match="with a prefill"):
        fit_iterations(timed(decodes, true_us(decodes)), 0.0, 0.0, "test")


# ------------------------------------------------------------------------------ a whole calibration, made up


def played(load, count, *, step_us, sequence_us, request_us):
    """Clients in lockstep on the known machine, as its log and its clients tell it."""
    rng = np.random.default_rng(load.clients)
    rows, answers, now_us = [], [], 0.0
    for _ in range(count):
        prompt, output = int(rng.integers(*load.prompt_tokens)), int(rng.integers(*load.output_tokens))
        clients = load.clients
        each = [(clients, clients * prompt, 0, 0)]
        each += [(0, 0, clients, clients * (prompt + done)) for done in range(1, output)]
        part = Iterations(*np.array(each, float).T, np.zeros(output))
        us = true_us(part)
        between = step_us + sequence_us * (part.decodes + part.prefills)
        token_s = 1e-6 * (now_us + request_us + np.cumsum(us + between))
        answers += [Answer(prompt, output, 0.0, 1e-6 * now_us, token_s.tolist()) for _ in range(clients)]
        rows.append(timed(part, us))
        now_us = 1e6 * token_s[-1]
    return Phase(load, answers, Iterations.joined(rows))


def lockstep(clients, **given):
    return Load(clients=clients, prompt_tokens=(16, 300), output_tokens=(8, 40), **given)


def test_a_calibration_tells_engine_and_server_apart(config):
    beside = {"step_us": 900.0, "sequence_us": 40.0, "request_us": 3500.0}
    phases = [played(lockstep(clients), 40 if clients == 1 else 12, **beside) for clients in (1, 2, 8, 30)]
    fit = fit_profile(phases, LIMITS, read_model(config), "made-up", "none")
    server = fit.profile.server
    assert (server.step_us, server.sequence_us) == pytest.approx((900, 40), rel=0.01)
    assert server.request_us == pytest.approx(3500, rel=0.01)
    assert fit.regimes["all"].median_percent < 1
    assert fit.profile.latency.fit_error.decode.median_percent < 1
    # The engine's own period has what passes between two iterations, too.
    period_s = iteration_time(compile_latency(fit.profile), 0, [], 8, 8 * 100, 100, 8)
    one = Iterations(*np.array([[0, 0, 8, 800]], float).T, np.zeros(1))
    assert period_s == pytest.approx(1e-6 * (float(true_us(one)[0]) + 900 + 8 * 40), rel=0.02)


def test_without_a_log_the_clients_tell(config):
    beside = {"step_us": 500.0, "sequence_us": 10.0, "request_us": 0.0}
    phases = [played(lockstep(clients), 40, **beside) for clients in (1, 4, 16)]
    phases = [Phase(phase.load, phase.answers, None) for phase in phases]
    fit = fit_profile(phases, LIMITS, read_model(config), "made-up", "none")
    assert fit.profile.server is None
    assert fit.regimes["decode"].median_percent < 3
    assert fit.regimes["prefill"].median_percent < 3
    assert any("without an iteration log" in note for note in fit.profile.notes)


def test_the_engine_is_the_server_s(config):
    phases = [played(lockstep(4), 40, step_us=0.0, sequence_us=0.0, request_us=0.0)]
    profile = fit_profile(phases, LIMITS, read_model(config), "made-up", "none").profile
    assert kv_blocks(profile) * profile.engine.block_tokens == KV_TOKENS - BLOCK
    assert profile.engine.max_num_seqs == 64
    assert profile.engine.async_scheduling is False


def test_settings_come_from_the_log_and_the_server():
    with serving(VllmEndpoint()) as url:
        logged = find_engine_limits(url, LOG)
        assert (logged.max_num_seqs, logged.async_scheduling) == (64, False)
        assert logged.logged == ("max_num_seqs", "async")
        assert "max_num_batched_tokens: an assumption" in logged.told
        assert (logged.kv_tokens, logged.block_tokens) == (159 * 32, 32)
        assert logged.prefix_cache is True  # of this server
        given = find_engine_limits(url, LOG, max_num_seqs=7, max_num_batched_tokens=99, async_scheduling=True)
        assert (given.max_num_seqs, given.max_num_batched_tokens, given.async_scheduling) == (7, 99, True)
        with pytest.raises(InputError, match="expected one of tiny, found 'huge'"):
            find_engine_limits(url, model="huge")


def test_clients_send_again_when_they_are_answered():
    load = Load(clients=3, prompt_tokens=(4, 6), output_tokens=(2, 3))
    for time_s in (0.1, 1.0, 10.0):  # a busy machine may need longer until each client has sent again
        endpoint = CompletionEndpoint()
        with serving(endpoint) as url:
            answers = closed_loop(Target(url, "tiny", (100, 200)), load, time_s, seed=1)
        if len(answers) > 3:
            break
    assert endpoint.peak <= 3
    assert len(endpoint.requests) == len(answers) > 3
    for request in endpoint.requests:
        assert request["ignore_eos"] is True
        assert 2 <= request["max_tokens"] <= 3
        assert 4 <= len(request["prompt"]) <= 6
        assert all(100 <= token < 200 for token in request["prompt"])
    assert all(len(each.token_s) == each.output_tokens and not each.error for each in answers)


# --------------------------------------------------------------------------------------------- the command


def run(*args):
    return main(["calibrate", "live", *map(str, args)])


def test_the_command_writes_a_profile(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calibration, "_SETTLE_S", 0.0)
    plan = tmp_path / "plan.toml"
    load = "[[load]]\nclients = {}\nprompt_tokens = [8, 64]\noutput_tokens = [8, 16]\n"
    plan.write_text("".join(load.format(clients) for clients in (1, 2, 8)))
    monkeypatch.setattr(calibration, "_PLAN", plan)
    out, report, picture = tmp_path / "tiny.toml", tmp_path / "fit.json", tmp_path / "fit.png"
    log = tmp_path / "vllm.log"
    log.write_text("'max_num_seqs': 64, device_config=cpu\n")
    with serving(VllmEndpoint(log)) as url:
        command = (
            "--url",
            url,
            "--model-config",
            config,
            "--out",
            out,
            "--json",
            report,
            "--picture",
            picture,
        )
        assert run(*command, "--minutes", 0.02, "--iteration-log", log) == 0
    profile = load_profile(out)
    assert profile.name == "tiny"
    assert "vLLM's log" in profile.latency.source
    assert profile.server.step_us > 0  # the endpoint takes twice as long as it logs
    assert profile.engine.max_num_seqs == 64
    assert json.loads(report.read_text())["regimes"]["decode"]["median_percent"] < 1
    assert "median error %" in capsys.readouterr().out
    assert picture.stat().st_size > 1000


def test_what_cannot_be_used_is_named(config, tmp_path, capsys):
    out = tmp_path / "out.toml"

    def refused(*args, url=None):
        assert run("--url", url or closed_url(), "--out", out, "--minutes", 0.01, *args) == 2
        return capsys.readouterr().err

    assert "missing.json" in refused("--model-config", tmp_path / "missing.json")
    assert "cannot be used" in refused("--model-config", config)
    with serving(VllmEndpoint()) as url:
        silent = tmp_path / "silent.log"
        silent.write_text("nothing\n")
        said = refused("--model-config", config, "--iteration-log", silent, url=url)
        assert "no iteration was logged" in said
        missing = tmp_path / "missing.log"
        assert "missing.log" in refused("--model-config", config, "--iteration-log", missing, url=url)
    assert not out.exists()


def test_the_shipped_plan_has_single_clients_and_large_batches():
    clients = [load.clients for load in calibration.shipped_plan()]
    assert clients.count(1) >= 2
    assert max(clients) == 64
