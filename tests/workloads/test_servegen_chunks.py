"""ServeGen's folders become the tables that its generator reads."""

from __future__ import annotations

import json

import pytest

from llmserve_env.cli import main
from llmserve_env.errors import InputError
from llmserve_env.workloads import open_workload
from llmserve_env.workloads.generators.servegen_chunks import read_windows_of

CHUNKS = {
    "chunk-3-trace.csv": "0,2.0,1.5,Gamma,0.5,1.0\n600,0.0,,,,\n1200,1.0,1.0,Weibull,0.9,1.0\n",
    "chunk-10-trace.csv": "600,0.5,1.0,Gamma,1.0,2.0\n",
    "chunk-3-dataset.json": json.dumps(
        {
            "0": {"input_tokens": "{100: 0.5, 300: 0.5}", "output_tokens": "{10: 1.0}"},
            "1200": {"input_tokens": "{900: 1.0}", "output_tokens": "{20: 1.0}"},
        }
    ),
    "chunk-10-dataset.json": json.dumps({"600": {"input_tokens": "{7: 1.0}", "output_tokens": "{3: 1.0}"}}),
}


def folder(tmp_path, **changes):
    path = tmp_path / "language" / "m-own"
    path.mkdir(parents=True)
    for name, text in (CHUNKS | changes).items():
        (path / name).write_text(text)
    return path


def test_the_tables_are_read_by_the_generator(tmp_path, capsys):
    out, lengths = tmp_path / "clients.csv", tmp_path / "lengths.csv"
    assert main(["servegen", str(folder(tmp_path)), "--out", str(out), "--quantiles", str(lengths)]) == 0
    assert "2 clients, 3 windows" in capsys.readouterr().out
    assert out.read_text().splitlines()[1] == "3,0,2.0,1.5,Gamma,0.5,1.0"
    rows = [line.split(",") for line in lengths.read_text().splitlines()]
    # 1,200 of its 1,800 requests are of the first window, half of them with 100 tokens
    assert rows[1][:5] == ["language/m-own", "3", "1.50000", "input_tokens", "433.33"]
    assert rows[1][5:] == ["100", "300", "900", "900", "900"]
    workload = open_workload(f"servegen://{out}?quantiles={lengths}&seed=1&duration=1800")
    by_window = [int(((workload.arrival_s // 600) == window).sum()) for window in range(3)]
    assert by_window == pytest.approx([1200, 300, 600], rel=0.01)


@pytest.mark.parametrize(
    ("changes", "file", "told"),
    [
        ({"chunk-3-trace.csv": "0,2.0,1.5,Gamma\n"}, "chunk-3-trace.csv", "found 4 fields"),
        ({"chunk-3-trace.csv": "0,x,1.5,Gamma,1,1\n"}, "chunk-3-trace.csv", "found 'x'"),
        ({"chunk-3-trace.csv": "0,2,1,Pareto,1,1\n"}, "chunk-3-trace.csv:1", "expected Gamma or Weibull"),
        ({"chunk-3-trace.csv": "0,2,1,Gamma,0,1\n"}, "chunk-3-trace.csv:1", "expected a number > 0"),
        ({"chunk-3-dataset.json": "[]"}, "chunk-3-dataset.json", "expected a JSON object"),
        (
            {"chunk-3-dataset.json": '{"0": {"input_tokens": "open(1)", "output_tokens": "{}"}}'},
            "chunk-3-dataset.json",
            "expected shares by tokens",
        ),
    ],
)  # fmt: skip
def test_a_broken_chunk_is_named_and_nothing_is_written(tmp_path, capsys, changes, file, told):
    out = tmp_path / "out.csv"
    where = folder(tmp_path, **changes)
    assert main(["servegen", str(where), "--out", str(out), "--quantiles", str(tmp_path / "q.csv")]) == 2
    error = capsys.readouterr().err
    assert file in error
    assert told in error
    assert not out.exists()


def test_a_folder_without_chunks_is_said(tmp_path):
    with pytest.raises(InputError, match=r"expected chunk-N-trace\.csv files"):
        read_windows_of(tmp_path)
