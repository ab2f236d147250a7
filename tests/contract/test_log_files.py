"""Logs go through files unchanged, and a file that is none is refused by its name and field."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve_env import cli
from llmserve_env.errors import InputError
from llmserve_env.grading import grade, read_log, write_log
from llmserve_env.schema import EpisodeLog, ServeAction
from llmserve_env.tasks import load_task

from .episodes import anything, constant, played, short

LOG = played(short("static_workload", 5), 3, anything(np.random.default_rng(1), 5)).log()
SHIPPED = played(load_task("static_workload"), 2**31, constant(5)).log()
ARCHIVE = gzip.compress(b"{}", mtime=0)


@pytest.mark.parametrize("name", ["log.json", "log.json.gz"])
def test_a_log_is_read_as_it_was_written(tmp_path, name):
    path = tmp_path / name
    write_log(path, LOG)
    assert read_log(path) == LOG
    assert read_log(str(path)) == LOG
    first = path.read_bytes()
    assert first.startswith(b"\x1f\x8b") == name.endswith(".gz")
    write_log(path, LOG)
    assert path.read_bytes() == first
    assert [each.name for each in tmp_path.iterdir()] == [name]


@settings(max_examples=50)
@given(st.lists(st.floats(0, 300), min_size=1, max_size=20), st.integers(0, 2**63 - 1))
def test_numbers_go_through_json_bit_for_bit(tmp_path_factory, rewards, seed):
    path = tmp_path_factory.getbasetemp() / "numbers.json"
    log = LOG.model_copy(update={"rewards": rewards, "seed": seed, "score": rewards[0] / 7})
    write_log(path, log)
    assert read_log(path) == log
    assert EpisodeLog.model_validate_json(log.model_dump_json()) == log


def test_a_log_that_went_through_other_tools_still_grades(tmp_path):
    """Keys in another order, no line breaks, whole numbers without a point."""
    path = tmp_path / "log.json"
    table = SHIPPED.model_dump(mode="json")
    table["rewards"] = [int(reward) if reward == int(reward) else reward for reward in table["rewards"]]
    table["task"]["horizon_s"] = int(table["task"]["horizon_s"])
    path.write_text(json.dumps(table, sort_keys=True, separators=(",", ":")), encoding="utf-8")
    assert grade(read_log(path)) == grade(SHIPPED)
    assert not grade(read_log(path)).custom


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path, value):
    with pytest.raises(InputError, match=r"log\.json: .*not finite"):
        write_log(tmp_path / "log.json", LOG.model_copy(update={"rewards": [value] * 5}))
    assert not list(tmp_path.iterdir())


def test_a_log_is_not_written_where_it_cannot_be(tmp_path):
    with pytest.raises(InputError, match="absent"):
        write_log(tmp_path / "absent" / "log.json", LOG)


def _changed(**changes):
    return json.dumps({**LOG.model_dump(mode="json"), **changes}).encode()


def _action(**changes):
    return [ServeAction().model_dump(mode="json")] * 3 + [
        {**ServeAction().model_dump(mode="json"), **changes}
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "JSON"),
        (b"not json", "JSON.* line 1"),
        (b"\xff\xfe{}", "JSON"),
        (b"[]", "dictionary|object"),
        (b"{}", "field 'package_version'.*required"),
        (b"[" * 100_000, "JSON"),
        (_changed(format=2), "field 'format'"),
        (_changed(seed="x"), "field 'seed'"),
        (_changed(seed=0.5), "field 'seed'"),
        (_changed(actions=_action(batch_cap=0)), r"field 'actions\[3\].batch_cap'"),
        (_changed(actions=_action(kv_budget_fraction=None)), r"field 'actions\[3\].kv_budget_fraction'"),
        (_changed(actions=_action(quantization_tier="FP8")), r"field 'actions\[3\].quantization_tier'"),
        (_changed(actions=_action(gpu=1)), r"field 'actions\[3\].gpu'"),
        (_changed(rewards=[0.0, None]), r"field 'rewards\[1\]'"),
        (_changed(digests="abc"), "field 'digests'"),
        (_changed(digests=["a", 3]), r"field 'digests\[1\]'"),
        (_changed(task=[]), "field 'task'"),
        (_changed(bonus=1), "field 'bonus'"),
    ],
)
def test_a_file_that_is_no_log_is_refused(tmp_path, content, message):
    path = tmp_path / "log.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"log\.json: .*(?i:{message})"):
        read_log(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"{}", "cannot be read", id="no archive"),
        pytest.param(ARCHIVE[:-9], "cannot be read", id="without its end"),
        pytest.param(ARCHIVE[:12], "cannot be read", id="little more than a header"),
        pytest.param(b"", "JSON", id="empty"),
        pytest.param(ARCHIVE[:3] + b"\0" * 30, "cannot be read", id="zeros"),
        pytest.param(ARCHIVE, "field 'package_version'", id="an archive of no log"),
    ],
)
def test_a_broken_archive_is_refused(tmp_path, content, message):
    path = tmp_path / "log.json.gz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"log\.json\.gz: .*{message}"):
        read_log(path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    for path in (tmp_path / "log.json", tmp_path / "log.json.gz", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_log(path)


# llmserve grade


def test_the_command_tells_the_grade(tmp_path, capsys):
    path = tmp_path / "log.json.gz"
    write_log(path, SHIPPED)
    assert cli.main(["grade", str(path)]) == 0
    out = capsys.readouterr().out
    result = grade(SHIPPED)
    assert out.startswith(f"static_workload, evaluation seed {2**31}\n")
    assert "not the shipped task" not in out
    for text in (f"{result.score:.4f}", "goodput", "5, cut short", "in slo", "yes, by replay"):
        assert text in out


def test_the_command_says_what_is_not_the_shipped_task(tmp_path, capsys):
    path = tmp_path / "log.json"
    write_log(path, LOG)
    assert cli.main(["grade", str(path)]) == 0
    assert "not the shipped task of this name" in capsys.readouterr().out
    task = load_task("static_workload", horizon_s=5.0, id="my_own")
    write_log(path, played(task, 3, constant(5)).log())
    assert cli.main(["grade", str(path)]) == 0
    assert "not a shipped task" in capsys.readouterr().out


def test_the_command_says_that_a_live_log_is_not_verified(tmp_path, capsys):
    path = tmp_path / "log.json"
    write_log(path, SHIPPED.model_copy(update={"live": True}))
    assert cli.main(["grade", str(path)]) == 0
    assert "no: live" in capsys.readouterr().out


def test_the_command_refuses_a_forged_log(tmp_path, capsys):
    path = tmp_path / "log.json"
    write_log(path, LOG.model_copy(update={"score": 0.9}))
    assert cli.main(["grade", str(path)]) == 2
    streams = capsys.readouterr()
    assert not streams.out
    assert streams.err.startswith(f"llmserve: {path}: field 'score': expected ")


def test_the_command_reads_files_that_a_log_names_where_it_is_told_to(tmp_path, capsys):
    trace, path = tmp_path / "trace.csv", tmp_path / "log.json"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0.5,100,10\n", encoding="utf-8")
    write_log(path, played(short("trace_replay", 2, workload=str(trace)), 0, constant(2)).log())
    assert cli.main(["grade", str(path)]) == 2
    assert "may not name files" in capsys.readouterr().err
    assert cli.main(["grade", str(path), "--allow-files"]) == 0
