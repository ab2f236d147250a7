"""`llmserve validate`: no error against the simulator itself, little against real engines, refusals."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from llmserve_env.cli import main
from llmserve_env.hardware import load_profile
from llmserve_env.schema import ServeAction
from llmserve_env.sim.simulator import Simulator
from llmserve_env.workloads import open_workload

PROFILE = "rtx4090-llama-3.1-8b"
START_S = 1000.0  # of the engine's clock
META = {
    "model": "meta-llama/Llama-3.1-8B",
    "engine_kwargs": {"max_num_seqs": 48, "max_num_batched_tokens": 1024, "tensor_parallel_size": 1},
    "kv_cache": {"num_gpu_blocks": 1001, "num_kv_tokens": 16016, "block_size": 16},
    "hardware": {"device_name": "NVIDIA GeForce RTX 4090"},
    "resolved_config": {"cache_config": {"enable_prefix_caching": False}},
}


def run_folder(folder, meta=META, recorded=True, **cell):
    """A run whose engine is the simulator, its requests in no order."""
    workload = open_workload("gamma://?rate=8&requests=150&shape=0.5")
    profile = load_profile(PROFILE)
    cell = {"kv_blocks": 1000, "max_num_batched_tokens": 1024, "prefix_cache": False, "batch_cap": 48, **cell}
    action = ServeAction(batch_cap=cell.pop("batch_cap"))
    outcomes = Simulator(profile, workload, action=action, **cell).serve_out()
    assert (outcomes.status == "completed").all()
    records = []
    for i in np.random.default_rng(0).permutation(len(workload)):
        queued = START_S + outcomes.arrival_s[i]
        record = {
            "request_id": f"bench-{i}",
            "input_toks": int(workload.prompt_tokens[i]),
            "output_toks": int(workload.output_tokens[i]),
            "queued_ts": queued,
            "first_token_ts": queued + outcomes.ttft_s[i],
            "last_token_ts": queued + outcomes.e2e_s[i],
        }
        records.append(record | {"num_preemptions": int(outcomes.preemptions[i])} if recorded else record)
    write(folder, records)
    if meta is not None:
        (folder / "meta.json").write_text(json.dumps(meta))
    return records, int(outcomes.preemptions.sum())


def write(folder, records):
    text = "".join(f"{json.dumps(record)}\n" for record in records)
    (folder / "requests.jsonl").write_text(text)


def validate(folder, *args, profile=PROFILE):
    return main(["validate", str(folder), "--profile", profile, "--json", str(folder / "report.json"), *args])


def report(folder):
    return json.loads((folder / "report.json").read_text())


def test_no_error_against_its_own_simulation(tmp_path, capsys):
    _, preemptions = run_folder(tmp_path)
    assert preemptions > 0
    assert validate(tmp_path, "--picture", str(tmp_path / "a.png")) == 0
    found = report(tmp_path)
    assert found["largest_error_percent"] < 1e-3
    assert abs(found["makespan"]["error_percent"]) < 1e-3
    assert found["preemptions"] == {"measured": preemptions, "simulated": preemptions}
    assert found["engine"] == {
        "max_num_seqs": 48,
        "max_num_batched_tokens": 1024,
        "kv_tokens": 16000,
        "prefix_cache": False,
    }
    assert not found["warnings"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    out, err = capsys.readouterr()
    assert "(within 3%)" in out
    assert "(within 8%)" in out
    assert not err


def test_figures_and_errors_are_what_they_say(tmp_path, capsys):
    records, _ = run_folder(tmp_path, recorded=False)
    for record in records:  # an engine twice as slow
        for name in ("first_token_ts", "last_token_ts"):
            record[name] += record[name] - record["queued_ts"]
    write(tmp_path, records)
    assert validate(tmp_path) == 0
    found = report(tmp_path)
    measured = {
        "ttft": [r["first_token_ts"] - r["queued_ts"] for r in records],
        "tpot": [
            (r["last_token_ts"] - r["first_token_ts"]) / (r["output_toks"] - 1)
            if r["output_toks"] > 1
            else math.nan
            for r in records
        ],
        "e2e": [r["last_token_ts"] - r["queued_ts"] for r in records],
    }
    for name, values in measured.items():
        expected = [np.nanmean(values), *np.nanpercentile(values, (50, 90, 99))]
        figures = found["latency"][name]
        np.testing.assert_allclose(
            [figures[s]["measured_s"] for s in ("mean", "p50", "p90", "p99")], expected
        )
        assert all(abs(figure["error_percent"] + 50) < 1e-3 for figure in figures.values())
    assert found["mean_error_percent"] == pytest.approx(50, abs=1e-3)
    assert found["preemptions"]["measured"] is None
    out = capsys.readouterr().out
    assert "not recorded" in out
    assert "(not within 3%)" in out
    assert "(not within 8%)" in out


def test_the_profile_speaks_where_there_is_no_meta(tmp_path):
    run_folder(tmp_path, None, kv_blocks=None, max_num_batched_tokens=None, prefix_cache=True, batch_cap=256)
    assert validate(tmp_path) == 0
    assert report(tmp_path)["largest_error_percent"] < 1e-3


def test_kv_tokens_where_blocks_are_not_recorded(tmp_path):
    run_folder(tmp_path, META | {"kv_cache": {"num_gpu_blocks": None, "num_kv_tokens": 16016}})
    assert validate(tmp_path) == 0
    assert report(tmp_path)["largest_error_percent"] < 1e-3


def test_other_hardware_is_a_warning(tmp_path, capsys):
    kwargs = META["engine_kwargs"] | {"tensor_parallel_size": 2, "max_num_seqs": 4096}
    run_folder(tmp_path, META | {"model": "meta-llama/Llama-3.1-70B", "engine_kwargs": kwargs}, batch_cap=512)
    assert validate(tmp_path, profile="h100-llama-3.1-8b") == 0
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("warning: the run has ") for line in lines)
    words = ("tensor_parallel_size 2", "Llama-3.1-70B", "GeForce RTX 4090", "max_num_seqs 4096")
    assert len(lines) == len(words) == len(report(tmp_path)["warnings"])
    assert all(word in line for word, line in zip(words, lines, strict=True))


def test_a_request_too_long_for_the_cache_is_told(tmp_path, capsys):
    run_folder(tmp_path, META | {"kv_cache": {"num_gpu_blocks": 101}})
    assert validate(tmp_path) == 0
    assert "the simulator could not complete" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("last_token_ts", None, "requests.jsonl:4: field 'last_token_ts': is missing"),
        ("first_token_ts", "soon", "requests.jsonl:4: field 'first_token_ts': expected seconds >= 0"),
        (
            "first_token_ts",
            1.0,
            "requests.jsonl:4: field 'first_token_ts': expected a time at or after queued_ts",
        ),
        ("last_token_ts", 2.0, "requests.jsonl:4: field 'last_token_ts': expected a time at or after first"),
        ("output_toks", 0, "requests.jsonl:4: field 'output_toks'"),
        ("num_preemptions", -1, "requests.jsonl:4: field 'num_preemptions'"),
        ("request_id", "bench-122", "field 'request_id': expected each name once, found 'bench-122' again"),
    ],
)
def test_a_broken_request_is_named(tmp_path, capsys, name, value, told):
    records, _ = run_folder(tmp_path)
    records[3][name] = value
    write(tmp_path, records)
    assert validate(tmp_path) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{\n"model": 1,\n}', "meta.json:3: not JSON"),
        ("[]", "meta.json: expected a JSON object"),
        ("", "meta.json: is empty"),
        ('{"model": 1}', "field 'model': expected a text, found 1"),
        ('{"engine_kwargs": [1]}', "field 'engine_kwargs': expected an object, found [1]"),
        (
            '{"engine_kwargs": {"max_num_seqs": "many"}}',
            "field 'engine_kwargs.max_num_seqs': expected a whole",
        ),
        ('{"engine_kwargs": {"max_num_seqs": 0}}', "field 'engine_kwargs.max_num_seqs': expected a whole"),
        ('{"kv_cache": {"block_size": 32}}', "field 'kv_cache.block_size': expected 16, found 32"),
        ('{"kv_cache": {"num_gpu_blocks": true}}', "field 'kv_cache.num_gpu_blocks'"),
        (
            '{"resolved_config": {"cache_config": {"enable_prefix_caching": "yes"}}}',
            "field 'resolved_config.cache_config.enable_prefix_caching': expected true or false",
        ),
    ],
)
def test_a_broken_meta_is_named(tmp_path, capsys, text, told):
    run_folder(tmp_path, None)
    (tmp_path / "meta.json").write_text(text)
    assert validate(tmp_path) == 2
    assert told in capsys.readouterr().err


def test_what_is_not_there(tmp_path, capsys):
    assert validate(tmp_path) == 2
    assert "requests.jsonl: cannot be read" in capsys.readouterr().err
    run_folder(tmp_path)
    assert validate(tmp_path, profile="gtx") == 2
    assert "unknown profile 'gtx'" in capsys.readouterr().err
    assert validate(tmp_path, "--picture", str(tmp_path / "a.gif")) == 2
    assert "png, svg, pdf" in capsys.readouterr().err


@pytest.mark.needs_shared
@pytest.mark.parametrize(
    ("profile", "sequences", "kv_tokens"),
    [("rtx4090-llama-3.1-8b", 256, 41_392), ("rtxpro6000-llama-3.1-8b", 128, None)],
)
def test_error_against_real_engines(shared_data, tmp_path, profile, sequences, kv_tokens):
    run = shared_data / "ground_truth" / "vllm_measured" / profile.replace("-llama", "_llama")
    path = tmp_path / "report.json"
    assert main(["validate", str(run), "--profile", profile, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["requests"] == 300
    assert not found["warnings"]
    assert found["engine"]["max_num_seqs"] == sequences
    assert kv_tokens is None or found["engine"]["kv_tokens"] == kv_tokens
    assert found["mean_error_percent"] <= 3.0
    assert found["largest_error_percent"] <= 8.0
