"""Broken traces: refused with file, line and field, or skipped and counted."""

from __future__ import annotations

import gzip
import json
from contextlib import suppress

import numpy as np
import pytest
import trace_samples
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve_env.errors import InputError
from llmserve_env.workloads import load, load_lengths
from llmserve_env.workloads.generators.servegen import read_client_lengths, read_windows

HEADER = "arrival_s,prompt_tokens,output_tokens\n"
GOOD = "1.0,10,10\n"


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ("x,10,10", "arrival_s", "expected seconds >= 0, found 'x'"),
        ("-1,10,10", "arrival_s", "expected seconds >= 0, found '-1'"),
        ("nan,10,10", "arrival_s", "expected seconds >= 0, found 'nan'"),
        ("inf,10,10", "arrival_s", "expected seconds >= 0, found 'inf'"),
        (",10,10", "arrival_s", "is missing"),
        ("1,0,10", "prompt_tokens", "expected a whole number of tokens >= 1, found '0'"),
        ("1,10,0", "output_tokens", "expected a whole number of tokens >= 1, found '0'"),
        ("1,1.5,10", "prompt_tokens", "expected a whole number of tokens >= 1, found '1.5'"),
        ("1,3000000000,10", "prompt_tokens", "expected a whole number of tokens >= 1, found '3000000000'"),
        ("1,10", "output_tokens", "is missing"),
        ("1,10,10,10", None, "has 4 fields, the header names 3"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, field, reason):
    path = tmp_path / "trace.csv"
    path.write_text(HEADER + GOOD + "\n" + row + "\n" + GOOD)
    with pytest.raises(InputError) as caught:
        load(path)
    assert (caught.value.file, caught.value.line, caught.value.field) == (str(path), 4, field)
    assert caught.value.reason == reason
    workload, report = load(path, skip_bad_rows=True)
    assert len(workload) == 2
    assert (report.rows, report.bad_rows, report.faults) == (3, 1, (str(caught.value),))


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ('{"timestamp": 1', None, "not JSON"),
        ("[1, 2]", None, "expected a JSON object"),
        ("[" * 100_000, None, "not usable JSON"),
        ('{"timestamp": "1", "input_length": 1, "output_length": 1}', "timestamp", "found '1'"),
        ('{"timestamp": true, "input_length": 1, "output_length": 1}', "timestamp", "found True"),
        ('{"timestamp": 1, "input_length": NaN, "output_length": 1}', "input_length", "found nan"),
        (
            '{"timestamp": 1, "input_length": 1' + "0" * 400 + ', "output_length": 1}',
            "input_length",
            "tokens >= 1",
        ),
        ('{"timestamp": 1, "output_length": 1}', "input_length", "is missing"),
        (
            '{"timestamp": 1, "input_length": 9, "output_length": 1, "hash_ids": [1, 2]}',
            "hash_ids",
            "has 2 blocks",
        ),
        (
            '{"timestamp": 1, "input_length": 9, "output_length": 1, "hash_ids": [1.5]}',
            "hash_ids",
            "integers",
        ),
        ('{"timestamp": 1, "input_length": 9, "output_length": 1, "hash_ids": "1"}', "hash_ids", "integers"),
    ],
)
def test_a_bad_line_of_json_is_named(tmp_path, row, field, reason):
    path = tmp_path / "trace.jsonl"
    good = json.dumps({"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": [7]})
    path.write_text(f"{good}\n{row}\n{good}\n")
    with pytest.raises(InputError) as caught:
        load(path)
    assert (caught.value.line, caught.value.field) == (2, field)
    assert reason in caught.value.reason
    workload, report = load(path, skip_bad_rows=True)
    assert (len(workload), report.bad_rows) == (2, 1)
    assert workload.prefix_ids.tolist() == [7, 7]


@pytest.mark.parametrize(
    "stamp",
    ["2023-02-30 00:00:00", "2023-01-01 24:00:00", "2023-01-01", "9999-01-01 00:00:00", "now", "", "1.5"],
)
def test_a_time_that_does_not_exist_is_refused(tmp_path, stamp):
    path = tmp_path / "azure.csv"
    path.write_text(trace_samples.AZURE_2023 + f"{stamp},1,1\n")
    with pytest.raises(InputError, match="expected a time such as") as caught:
        load(path)
    assert (caught.value.line, caught.value.field) == (5, "TIMESTAMP")


def test_token_ids_must_be_those_of_the_prompt(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"input_toks": 3, "output_toks": 1, "arrival_time_ns": 0, "input_tok_ids": [1, 2]}')
    with pytest.raises(InputError, match="has 2 token ids, the prompt 3 tokens"):
        load(path)


def test_the_first_fault_in_the_file_is_the_one_reported(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(HEADER + "1,10,0\n" + "x,10,10\n")
    with pytest.raises(InputError) as caught:
        load(path)
    assert caught.value.line == 2


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b",,\n,,\n", "holds no rows"),
        (HEADER.encode(), "holds no usable request"),
        (b"\x00\x01\x02", "NUL byte"),
        (b"\x89PNG\r\n\x1a\n", "expected UTF-8 text"),
        ("arrival_s,prompt_tokens".encode("utf-16"), "expected UTF-8 text"),
        (gzip.compress(HEADER.encode() * 1000, mtime=0)[:-9], "gzip"),
        (b"\x1f\x8bnothing", "gzip"),
        (b"\x1f\x8b", "gzip"),
    ],
    ids=[
        "nothing",
        "blank lines",
        "a byte order mark",
        "blank rows",
        "a header",
        "bytes",
        "an image",
        "another encoding",
        "an archive without its end",
        "an archive of nothing",
        "the start of an archive",
    ],
)
def test_a_file_without_a_trace_is_refused(tmp_path, data, reason):
    path = tmp_path / "trace"
    path.write_bytes(data)
    for skip_bad_rows in (False, True):
        with pytest.raises(InputError, match=reason) as caught:
            load(path, skip_bad_rows=skip_bad_rows)
        assert caught.value.file == str(path)


def test_paths_that_are_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "absent", "a\0b"):
        with pytest.raises(InputError, match="cannot be read"):
            load(path)


@pytest.mark.parametrize("jitter_s", [-1.0, float("nan"), float("inf")])
def test_a_bad_jitter_is_refused(tmp_path, jitter_s):
    with pytest.raises(InputError, match="jitter"):
        load(tmp_path / "any", jitter_s=jitter_s)


FILES = [
    *trace_samples.TRACES.values(),
    trace_samples.SESSIONS,
    trace_samples.LENGTHS,
    trace_samples.SERVEGEN,
]
PIECES = [
    "",
    ",",
    "\n",
    '"',
    "{",
    "}",
    "[",
    "null",
    "NaN",
    "-1",
    "0",
    "1e999",
    "9" * 30,
    "\x00",
    "\x1f",
    "é",
    "\t",
]


@st.composite
def corrupted(draw: st.DrawFn) -> bytes:
    data = draw(st.sampled_from([*FILES, trace_samples.QUANTILES])).encode()
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 12)))
        piece = draw(st.one_of(st.binary(max_size=4), st.sampled_from(PIECES).map(str.encode)))
        data = data[:start] + piece + data[end:]
    if draw(st.booleans()):
        data = gzip.compress(data, mtime=0)[: draw(st.integers(0, 400))]
    return data


@settings(max_examples=400)
@given(data=corrupted(), skip_bad_rows=st.booleans())
def test_corruption_is_refused_or_gives_a_valid_workload(tmp_path_factory, data, skip_bad_rows):
    path = tmp_path_factory.getbasetemp() / "corrupted"
    path.write_bytes(data)
    for read in (load_lengths, read_windows, lambda name: read_client_lengths(name, None)):
        with suppress(InputError):
            read(str(path))
    with suppress(InputError):
        workload, report = load(path, skip_bad_rows=skip_bad_rows)
        assert len(workload) == report.requests == report.rows - report.bad_rows - report.failed_requests > 0
        assert (np.diff(workload.arrival_s) >= 0).all()
        assert min(workload.prompt_tokens.min(), workload.output_tokens.min()) >= 1
        assert workload.prefix_offsets[-1] == len(workload.prefix_ids)
        assert skip_bad_rows or report.bad_rows == 0
