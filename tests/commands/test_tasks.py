"""`llmserve tasks` tells what a task's file says, and draws it."""

from __future__ import annotations

import pytest

from llmserve_env.cli import main
from llmserve_env.tasks import list_tasks, load_task

MINE = """
id = "mine"
title = "Two tenants"
difficulty = "hard"
description = "For these tests."
window_s = 5.0
horizon_s = 60.0
max_in_flight = 777

[cell]
profile = "rtxpro6000-llama-3.1-8b"
engines = 3
prefill_engines = 2

[controls]
batch_cap = [8, 64, 512]
quantization_tier = ["FP16", "INT8"]

[workload]
order = "cycle"

[workload.tenants.chat]
slo = "mlperf-llama-3.1-8b-interactive"
weight = 2.5
patience_s = 11.0
shape = 0.87

[workload.tenants.agents]
slo = "mooncake"
priority = 4
speculation_class = "ngram"
lengths = "sharegpt"
sessions = { turns = 6, think = 5 }

[[workload.regimes]]
name = "calm"
dwell_s = [20, 31]
rates = { chat = 1.25 }

[[workload.regimes]]
name = "rush"
dwell_s = [20, 32]
rates = { chat = 2.0, agents = 3.5 }
spikes = { every_s = 10, length_s = 2, factor = 4 }

[reward]
goodput = 0.61
latency = 0.12
memory = 0.04
cost = 0.03
quality = 0.2
acceptable_quality = 0.96
"""
URI = (
    MINE[: MINE.index("[workload]")].replace("[cell]", 'workload = "{}"\n[cell]')
    + MINE[MINE.index("[reward]") :]
)


@pytest.fixture
def told(tmp_path, capsys):
    """What the command prints of a task with this text, a line with its spaces made single."""

    def tell(text, *arguments):
        path = tmp_path / "mine.toml"
        path.write_text(text, encoding="utf-8")
        assert main(["tasks", str(path), *arguments]) == 0
        return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    return tell


def test_list_has_every_task(capsys):
    assert main(["tasks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in list_tasks():
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        task = load_task(name)
        for text in (task.title, task.difficulty, f"{task.cell.engines} x {task.cell.profile}"):
            assert text in line


@pytest.mark.parametrize("name", list_tasks())
def test_a_shipped_task_names_its_tenants_controls_and_regimes(name, capsys):
    assert main(["tasks", name]) == 0
    out = capsys.readouterr().out
    task = load_task(name)
    named = [tenant.name for tenant in task.tenants] + list(task.controls)
    if task.scenario is not None:
        named += [regime.name for regime in task.scenario.regimes]
    assert all(f"\n{each} " in out for each in named)
    assert ("REGIMES" in out) == (task.scenario is not None)


def test_everything_in_the_file_is_told(told):
    lines = told(MINE)
    for line in (
        "For these tests.",
        "task Two tenants",
        "difficulty hard",
        "window 5 s between two actions",
        "ends after 60 s, 12 windows, or more than 777 requests in flight at a window's end",
        "configurations 3 x 1 x 1 x 2 x 1 x 1 x 1 = 6",
        "engines 3 behind one router",
        "profile of each rtxpro6000-llama-3.1-8b",
        "when split 2 prefill, 1 decode",
        "FP16 16.1 568,224 49.9 1 0.2",
        "INT8 9.1 621,472 48.2 0.98 0.1",  # half way from 0.96 to 1
        "chat mlperf-llama-3.1-8b-interactive chat 0.5 30 2.5 11 0",
        "agents mooncake ngram 30 100 1 no limit 4",
        "calm – 20 to 31 1.25 –",
        "rush x 4 for 2 s every 10 s 20 to 32 2 3.5",
        "batch_cap 8, 64, 512 256",
        "quantization_tier FP16, INT8 FP16",
        "speculation_depth not granted 0",
        "goodput meeting the SLO 0.61",
        "latency times the headroom under the SLO 0.12",
        "memory times the KV headroom of the cell 0.04",
        "cost times the share of GPU time left idle 0.03",
    ):
        assert any(told_line.startswith(line) for told_line in lines), line
    text = " ".join(lines)
    assert "chat azure-conv, Gamma gaps of shape 0.87" in text
    assert "agents sessions (turns 6, think 5), outputs sharegpt" in text
    assert "visits all regimes in this order" in text


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        (
            "horizon_s = 60.0",
            "horizon_s = 90.0",
            "ends after 90 s, 18 windows, or more than 777 requests in flight at a window's end",
        ),
        ("max_in_flight = 777\n", "", "ends after 60 s, 12 windows"),
        ("prefill_engines = 2\n", "", "when split 1 prefill, 2 decode"),
        ("engines = 3\nprefill_engines = 2", "engines = 1", "when split not possible"),
        ("engines = 3", "engines = 3\nprefix_cache = false", "prefix cache off"),
        ("engines = 3", "engines = 3\nmax_num_batched_tokens = 4096", "token budget 4,096 an iteration"),
        ("[8, 64, 512]", "[16, 64]", "batch_cap 16, 64 256"),
        ("rates = { chat = 1.25 }", "rates = { chat = 1.75 }", "calm – 20 to 31 1.75 –"),
        ("acceptable_quality = 0.96", "acceptable_quality = 0.98", "INT8 9.1 621,472 48.2 0.98 0"),
        ("window_s = 5.0", "window_s = 5.0\nstart = { batch_cap = 64 }", "batch_cap 8, 64, 512 64"),
        # an SLO of which a part is changed is no longer the published one
        ('"mooncake"', '"mooncake"\nttft_slo_s = 20', "agents – ngram 20 100 1 no limit 4"),
        ('slo = "mooncake"\n', "", "agents – ngram 2 100 1 no limit 4"),
    ],
)
def test_a_change_of_the_file_shows(told, before, after, line):
    assert MINE.count(before) == 1
    for text, tells in ((MINE, False), (MINE.replace(before, after), True)):
        assert any(f"{each} ".startswith(f"{line} ") for each in told(text)) == tells


def test_markdown_has_the_same_cells(told):
    plain = " ".join(told(MINE)).replace(" ", "")
    markdown = told(MINE, "--markdown")
    rows = [line.strip("| ").split("|") for line in markdown if line.startswith("| ")]
    assert len(rows) > 30
    for row in rows:
        assert "".join(row).replace(" ", "") in plain
    assert next(line for line in markdown if line.startswith("### ")) == "### Episode"


def test_a_generator_has_no_regimes(told):
    lines = told(URI.format("gamma://?rate=2&tenants=premium-standard"))
    assert "premium mlperf-llama-3.1-8b-interactive chat 0.5 30 3 10 0" in lines
    assert "REGIMES" not in lines
    assert "The workload is gamma://?rate=2&tenants=premium-standard." in " ".join(lines)


def test_a_trace_and_a_mix_of_ones_own(told, tmp_path):
    trace, mix = tmp_path / "trace.csv", tmp_path / "mix.toml"
    rows = "".join(f"{second},100,{10 + second % 2}\n" for second in range(100))
    trace.write_text(f"arrival_s,prompt_tokens,output_tokens\n{rows}")
    mix.write_text('[batch]\nslo = "mooncake"\nweight = 7.0\n')
    assert "default – chat 2 100 1 no limit 0" in told(URI.format(trace))
    lines = told(URI.format(f"trace://{trace}?tenants={mix}"))
    assert "batch mooncake chat 30 100 7 no limit 0" in lines
    assert "batch as the workload says 60 100 10" in lines  # one a second


@pytest.mark.parametrize("form", ["png", "svg"])
def test_picture_is_written(told, tmp_path, form):
    path = tmp_path / f"task.{form}"
    told(MINE, "--picture", str(path))
    content = path.read_bytes()
    if form == "png":
        assert content.startswith(b"\x89PNG")
    else:  # beside its outlines an svg has each text as a comment
        for text in ("chat", "agents", "calm", "rush", "Requests in flight under vLLM's defaults"):
            assert f"<!-- {text} -->".encode() in content


def test_picture_of_a_generator(told, tmp_path):
    told(URI.format("gamma://?rate=2"), "--picture", str(tmp_path / "task.png"))
    assert (tmp_path / "task.png").read_bytes().startswith(b"\x89PNG")


def test_picture_is_the_same_again(told, tmp_path):
    contents = []
    for name in ("a.png", "b.png"):
        told(MINE, "--picture", str(tmp_path / name))
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_task"], "expected one of adversarial_multitenant, "),
        (["missing.toml"], "missing.toml: cannot be read"),
        (["--picture", "all.png"], "field 'picture': expected a task to draw"),
        (["static_workload", "--picture", "task.bmp"], "expected a file name ending in png, svg, pdf"),
        (["static_workload", "--picture", "nowhere/task.png"], "cannot be written: there is no folder"),
    ],
)
def test_refusals(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["tasks", *arguments]) == 2
    streams = capsys.readouterr()
    assert message in streams.err
    assert not streams.out
    assert not list(tmp_path.iterdir())


def test_a_task_that_cannot_be_is_refused_by_file_and_field(tmp_path, capsys):
    path = tmp_path / "mine.toml"
    path.write_text(MINE.replace("weight = 2.5", "weight = -1"), encoding="utf-8")
    assert main(["tasks", str(path)]) == 2
    assert f"{path}: field 'tenants.chat.weight': expected a number > 0" in capsys.readouterr().err
