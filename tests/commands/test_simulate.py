"""`llmserve simulate`: a row a request, a summary that agrees with the rows, and refusals by name."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from llmserve_env.cli import main
from llmserve_env.commands.shared import serving
from llmserve_env.hardware import load_profile
from llmserve_env.hardware.memory import kv_blocks
from llmserve_env.schema import ServeAction
from llmserve_env.sim.simulator import Simulator
from llmserve_env.workloads import open_workload
from llmserve_env.workloads.workload import Tenant, Workload

PROFILE = "rtx4090-llama-3.1-8b"
HEADER = "request_id,tenant,arrival_s,prompt_tokens,output_tokens,ttft_s,tpot_s,e2e_s,preemptions,status"
BUSY = "poisson://?rate=6&duration=60&tenants=premium-standard&seed=3"


def simulate(folder, *args, profile=PROFILE, trace=BUSY):
    return main(
        ["simulate", "--trace", str(trace), "--profile", profile, "--out", str(folder / "out.csv"), *args]
    )


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert ",".join(rows[0]) == HEADER
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def cell(profile=PROFILE, blocks=None, **action):
    hardware = load_profile(profile)
    blocks = kv_blocks(hardware) if blocks is None else blocks
    return serving.Cell(hardware, ServeAction(**action), hardware.engine.max_num_batched_tokens, blocks)


# The file


def test_one_row_a_request_as_the_simulator_has_it(tmp_path, capsys):
    assert simulate(tmp_path) == 0
    assert "wrote" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [tmp_path / "out.csv"]
    rows = table(tmp_path / "out.csv")
    workload = open_workload(BUSY)
    profile = load_profile(PROFILE)
    alone = Simulator(
        profile, workload, action=ServeAction(batch_cap=profile.engine.max_num_seqs)
    ).serve_out()
    assert [row["request_id"] for row in rows] == [str(i) for i in range(len(workload))]
    assert [row["tenant"] for row in rows] == [workload.tenants[i].name for i in workload.tenant]
    assert [int(row["prompt_tokens"]) for row in rows] == workload.prompt_tokens.tolist()
    assert [int(row["output_tokens"]) for row in rows] == workload.output_tokens.tolist()
    assert [int(row["preemptions"]) for row in rows] == alone.preemptions.tolist()
    assert [row["status"] for row in rows] == alone.status.tolist()
    for name in ("arrival_s", "ttft_s", "tpot_s", "e2e_s"):
        written = [float(row[name]) if row[name] else math.nan for row in rows]
        np.testing.assert_allclose(written, getattr(alone, name), rtol=0, atol=1e-9)
    assert alone.preemptions.sum() > 0


def test_more_rows_than_one_chunk(tmp_path):
    assert simulate(tmp_path, trace="poisson://?requests=60000&lengths=fixed:20,2") == 0
    assert [row["request_id"] for row in table(tmp_path / "out.csv")] == [str(i) for i in range(60_000)]


def test_what_is_undefined_is_empty_and_names_are_kept(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "arrival_s,prompt_tokens,output_tokens,tenant,request_id\n"
        '0,100,10,"a, b",first\n'
        "0,5000,10,c,long\n"
        "1,100,1,c,one\n"
    )
    assert simulate(tmp_path, "--kv-tokens", "4096", trace=trace) == 0
    first, long, one = table(tmp_path / "out.csv")
    assert (first["request_id"], first["tenant"], first["status"]) == ("first", "a, b", "completed")
    assert (long["status"], long["ttft_s"], long["tpot_s"], long["e2e_s"]) == ("cancelled", "", "", "")
    assert (one["status"], one["tpot_s"]) == ("completed", "")
    assert float(one["ttft_s"]) == float(one["e2e_s"]) > 0


def test_it_is_a_trace_itself(tmp_path):
    assert simulate(tmp_path) == 0
    workload, again = open_workload(BUSY), open_workload(tmp_path / "out.csv")
    np.testing.assert_allclose(again.arrival_s, workload.arrival_s, rtol=0, atol=1e-9)
    assert again.prompt_tokens.tolist() == workload.prompt_tokens.tolist()
    assert [again.tenants[i].name for i in again.tenant] == [
        workload.tenants[i].name for i in workload.tenant
    ]


# The summary


def test_summary_is_conserved_and_agrees_with_the_rows(tmp_path, capsys):
    assert simulate(tmp_path, "--json", str(tmp_path / "out.json"), "--max-num-seqs", "16") == 0
    rows = table(tmp_path / "out.csv")
    found = json.loads((tmp_path / "out.json").read_text())
    count = found["requests"]
    assert count["total"] == len(rows) == count["completed"] + count["failed"] + count["cancelled"]
    assert count["failed"] > 0
    for status in ("completed", "failed", "cancelled"):
        assert count[status] == sum(row["status"] == status for row in rows)
    assert found["preemptions"] == sum(int(row["preemptions"]) for row in rows)
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        values = [float(row[name]) for row in rows if row[name]]
        expected = [np.mean(values), *np.percentile(values, (50, 90, 99))]
        np.testing.assert_allclose(
            [found[name][s] for s in ("mean", "p50", "p90", "p99")], expected, atol=1e-8
        )
    ended = [float(row["arrival_s"]) + float(row["e2e_s"]) for row in rows if row["e2e_s"]]
    assert found["duration_s"] == pytest.approx(max(ended) - float(rows[0]["arrival_s"]), abs=1e-6)
    assert found["requests_per_s"] == pytest.approx(count["completed"] / found["duration_s"])
    in_slo = 0
    for name, tenant in found["tenants"].items():
        own = [row for row in rows if row["tenant"] == name]
        kept = [
            row
            for row in own
            if row["e2e_s"]
            and float(row["ttft_s"]) <= tenant["ttft_slo_s"]
            and float(row["tpot_s"] or 0) <= tenant["tpot_slo_s"]
        ]
        assert (tenant["requests"], tenant["in_slo"]) == (len(own), len(kept))
        assert tenant["attainment"] == pytest.approx(len(kept) / len(own))
        in_slo += len(kept)
    assert found["goodput_per_s"] == pytest.approx(in_slo / found["duration_s"])
    emitted = sum(int(row["output_tokens"]) for row in rows if row["e2e_s"])
    assert found["output_tokens_per_s"] * found["duration_s"] == pytest.approx(emitted)
    assert 0 < found["kv_occupancy"]["mean"] <= found["kv_occupancy"]["peak"] <= 1
    assert 0 < found["busy_share"] <= 1
    assert found["cell"]["max_num_seqs"] == 16
    assert found["mean_running"] <= 16
    out = capsys.readouterr().out
    for label in (
        "TTFT",
        "TPOT",
        "E2E",
        "in SLO: premium",
        "throughput",
        "goodput",
        "KV occupancy",
        "prefix",
    ):
        assert label in out


def test_settings_reach_the_engines(tmp_path):
    args = (
        "--engines 3 --split --speculation-depth 2 --quantization-tier INT8 --priority-routing "
        "--no-prefix-cache --kv-budget-fraction 0.5 --kv-tokens 20000 --max-num-batched-tokens 1024 "
        "--max-num-seqs 64 --tp 1 --admission-rate 5.5"
    )
    assert simulate(tmp_path, *args.split(), "--json", str(tmp_path / "out.json")) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    given = {
        "engines": 3,
        "tensor_parallel_size": 1,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 1024,
        "kv_tokens": 20000,
        "kv_budget_fraction": 0.5,
        "quantization_tier": "INT8",
        "speculation_depth": 2,
        "prefill_decode_split": True,
        "priority_routing": True,
        "admission_rate": 5.5,
        "prefix_cache": False,
        "max_model_len": 131072,
    }
    assert found["cell"].items() >= given.items()
    assert found["speculation"]["drafted_tokens"] > 0
    assert found["prefix_cache"]["cached_tokens"] == 0


def test_more_sequences_run_than_an_agent_may_ask_for(tmp_path):
    crowd = "gamma://?rate=20000&requests=1500&lengths=fixed:20,200"
    for sequences in (512, 1024):
        args = ("--max-num-seqs", str(sequences), "--json", str(tmp_path / "out.json"))
        assert simulate(tmp_path, *args, profile="h100-llama-3.1-8b", trace=crowd) == 0
        found = json.loads((tmp_path / "out.json").read_text())
        assert found["cell"]["max_num_seqs"] == sequences
        assert sequences * 0.5 < found["mean_running"] <= sequences


def test_prompts_beyond_the_context_are_cancelled_and_answers_end_at_it(tmp_path, capsys):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,1000,9\n0,999,9\n0,990,500\n0,10,9\n")
    args = ("--max-model-len", "1000", "--json", str(tmp_path / "out.json"))
    assert simulate(tmp_path, *args, trace=trace) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    told = {
        name: found["requests"][name]
        for name in ("completed", "cancelled", "beyond_context", "cut_at_context")
    }
    assert told == {"completed": 3, "cancelled": 1, "beyond_context": 1, "cut_at_context": 2}
    assert found["output_tokens_per_s"] * found["duration_s"] == pytest.approx(1 + 10 + 9)
    assert "1 cancelled (prompt beyond the context of 1,000 tokens)" in capsys.readouterr().out
    assert simulate(tmp_path, "--max-model-len", str(10**30), trace=trace) == 0
    assert "4 of 4 completed" in capsys.readouterr().out


def test_a_trace_of_two_months_is_told_how_to_be_served(tmp_path, capsys):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,10,9\n5200000,10,9\n")
    assert simulate(tmp_path, trace=trace) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in (str(trace), "5,200,000 s", "duration=", "scale="))
    assert simulate(tmp_path, trace=f"trace://{trace}?scale=2") == 0


def test_prefix_hits_are_told(tmp_path):
    sessions = "sessions://?preset=mooncake-conversation&requests=200"
    assert (
        simulate(tmp_path, "--json", str(tmp_path / "out.json"), trace=sessions, profile="h200-llama-3.1-8b")
        == 0
    )
    found = json.loads((tmp_path / "out.json").read_text())["prefix_cache"]
    assert found["cached_tokens"] > 0
    share = found["cached_tokens"] / (found["cached_tokens"] + found["prefill_tokens"])
    assert found["hit_share"] == pytest.approx(share)


def test_a_smaller_kv_cache_at_any_precision(tmp_path):
    for tier in ("FP16", "INT4"):
        args = ("--quantization-tier", tier, "--kv-tokens", "8000", "--json", str(tmp_path / f"{tier}.json"))
        assert simulate(tmp_path, *args) == 0
        assert json.loads((tmp_path / f"{tier}.json").read_text())["preemptions"] > 0


def test_a_token_budget_down_to_the_sequences(tmp_path):
    assert simulate(tmp_path, "--max-num-seqs", "32", "--max-num-batched-tokens", "32") == 0


# Windows


@pytest.mark.parametrize(
    "served",
    [
        pytest.param((open_workload(BUSY), cell()), id="preempting"),
        pytest.param((open_workload(BUSY), cell(batch_cap=16, priority_routing=True)), id="giving up"),
        pytest.param(
            (open_workload("poisson://?rate=3&requests=150"), cell(speculation_depth=4)), id="drafting"
        ),
        pytest.param(
            (open_workload("onoff://?preset=code-completion&duration=300"), cell()), id="on and off"
        ),
        pytest.param(
            (Workload(np.zeros(50), [900] * 50, [200] * 50, [0] * 50), cell(blocks=500)), id="all at once"
        ),
        pytest.param(
            (Workload([0.0, 0.1], [1000, 7000], [50, 50], [0, 0]), cell(blocks=500, kv_budget_fraction=0.5)),
            id="never fits the share",
        ),
        pytest.param(
            (
                Workload([0.0, 0.1], [1000, 7000], [50, 50], [0, 0], (Tenant(patience_s=500.0),)),
                cell(blocks=500, kv_budget_fraction=0.5),
            ),
            id="waits in vain",
        ),
    ],
)
def test_windows_change_nothing(served):
    workload, engines = served
    once = Simulator(
        engines.profile, workload, action=engines.action, kv_blocks=engines.kv_blocks
    ).serve_out()
    for windows in (1, 37, 200):
        windowed = serving.serve(workload, engines, windows=windows)
        for name in ("arrival_s", "ttft_s", "tpot_s", "e2e_s", "preemptions", "status"):
            np.testing.assert_array_equal(getattr(windowed.outcomes, name), getattr(once, name))
        over = once.status == "completed"
        np.testing.assert_array_equal(windowed.outcomes.finish_s[over], once.finish_s[over])
        assert windowed.total("arrived") == len(workload)


# Refusals


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--tp", "4"), ("field 'tp'", "h100x4-llama-3.1-70b")),
        (("--tp", "3"), ("field 'tp'", "no shipped profile has 3")),
        (("--split",), ("field 'split'", "one engine")),
        (("--max-num-seqs", "2049"), ("field 'max_num_seqs'", "2048")),
        (("--max-num-seqs", "64", "--max-num-batched-tokens", "32"), ("field 'max_num_seqs'", "32 tokens")),
        (("--max-num-batched-tokens", "0"), ("field 'max_num_batched_tokens'",)),
        (("--kv-tokens", "15"), ("field 'kv_tokens'", "16")),
        (("--kv-budget-fraction", "2"), ("field 'kv_budget_fraction'",)),
        (("--speculation-depth", "-1"), ("field 'speculation_depth'",)),
        (("--engines", "0"), ("field 'engines'",)),
    ],
)
def test_settings_that_cannot_be(tmp_path, capsys, args, told):
    assert simulate(tmp_path, *args) == 2
    err = capsys.readouterr().err
    assert all(text in err for text in told)
    assert not list(tmp_path.iterdir())


def test_a_tier_that_the_profile_lacks(tmp_path, capsys):
    from llmserve_env.hardware.profile import save_profile

    profile = load_profile(PROFILE)
    tiers = profile.tiers.model_copy(update={"INT4": None})
    save_profile(profile.model_copy(update={"tiers": tiers}), tmp_path / "bf16.toml")
    assert simulate(tmp_path, "--quantization-tier", "INT4", profile=str(tmp_path / "bf16.toml")) == 2
    assert "no INT4 weights" in capsys.readouterr().err


def test_unknown_profile_and_missing_files(tmp_path, capsys):
    assert simulate(tmp_path, profile="gtx") == 2
    assert PROFILE in capsys.readouterr().err
    assert simulate(tmp_path, trace=tmp_path / "absent.csv") == 2
    assert "absent.csv: cannot be read" in capsys.readouterr().err
    assert simulate(tmp_path / "absent") == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_bad_row_is_named_or_skipped(tmp_path, capsys):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n1,-3,5\n2,10,5\n")
    assert simulate(tmp_path, trace=trace) == 2
    assert "trace.csv:3: field 'prompt_tokens'" in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()
    assert simulate(tmp_path, "--skip-bad-rows", trace=trace) == 0
    assert "1 bad rows skipped" in capsys.readouterr().out
    assert len(table(tmp_path / "out.csv")) == 2


def test_an_interrupt_leaves_no_file(tmp_path):
    class Interrupts:
        def __str__(self):
            raise KeyboardInterrupt

    served = serving.serve(open_workload("poisson://?requests=3"), cell())
    workload = replace(served.workload, request_ids=("0", "1", Interrupts()))
    with pytest.raises(KeyboardInterrupt):
        serving.write_requests(tmp_path / "out.csv", replace(served, workload=workload))
    assert not list(tmp_path.iterdir())


def test_the_trace_and_other_outputs_are_never_written_over(tmp_path, capsys):
    trace = tmp_path / "trace.csv"
    text = "arrival_s,prompt_tokens,output_tokens\n0,10,10\n"
    trace.write_text(text)
    common = ["simulate", "--profile", "h100-llama-3.1-8b"]
    for source in (str(trace), f"trace://{trace}?scale=2"):
        assert main([*common, "--trace", source, "--out", str(trace)]) == 2
        assert "trace itself" in capsys.readouterr().err
    out = str(tmp_path / "same")
    assert main([*common, "--trace", str(trace), "--out", out, "--json", out]) == 2
    assert main([*common, "--trace", str(trace), "--out", "/dev/null"]) == 2
    assert "regular file" in capsys.readouterr().err
    assert trace.read_text() == text
