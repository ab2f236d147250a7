"""Each public format, from a few invented rows."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import trace_samples

from llmserve_env.errors import InputError
from llmserve_env.workloads import load, load_lengths


def write(folder: Path, text: str) -> Path:
    path = folder / "trace"
    path.write_text(text)
    return path


def lengths(workload) -> list[tuple[int, int]]:
    return list(zip(workload.prompt_tokens.tolist(), workload.output_tokens.tolist(), strict=True))


@pytest.mark.parametrize(
    ("name", "form", "arrivals", "pairs"),
    [
        ("azure-2023", "Azure LLM inference CSV", [0, 0.7500001, 2.5], [(100, 10), (200, 20), (300, 30)]),
        ("azure-2024", "Azure LLM inference CSV", [0, 0.75, 2.5], [(100, 10), (200, 20), (300, 30)]),
        ("burstgpt", "BurstGPT CSV", [5, 118], [(100, 10), (300, 30)]),
        ("llmservingsim-tsv", "LLMServingSim TSV or JSONL", [0.5, 1.25], [(100, 10), (200, 20)]),
        ("llmservingsim-jsonl", "LLMServingSim TSV or JSONL", [0, 1.25, 2], [(40, 10), (36, 20), (16, 5)]),
        ("measured", "vLLM run JSONL", [0, 0.75], [(100, 10), (200, 20)]),
        ("plain", "plain CSV", [0.5, 1.25], [(100, 10), (200, 20)]),
        ("short", "plain CSV, short names", [0.5, 1.25], [(100, 10), (200, 20)]),
        ("vidur", "Vidur CSV", [0, 1.25], [(100, 10), (200, 20)]),
    ],
)
def test_rows_become_requests(tmp_path, name, form, arrivals, pairs):
    workload, report = load(write(tmp_path, trace_samples.TRACES[name]))
    assert report.format == form
    assert report.requests == len(workload) == len(pairs)
    np.testing.assert_allclose(workload.arrival_s, arrivals, rtol=0, atol=1e-12)
    assert lengths(workload) == pairs


@pytest.mark.parametrize("name", trace_samples.TRACES)
def test_packing_byte_order_mark_and_line_ends_change_nothing(tmp_path, name):
    text = trace_samples.TRACES[name]
    reference, report = load(write(tmp_path, text))
    variants = {
        "gzip": gzip.compress(text.encode(), mtime=0),
        "mark": b"\xef\xbb\xbf" + text.encode(),
        "crlf": text.replace("\n", "\r\n").encode(),
        "cr": text.replace("\n", "\r").encode(),
        "no last newline": text.rstrip("\n").encode(),
        "blank lines": text.replace("\n", "\n\n").encode() + b"\n \n",
    }
    for variant, data in variants.items():
        path = tmp_path / "variant.dat"
        path.write_bytes(data)
        workload, again = load(path)
        assert again == report, variant
        assert np.array_equal(workload.arrival_s, reference.arrival_s), variant
        assert lengths(workload) == lengths(reference), variant
        assert np.array_equal(workload.prefix_ids, reference.prefix_ids), variant


def test_burstgpt_drops_failed_requests_and_keeps_the_log_type(tmp_path):
    workload, report = load(write(tmp_path, trace_samples.BURSTGPT))
    assert (report.rows, report.requests, report.failed_requests, report.bad_rows) == (3, 2, 1, 0)
    assert [workload.tenants[i].name for i in workload.tenant] == ["Conversation log", "API log"]


def test_burstgpt_takes_further_columns(tmp_path):
    text = trace_samples.BURSTGPT.replace("Timestamp,", "Timestamp,Session ID,Elapsed time,").replace(
        "\n5,", "\n5,s,1.5,"
    )
    text = text.replace("\n45,", "\n45,s,1.5,").replace("\n118,", "\n118,s,1.5,")
    assert len(load(write(tmp_path, text))[0]) == 2


def test_mooncake_blocks_and_jitter(tmp_path):
    path = write(tmp_path, trace_samples.MOONCAKE)
    exact, _ = load(path, jitter_s=0)
    assert exact.arrival_s.tolist() == [0, 3, 6]
    assert exact.prefix_block_tokens == 512
    assert exact.prefix_offsets.tolist() == [0, 2, 5, 8]
    assert exact.prefix_ids.tolist() == [0, 1, 0, 2, 3, 0, 2, 4]
    spread, report = load(path)
    assert "arrivals spread uniformly over 3 s, their step: jitter=0 leaves them" in report.guesses
    late = spread.arrival_s - exact.arrival_s
    assert ((late > 0) & (late < 3)).all()
    assert np.array_equal(spread.arrival_s, load(path)[0].arrival_s)
    assert not np.array_equal(spread.arrival_s, load(path, seed=1)[0].arrival_s)


def test_spreading_keeps_a_request_and_its_prefix_together(tmp_path):
    rows = [
        f'{{"timestamp": {n % 2}, "input_length": {512 * n}, "output_length": {n}, "hash_ids": {[n] * n}}}'
        for n in range(1, 20)
    ]
    workload, _ = load(write(tmp_path, "\n".join(rows)), jitter_s=3)
    in_order = [*range(2, 20, 2), *range(1, 20, 2)]
    assert workload.output_tokens.tolist() != in_order, "the spread has not reordered them"
    for i, n in enumerate(workload.output_tokens):
        assert workload.prompt_tokens[i] == 512 * n
        assert (
            workload.prefix_ids[workload.prefix_offsets[i] : workload.prefix_offsets[i + 1]].tolist()
            == [n] * n
        )


def test_token_ids_become_chained_blocks_of_16(tmp_path):
    workload, _ = load(write(tmp_path, trace_samples.LLMSERVINGSIM_JSONL))
    assert workload.prefix_block_tokens == 16
    first, second, third = np.split(workload.prefix_ids, workload.prefix_offsets[1:-1])
    assert [len(first), len(second), len(third)] == [2, 2, 1], (
        "40, 36 and 16 tokens hold 2, 2 and 1 full blocks"
    )
    assert first[0] == second[0], "the same 16 tokens open both"
    assert first[1] != second[1], "they part in the second block"
    assert third[0] != first[1], "the same tokens at another depth are another block"


def test_plain_csv_names_tenants_and_requests(tmp_path):
    workload, _ = load(write(tmp_path, trace_samples.PLAIN))
    assert [workload.tenants[i].name for i in workload.tenant] == ["gold", "iron"]
    assert [workload.request_id(i) for i in range(2)] == ["a", "b"]


def test_measured_runs_keep_their_request_ids(tmp_path):
    workload, _ = load(write(tmp_path, trace_samples.MEASURED))
    assert workload.request_ids == ("r0", "r1")


def test_unsorted_arrivals_are_sorted_stably(tmp_path):
    rows = [f"{2 - n % 2},{n},1" for n in range(1, 101)]
    workload, report = load(write(tmp_path, "\n".join(["arrival_s,prompt_tokens,output_tokens", *rows])))
    assert workload.prompt_tokens.tolist() == [*range(1, 101, 2), *range(2, 101, 2)]
    assert report.notes == ("arrivals were out of order and have been sorted",)


def test_quoted_fields(tmp_path):
    text = 'arrival_s,prompt_tokens,output_tokens,tenant\n"0.5",100,10,"a, b"\n1,200,20,"c"\n'
    workload, _ = load(write(tmp_path, text))
    assert [tenant.name for tenant in workload.tenants] == ["a, b", "c"]


def test_lengths_from_a_table_and_from_a_trace(tmp_path):
    for text in (
        trace_samples.LENGTHS,
        "prompt_tokens,output_tokens\n100,10\n300,30\n",
        trace_samples.BURSTGPT,
    ):
        law = load_lengths(write(tmp_path, text))
        assert list(zip(law.prompt_tokens, law.output_tokens, strict=True)) == [(100, 10), (300, 30)]


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        (trace_samples.LENGTHS, "poisson://?lengths="),
        (trace_samples.SERVEGEN, "servegen://"),
        (trace_samples.SESSIONS, "agentic session"),
        ("a,b\n1,2\n", "columns=arrival_s:COLUMN,prompt_tokens:COLUMN,output_tokens:COLUMN"),
        ('{"a": 1}', "unknown format"),
    ],
)
def test_other_content_is_refused_with_advice(tmp_path, text, advice):
    with pytest.raises(InputError) as caught:
        load(write(tmp_path, text))
    assert advice in str(caught.value)
