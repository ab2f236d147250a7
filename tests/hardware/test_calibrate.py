"""Calibration finds a known law again, refuses broken tables by place, and makes the shipped profiles."""

from __future__ import annotations

import csv
import itertools
import json
import random

import numpy as np
import pytest

from llmserve_env.cli import main
from llmserve_env.errors import InputError
from llmserve_env.hardware import load_profile
from llmserve_env.hardware.assemble import assemble, gpus_named
from llmserve_env.hardware.calibrate import ASSUMED_SKEW, calibrate
from llmserve_env.hardware.latency import compile_latency, host_overhead_us, iteration_time
from llmserve_env.hardware.model_config import read_model
from llmserve_env.hardware.tables import read_tables

LAYERS = 4
CONFIG = {
    "num_hidden_layers": LAYERS,
    "hidden_size": 1024,
    "num_attention_heads": 8,
    "intermediate_size": 4096,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
LLAMA = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
TOKENS = (*range(1, 16), *range(16, 1025, 16))
CHUNKS, DECODES, CONTEXTS = (16, 64, 256, 1024), (1, 4, 16, 64), (16, 128, 512, 2048, 8192)
SKEW = 2.5

# The law, in us a layer.
DENSE = {
    "qkv_proj": lambda t: 20 + 0.2 * t,
    "layernorm": lambda t: 2 + 0.01 * t,
    "qk_norm": lambda t: 1 + 0.02 * t,
    "embedding": lambda t: 5 + 0.003 * t,
    "final_layernorm": lambda t: 3 + 0.005 * t,
}
HEAD = {"lm_head": lambda s: 200 + 0.5 * s, "sampler": lambda s: 10 + 0.1 * s}


def decode_us(n, kv):
    return 5 + 0.5 * n + 0.001 * n * kv


def prefill_us(chunk, kv):
    return 8 + 0.05 * chunk + 0.0001 * chunk * kv


def mixed_us(chunk, n, kv):
    return 1 + 0.001 * chunk + 0.0012 * n * kv


def dense_us(tokens):
    law = {name: time(tokens) for name, time in DENSE.items()}
    once = law["embedding"] + law["final_layernorm"]
    return LAYERS * (law["qkv_proj"] + 2 * law["layernorm"] + law["qk_norm"]) + once


def write(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture
def folder(tmp_path):
    """Tables of the law, with a fifth of the mixed and a few of the prefill measurements missing."""
    gaps = random.Random(0)
    dense = [(name, t, time(t)) for name, time in DENSE.items() for t in TOKENS]
    head = [(name, s, time(s)) for name, time in HEAD.items() for s in (1, 2, 8, 32, 64)]
    attention = [(0, 0, n, kv, decode_us(n, kv)) for n in DECODES for kv in CONTEXTS]
    for chunk, cached in itertools.product(CHUNKS, (0, *CONTEXTS)):
        alone = prefill_us(chunk, cached)
        if gaps.random() > 0.1 or (chunk, cached) in {(16, 0), (1024, 8192)}:
            attention.append((chunk, cached, 0, 0, alone))
        attention += [
            (chunk, cached, n, kv, alone + mixed_us(chunk, n, kv))
            for n in DECODES
            for kv in CONTEXTS
            if gaps.random() > 0.2
        ]
    skew = [
        ("mixed", n, chunk, kv, 3 * mean, 3 * longest, 3 * (mean + SKEW / n * (longest - mean)))
        for n in DECODES[1:]
        for chunk in (256, 1024)
        for kv in (512, 2048)
        for mean, longest in [(100 + 0.01 * kv * n, 100 + 0.03 * kv * n)]
    ]
    skew += [("pure", 4, 0, 512, 100, 200, 999), ("mixed", 4, 16, 512, 100, 200, 999)]
    folder = tmp_path / "kernels-of-a-law"
    folder.mkdir()
    write(folder / "dense.csv", ["layer", "tokens", "time_us"], dense)
    write(folder / "per_sequence.csv", ["layer", "sequences", "time_us"], head)
    axes = ["prefill_chunk", "kv_prefill", "n_decode", "kv_decode"]
    write(folder / "attention.csv", [*axes, "time_us"], attention)
    write(folder / "skew.csv", ["regime", "n", "pc", "kvs", "t_mean_us", "t_max_us", "t_skew_us"], skew)
    (folder / "meta.yaml").write_text("vllm_version: 0.19.0\ngpu: NVIDIA L40S\nengine:\n  gpu: not this\n")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return folder


def command(folder, *more):
    config, out = folder.parent / "config.json", folder.parent / "out.toml"
    words = [str(folder), "--model-config", str(config), "--name", "law", "--out", str(out), *more]
    return main(["calibrate", "kernels", *words]), out


def test_a_known_law_is_found_again(folder):
    result = calibrate(read_tables(folder), LAYERS, "a law")
    latency = result.latency
    dense = [dense_us(tokens) for tokens in latency.dense_tokens]
    assert latency.dense_us == pytest.approx(dense, rel=2e-3)
    assert latency.head_us == pytest.approx([210 + 0.6 * s for s in latency.head_sequences], rel=2e-3)
    law = [[LAYERS * decode_us(n, kv) for kv in latency.decode_kv_tokens] for n in latency.decode_sequences]
    np.testing.assert_allclose(latency.decode_us, law, rtol=2e-3)
    law = [
        [LAYERS * prefill_us(chunk, kv) for kv in latency.prefill_kv_tokens]
        for chunk in latency.prefill_chunk_tokens
    ]
    np.testing.assert_allclose(latency.prefill_us, law, rtol=2e-3)
    law = [
        [[LAYERS * mixed_us(chunk, n, kv) for kv in latency.mixed_kv_tokens] for n in latency.mixed_sequences]
        for chunk in latency.mixed_chunk_tokens
    ]
    np.testing.assert_allclose(latency.mixed_us, law, rtol=5e-3)
    assert latency.mixed_skew == pytest.approx(SKEW, rel=1e-3)
    assert max(error.p90_percent for error in result.regimes.values()) < 0.2
    assert any("qk_norm" in note for note in result.notes)


def test_the_command_writes_a_profile_that_times_iterations_by_the_law(folder, capsys):
    report = folder.parent / "report.json"
    status, out = command(folder, "--json", str(report))
    assert status == 0
    printed = capsys.readouterr().out
    assert "weighted by time" in printed
    regimes = json.loads(report.read_text())["regimes"]
    assert set(regimes) == {"dense", "head", "decode", "prefill", "mixed"}
    assert all(regime in printed for regime in regimes)
    profile = load_profile(out)
    assert profile.gpu.memory_bytes == 47_695_000_000
    assert "kernels-of-a-law" in profile.latency.source
    assert "vLLM 0.19.0" in profile.latency.source
    time = iteration_time(compile_latency(profile), 0, [(256, 512)], 10, 10 * 2048, 2048, 11)
    law = (
        dense_us(266) + 216.6 + LAYERS * (prefill_us(256, 512) + mixed_us(256, 10, 2048)) + host_overhead_us()
    )
    assert time == pytest.approx(1e-6 * law, rel=5e-3)


def test_more_gpus_need_a_link_and_pay_for_it(folder, capsys):
    status, out = command(folder, "--tp", "2")
    assert status == 2
    assert "--link-latency-us and --link-bandwidth-gbps" in capsys.readouterr().err
    assert not out.exists()
    status, out = command(folder, "--tp", "2", "--link-latency-us", "12", "--link-bandwidth-gbps", "20")
    assert status == 0
    arrays = compile_latency(load_profile(out))
    exchange = 2 * LAYERS * (12 + 100 * 1024 * 2 / 20e3)
    assert arrays.dense_s[0, 100] == pytest.approx(
        1e-6 * (dense_us(100) + exchange + host_overhead_us()), rel=2e-3
    )


def test_without_skew_the_assumption_is_noted(folder):
    (folder / "skew.csv").unlink()
    result = calibrate(read_tables(folder), LAYERS, "a law")
    assert result.latency.mixed_skew == ASSUMED_SKEW
    assert any("assumption" in note for note in result.notes)


def test_meta_yaml_may_lie_a_folder_up(folder):
    (folder / "meta.yaml").rename(folder.parent / "meta.yaml")
    assert read_tables(folder).meta["gpu"] == "NVIDIA L40S"


def test_without_a_known_gpu_its_memory_is_asked_for(folder, capsys):
    (folder / "meta.yaml").write_text("gpu: Abacus 1\n")
    assert command(folder)[0] == 2
    assert "unknown GPU 'Abacus 1'" in capsys.readouterr().err
    status, out = command(folder, "--gpu-memory-gb", "40")
    assert status == 0
    assert load_profile(out).gpu.memory_bytes == 40_000_000_000


@pytest.mark.parametrize(
    ("flag", "value", "field"),
    [
        ("--kv-blocks", "0", "kv_blocks"),
        ("--gpu-memory-gb", "-3", "memory_bytes"),
        ("--tp", "0", "tp"),
        ("--name", "", "name"),
    ],
)
def test_numbers_that_cannot_be_are_refused_by_name(folder, capsys, flag, value, field):
    assert command(folder, flag, value)[0] == 2
    assert f"field '{field}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kept", "regime"),
    [
        (lambda row: row["prefill_chunk"] != "0", "pure decode"),
        (lambda row: row["n_decode"] != "0", "pure prefill"),
        (lambda row: row["prefill_chunk"] == "0" or row["n_decode"] == "0", "a mixed batch"),
    ],
)
def test_a_missing_regime_is_named(folder, kept, regime):
    with (folder / "attention.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if kept(row)]
    write(folder / "attention.csv", rows[0].keys(), [row.values() for row in rows])
    with pytest.raises(InputError, match=rf"attention\.csv: field '\w+': {regime}"):
        calibrate(read_tables(folder), LAYERS, "a law")


@pytest.mark.parametrize("table", ["dense.csv", "per_sequence.csv", "attention.csv"])
def test_a_missing_table_is_named(folder, table):
    (folder / table).unlink()
    with pytest.raises(InputError, match=rf"{table}: cannot be read"):
        read_tables(folder)


@pytest.mark.parametrize("value", ["fast", "", "-1", "nan", "inf"])
def test_a_bad_time_is_named_by_line_and_column(folder, value):
    lines = (folder / "dense.csv").read_text().splitlines()
    lines[2] = f"qkv_proj,2,{value}"
    (folder / "dense.csv").write_text("\n".join(lines))
    with pytest.raises(
        InputError, match=r"dense\.csv:3: field 'time_us': expected a number >= 0, found"
    ) as caught:
        read_tables(folder)
    assert caught.value.line == 3


def test_a_missing_column_is_named(folder):
    text = (folder / "attention.csv").read_text()
    (folder / "attention.csv").write_text(text.replace("kv_decode", "context", 1))
    with pytest.raises(InputError, match=r"attention\.csv: field 'kv_decode': no such column"):
        read_tables(folder)


def test_model_figures_follow_from_the_shape(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    llama = read_model(path)
    assert llama.weight_bytes == 2 * 8_030_261_248  # the published parameter count of Llama-3.1-8B
    assert llama.kv_bytes_per_token == 131072
    path.write_text(json.dumps({"text_config": {**CONFIG, "tie_word_embeddings": True}}))
    nested = read_model(path)
    assert (nested.kv_heads, nested.head_dim) == (8, 128)
    untied = CONFIG["vocab_size"] * CONFIG["hidden_size"]
    path.write_text(json.dumps(CONFIG))
    assert read_model(path).weight_bytes - nested.weight_bytes == 2 * untied


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ],
)
def test_a_config_that_cannot_be_used_names_the_key(tmp_path, change, field):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(InputError) as caught:
        read_model(path)
    assert caught.value.field == field
    assert caught.value.file == str(path)


@pytest.mark.needs_shared
@pytest.mark.parametrize(
    ("name", "tables", "kv_blocks"),
    [
        ("rtx4090-llama-3.1-8b", "rtx4090_llama-3.1-8b_bf16_tp1", 2588),
        ("rtxpro6000-llama-3.1-8b", "rtxpro6000_llama-3.1-8b_bf16_tp1", None),
    ],
)
def test_the_real_tables_give_the_shipped_profile(name, tables, kv_blocks, shared_data, tmp_path):
    measured = read_tables(shared_data / "ground_truth" / "kernel_profiles" / tables)
    shipped = load_profile(name)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    model = read_model(tmp_path / "config.json", measured.meta["model"])
    result = calibrate(measured, model.layers, shipped.latency.source)
    again = assemble(name, result, model, gpus_named(measured.meta["gpu"], 1, None), kv_blocks=kv_blocks)
    assert again.gpu == shipped.gpu
    assert again.model == shipped.model
    assert again.engine == shipped.engine
    assert again.tiers.FP16 == shipped.tiers.FP16
    assert measured.origin in shipped.latency.source
    ours, theirs = again.latency.model_dump(), shipped.latency.model_dump()
    for field in theirs.keys() - {"fit_error", "source"}:
        np.testing.assert_allclose(
            np.ravel(ours[field]), np.ravel(theirs[field]), rtol=1e-4, atol=0.05, err_msg=field
        )
    worst = {"dense": (1, 5), "head": (1, 5), "decode": (3, 5), "prefill": (4, 10), "mixed": (8, 20)}
    for regime, (median, p90) in worst.items():
        assert result.regimes[regime].median_percent < median
        assert result.regimes[regime].p90_percent < p90
