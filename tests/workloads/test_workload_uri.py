"""URIs: what they mean, and what is said of those that mean nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trace_samples
from hypothesis import given
from hypothesis import strategies as st

from llmserve_env.errors import InputError
from llmserve_env.workloads import open_reported, open_workload, parameters
from llmserve_env.workloads.description import BURSTY_CV, BURSTY_DISPERSION, SPARSE_SILENT_SHARE
from llmserve_env.workloads.loaders import FORMATS
from llmserve_env.workloads.presets import presets
from llmserve_env.workloads.sources import GENERATORS, GeneratorOptions, ScenarioOptions, TraceOptions
from llmserve_env.workloads.uri import WorkloadURI, parse_uri

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(path=TEXT, query=st.dictionaries(TEXT.filter(lambda name: "=" not in name), TEXT))
def test_written_and_read_again(path, query):
    uri = WorkloadURI("trace", path, query)
    again = parse_uri(str(uri))
    assert (again.path, dict(again.query)) == (path, query)


@pytest.mark.parametrize(
    "uri",
    [
        "gamma://",
        "gamma://?rate=8&shape=0.25&duration=60&seed=3&lengths=azure-conv&tenants=premium-standard",
        "mmpp://?preset=azure-conv&rate=3&duration=100",
        "poisson://?requests=10&lengths=fixed:512,128",
    ],
)
def test_source_opens_the_same_workload(uri):
    workload = open_workload(uri, seed=5)
    again = open_workload(workload.source)
    assert again.source == workload.source
    assert np.array_equal(again.arrival_s, workload.arrival_s)
    assert np.array_equal(again.prompt_tokens, workload.prompt_tokens)
    assert again.tenants == workload.tenants


@pytest.mark.parametrize("name", ["trace.csv", "a b&c=d?#%20é.csv"])
def test_source_of_a_trace_opens_it_again(tmp_path, name):
    path = tmp_path / name
    path.write_text(trace_samples.MOONCAKE)
    plain = open_workload(path)
    assert plain.source == str(path)
    assert np.array_equal(open_workload(plain.source).arrival_s, plain.arrival_s)
    scaled = open_workload(str(WorkloadURI("trace", str(path), {"scale": "2"})), seed=4)
    again = open_workload(scaled.source)
    assert np.array_equal(again.arrival_s, scaled.arrival_s)
    assert not np.array_equal(scaled.arrival_s, plain.arrival_s / 2), "seed 4 spreads otherwise than seed 0"


def test_trace_options(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(trace_samples.MOONCAKE)
    workload, report = open_reported(f"trace://{path}?scale=2&limit=2&jitter=0")
    assert workload.arrival_s.tolist() == [0, 1.5]
    assert workload.prefix_ids.tolist() == [0, 1, 0, 2, 3]
    assert report.requests == 3
    assert open_workload(f"trace://{path}?jitter=0&duration=3.5").arrival_s.tolist() == [0, 3]
    assert len(open_workload(f"trace://{path}?tenants=premium-standard").tenants) == 2


def test_skipping_reaches_the_file(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(trace_samples.SHORT + "x,1,1\n")
    with pytest.raises(InputError):
        open_workload(path)
    assert open_reported(path, skip_bad_rows=True)[1].bad_rows == 1


@pytest.mark.parametrize(
    ("uri", "field", "message"),
    [
        ("gama://", None, "unknown scheme 'gama': expected one of trace, poisson, gamma"),
        ("gamma://?shpe=1", "shpe", "expected one of rate, shape, duration, requests, seed, lengths"),
        ("gamma://?shape=0", "shape", "expected a number >= 0.01, found 0"),
        ("gamma://?shape=x", "shape", "expected a number >= 0.01, found 'x'"),
        ("gamma://?rate=nan", "rate", "expected a number > 0, found nan"),
        ("gamma://?rate=inf", "rate", "expected a number > 0, found inf"),
        ("gamma://?duration=-1", "duration", "expected a number > 0"),
        ("gamma://?requests=0", "requests", "expected a whole number >= 1"),
        ("gamma://?requests=1.5", "requests", "expected a whole number >= 1 and <= 100,000,000, found '1.5'"),
        ("gamma://?seed=-1", "seed", "expected a whole number >= 0"),
        ("gamma://?rate=1&rate=2", "rate", "is given twice"),
        ("gamma://?rate", "rate", "expected NAME=VALUE"),
        ("gamma://?rate=", "rate", "expected NAME=VALUE"),
        ("gamma://?preset=nobody", "preset", "expected one of azure-conv, burstgpt, found 'nobody'"),
        ("weibull://?preset=nobody", "preset", "weibull:// has none"),
        ("gamma://?lengths=nobody", "lengths", "expected azure-conv, mooncake-conversation"),
        ("gamma://?lengths=fixed:0,1", "lengths", "expected fixed:PROMPT,OUTPUT"),
        ("gamma://?lengths=absent.csv", None, "absent.csv: cannot be read"),
        ("gamma://?tenants=nobody", "tenants", "expected one of standard, premium-standard"),
        ("gamma://path", None, "takes no path"),
        ("gamma://?rate=0.000001&duration=1", "duration", "no request arrives in 1 s"),
        ("gamma://?duration=1e12", "duration", "at most 100,000,000 are drawn"),
        ("gamma://?requests=1000000000", "requests", "<= 100,000,000"),
        ("mmpp://?rates=1,2,3", "dwells", "expected one dwell time for each of 3 rates, found 2"),
        ("mmpp://?rates=0,0", "rates", "at least one rate > 0"),
        ("mmpp://?rates=1,x", "rates", "expected numbers >= 0, comma-separated, found '1,x'"),
        ("onoff://?on_min=9&on_max=8", "on_max", "expected a number >= on_min (9)"),
        ("servegen://", None, "servegen://FILE"),
        ("trace://", None, "trace://FILE"),
        ("trace://f?rate=1", "rate", "expected one of scale, limit, duration, jitter, time_unit"),
        ("trace://f?scale=0", "scale", "expected a number > 0"),
    ],
)
def test_what_cannot_be_meant_is_said(uri, field, message):
    with pytest.raises(InputError) as caught:
        open_workload(uri)
    assert caught.value.field == field
    assert message in str(caught.value)


PRESETS = [(scheme, name) for scheme, entries in presets("generators").items() for name in entries]


@pytest.mark.parametrize(("scheme", "name"), PRESETS)
def test_every_preset_opens_and_names_its_source(scheme, name):
    assert scheme in GENERATORS
    assert len(presets("generators")[scheme][name]["source"]) > 20
    assert len(open_workload(f"{scheme}://?preset={name}&requests=50")) == 50


def test_a_uri_goes_before_its_preset():
    slow = open_workload("gamma://?preset=azure-conv&rate=1&duration=2000&lengths=fixed:7,8")
    assert len(slow) == pytest.approx(2000, rel=0.1)
    assert set(slow.prompt_tokens) == {7}


DOCUMENTS = Path(__file__).resolve().parents[2] / "docs"
DOCUMENT = "".join((DOCUMENTS / page).read_text() for page in ("workloads.md", "presets.md"))


@pytest.mark.parametrize("cls", [*GENERATORS.values(), GeneratorOptions, TraceOptions, ScenarioOptions])
def test_the_documented_parameters_are_those_of_the_code(cls):
    for name, default, meaning in parameters.table(cls):
        assert f"| `{name}` | {default or '–'} | {meaning} |" in DOCUMENT


def test_the_document_names_every_preset_format_and_threshold():
    for kind in ("lengths", "tenants", "slos"):
        for name in presets(kind):
            assert f"`{name}`" in DOCUMENT
    for scheme, name in PRESETS:
        assert f"`{scheme}://?preset={name}`" in DOCUMENT
    for known in FORMATS:
        assert known.name in DOCUMENT
        assert all(f"`{field}`" in DOCUMENT for field in known.fields)
    for number in (SPARSE_SILENT_SHARE, BURSTY_CV, BURSTY_DISPERSION):
        assert f"{number:g}" in DOCUMENT


def test_importing_loads_no_heavy_library():
    code = (
        "import sys, llmserve_env.workloads as w; w.open_workload('gamma://?requests=5');"
        "heavy = {'scipy', 'matplotlib', 'pandas', 'numba', 'pydantic', 'tyro'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
