"""Whatever a file holds: a workload that can be served, or an error that names the file, and nothing else."""

from __future__ import annotations

import gzip
import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmserve_env.errors import InputError
from llmserve_env.workloads import load_lengths, open_reported
from llmserve_env.workloads.loaders import FORMATS
from llmserve_env.workloads.loaders.formats import LENGTH_FIELDS
from llmserve_env.workloads.uri import WorkloadURI

FIELDS = [known.fields for known in FORMATS] + list(LENGTH_FIELDS)
OTHERS = ["hash_ids", "input_tok_ids", "delay", "session_id", "sub_requests", "tenant", "type", "Log Type",
          "requests", "conversations", "errors", "chat_id", "metadata", "benchmarks"]  # fmt: skip
NUMBERS = st.one_of(
    st.integers(0, 4000),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=True),
    st.sampled_from([1.7e9, 1.7e12, 1.7e18, 0.5, 3000, 2**31, 2**63]),
)
VALUES = st.one_of(
    NUMBERS,
    st.none(),
    st.booleans(),
    st.text(max_size=5),
    st.lists(st.integers(-3, 9), max_size=4),
    st.dictionaries(st.sampled_from(["value", "a"]), st.integers(0, 9), max_size=2),
    st.sampled_from(["2024-05-10 00:00:00.5+00:00", "12", "1e9999", "[1, 2]", "{1: 2}"]),
)
PLAIN = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def nested(row: dict) -> dict:
    """A row whose dotted names are objects within objects."""
    found: dict = {}
    for name, value in row.items():
        *path, last = name.split(".")
        place = found
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                break
        if isinstance(place, dict):
            place[last] = value
    return found


@st.composite
def rows(draw):
    """Rows of one format, some values of which may be anything."""
    names = [
        *draw(st.sampled_from(FIELDS)),
        *draw(st.lists(st.sampled_from(OTHERS), max_size=2, unique=True)),
    ]
    good = st.integers(1, 4000)
    return [
        {name: draw(good if draw(st.integers(0, 9)) else VALUES) for name in names}
        for _ in range(draw(st.integers(0, 6)))
    ]


@st.composite
def texts(draw):
    found = draw(rows())
    kind = draw(st.sampled_from(["lines", "array", "indented", "columns", "wrapped", "csv", "tsv"]))
    if kind in {"csv", "tsv"}:
        names = list(found[0]) if found else ["a"]
        sign = {"csv": ",", "tsv": "\t"}[kind]
        cells = [names, *([str(row.get(name)) for name in names] for row in found)]
        text = "\n".join(sign.join(row) for row in cells)
    elif kind == "columns":
        names = list(found[0]) if found else ["a"]
        text = json.dumps({name: [row.get(name) for row in found] for name in names})
    elif kind == "wrapped":
        text = json.dumps({"benchmarks": [{"requests": {"successful": list(map(nested, found))}}]})
    elif kind == "lines":
        text = "\n".join(json.dumps(nested(row)) for row in found)
    else:
        text = json.dumps(list(map(nested, found)), indent=1 if kind == "indented" else None)
    if draw(st.integers(0, 4)) == 0 and text:
        cut = draw(st.integers(0, len(text)))
        text = text[:cut] + draw(st.text(max_size=3)) + text[cut + draw(st.integers(0, 3)) :]
    return text


QUERIES = st.fixed_dictionaries(
    {},
    optional={
        "time_unit": st.sampled_from(["s", "ms", "us", "ns"]),
        "block_tokens": st.sampled_from(["1", "16", "512"]),
        "jitter": st.sampled_from(["0", "3"]),
        "scale": st.sampled_from(["0.5", "2"]),
        "columns": st.sampled_from(
            ["arrival_s:timestamp,prompt_tokens:input_length,output_tokens:output_length,hash_ids:hash_ids",
             "arrival_s:arrival_s,prompt_tokens:prompt_tokens,output_tokens:prompt_tokens,token_ids:tenant"]
        ),
    },
)  # fmt: skip


def held(path, query, skip_bad_rows) -> None:
    """What opens is sound; what does not names the file or the parameter."""
    try:
        workload, report = open_reported(
            str(WorkloadURI("trace", str(path), query)), skip_bad_rows=skip_bad_rows
        )
    except InputError as error:
        named = str(path) in str(error) or error.field in {"columns", "block_tokens", "time_unit", "duration"}
        if not named:
            raise
        return
    assert report is not None
    assert len(workload) >= 1
    assert np.isfinite(workload.arrival_s).all()
    assert (workload.arrival_s >= 0).all()
    assert (np.diff(workload.arrival_s) >= 0).all()
    assert (workload.prompt_tokens >= 1).all()
    assert (workload.output_tokens >= 1).all()
    assert math.isfinite(report.span_s)
    assert report.rows == report.requests + report.failed_requests + report.bad_rows


@PLAIN
@given(text=texts(), query=QUERIES, skip_bad_rows=st.booleans())
def test_any_rows_are_read_or_refused(tmp_path_factory, text, query, skip_bad_rows):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_text(text, encoding="utf-8", errors="replace")
    held(path, query, skip_bad_rows)


@PLAIN
@given(data=st.binary(max_size=300), packed=st.booleans(), cut=st.integers(0, 20))
def test_any_bytes_are_read_or_refused(tmp_path_factory, data, packed, cut):
    path = tmp_path_factory.getbasetemp() / "bytes.txt"
    content = gzip.compress(data, mtime=0) if packed else data
    path.write_bytes(content[: len(content) - cut] if cut % 2 else content)
    held(path, {}, False)


@PLAIN
@given(text=texts(), skip_bad_rows=st.booleans())
def test_any_rows_are_lengths_or_refused(tmp_path_factory, text, skip_bad_rows):
    path = tmp_path_factory.getbasetemp() / "lengths.txt"
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        lengths = load_lengths(path, skip_bad_rows=skip_bad_rows)
    except InputError as error:
        if str(path) not in str(error):
            raise
        return
    assert len(lengths.prompt_tokens) == len(lengths.output_tokens) >= 1
    assert lengths.prompt_tokens.min() >= 1
    assert lengths.output_tokens.min() >= 1


@pytest.mark.parametrize("text", ["{" * 5000, "[" * 5000, '{"a":' * 5000, "\x1f,\x1f\n1,2\n", '"' * 400_000])
def test_what_is_deep_or_long_is_refused(tmp_path, text):
    path = tmp_path / "deep.txt"
    path.write_text(text)
    held(path, {}, False)
