"""Every path that a command takes: what cannot be read or written is refused in a line, and nothing is left.

The paths are found where the commands' parsers have them, so that a new one is tried, too.
"""

from __future__ import annotations

import gzip
import inspect
import os
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

import minari
import pytest
from tyro.conf import arg

from llmserve_env import cli
from llmserve_env.cli import main
from llmserve_env.grading import read_log, write_log
from tests.contract.episodes import constant, played, short

TASK, PROFILE, SERVER = "static_workload", "h100-llama-3.1-8b", "http://127.0.0.1:9"
TRACE = "arrival_s,prompt_tokens,output_tokens\n0,10,10\n1,20,5\n"
CONFIG = "model.json"
MINIMAL = {
    "demo": ["--tasks", TASK, "--agents", "defaults", "--seeds", "2", "--out", "{demo/}"],
    "run": ["--agent", "defaults", "--task", TASK, "--horizon-s", "2"],
    "simulate": ["--trace", "{trace.csv}", "--profile", PROFILE, "--out", "{new.csv}"],
    "tasks": [TASK],
    "doctor": ["--url", SERVER],
    "gateway": ["--upstream", SERVER, "--port", "0", "--task", TASK, "--agent", "defaults"],
    "grade": ["{log.json}"],
    "dataset": ["--task", TASK, "--agent", "defaults", "--episodes", "1", "--out", "{datasets/}"],
    "workload": ["{trace.csv}"],
    "servegen": ["{chunks/}", "--out", "{new.csv}"],
    "profiles": [PROFILE],
    "validate": ["{run/}", "--profile", PROFILE],
    "bench": ["--requests", "100", "--runs", "1", "--trace", "{trace.csv}"],
    "compare": ["--url", SERVER, "--profile", PROFILE, "--trace", "{trace.csv}"],
    "calibrate live": ["--url", SERVER, "--model-config", "{model.json}", "--out", "{new.toml}"],
    "calibrate kernels": [
        "{tables/}",
        "--model-config",
        "{model.json}",
        "--name",
        "n",
        "--out",
        "{new.toml}",
    ],
    "calibrate predictions": [
        *("{grid.csv}", "--system", "h100_sxm", "--model-config", "{model.json}", "--name", "n"),
        *("--gpu", "NVIDIA H100 80GB HBM3", "--out", "{new.toml}"),
    ],
}
"""For each command what it must be given; what stands in braces is a file of the folder `world`."""

OUTPUT = re.compile(
    r"(file for|picture of|the \w+ file to write|folder for|folder of datasets|log of all)", re.I
)
NAMES_A_PATH = re.compile(r"\b(files?|folder|path|URI)\b")
POSITIONAL = {"file", "source", "name", "run_dir", "tables", "grid", "folder"}
INSIDE = {
    "tables": "dense.csv",
    "run_dir": "requests.jsonl",
    "agent": "policy.json",
    "folder": "chunk-0-trace.csv",
}
"""Of options that name a folder, the file in it that is read first."""
ASKS_FIRST = {("compare", "iteration_log"), ("calibrate live", "iteration_log")}
"""Files that are read when a server has answered."""
NO_PATHS = {("calibrate live", "name")}
"""Options whose text speaks of another's file."""
MAY_BE_EMPTY = {("gateway", "drained")}
"""Files that may be missing, or hold nothing."""
OF_THE_LIVE_LOG = {("dataset", "decisions")}
"""A log that grows as long as a service runs."""


def options(function: Any) -> Iterator[tuple[str, str]]:
    """Name and text of the options that may name a path, as the parser finds them."""
    hints = get_type_hints(function, include_extras=True)
    section = re.search(r"^Args:\n((?:(?: .*)?\n?)+)", inspect.getdoc(function) or "", re.M)
    texts = {} if section is None else dict(re.findall(r"^    (\w+): ((?:.|\n      )*)", section[1], re.M))
    for name, hint in hints.items():
        kinds = {hint, *get_args(hint)}
        kinds |= {inner for each in kinds for inner in get_args(each)}
        nested = next((each for each in kinds if isinstance(each, type) and is_dataclass(each)), None)
        said = next((each.name for each in kinds if isinstance(each, type(arg(name="")))), None)
        if nested is not None:
            yield from _fields(nested)
        elif name != "return" and (
            Path in kinds or (str in kinds and NAMES_A_PATH.search(texts.get(name, "")))
        ):
            yield said or name, texts.get(name, "")


def _fields(kind: Any) -> Iterator[tuple[str, str]]:
    try:
        source = inspect.getsource(kind)
    except OSError:  # made of the controls: no path among them
        return
    for name, text in re.findall(r'^    (\w+): .*\n    """((?:.|\n)*?)"""', source, re.M):
        hint = str(get_type_hints(kind)[name])
        if "Path" in hint or ("str" in hint and NAMES_A_PATH.search(text)):
            yield name, text


def found() -> dict[str, dict[str, bool]]:
    """For each command its paths, and whether they are written."""
    known = {}
    for name in cli.COMMANDS:
        words = name.split()
        function = getattr(import_module(".".join(["llmserve_env.commands", *words])), words[-1])
        known[name] = {option: bool(OUTPUT.match(text)) for option, text in options(function)}
    return known


FOUND = found()
OUTPUTS = [(command, option) for command in FOUND for option, written in FOUND[command].items() if written]
INPUTS = [
    (command, option)
    for command in FOUND
    for option, written in FOUND[command].items()
    if not written and option not in ("url", "upstream", "live") and (command, option) not in NO_PATHS
]


LOG = played(short(TASK, 2), 3, constant(2)).log()


@pytest.fixture
def world(tmp_path):
    folder = tmp_path / "world"
    for name in ("run", "tables", "demo", "datasets", "chunks"):
        (folder / name).mkdir(parents=True)
    (folder / "trace.csv").write_text(TRACE)
    (folder / "model.json").write_text("{}")
    (folder / "chunks" / "chunk-0-trace.csv").write_text("0,1,1,Gamma,1,1\n")
    (folder / "grid.csv").write_text("sys,k,B,ctx,ms\n")
    write_log(folder / "log.json", LOG)
    return folder


def call(world, command, *more, without=()):
    """Exit status of a command with what it must be given, and more."""
    words = [re.sub(r"\{(.*)\}", lambda name: str(world / name[1]), each) for each in MINIMAL[command]]
    for option in without:
        if f"--{option}" in words:
            del words[words.index(f"--{option}") : words.index(f"--{option}") + 2]
    return main([*command.split(), *words, *more])


def tree(folder):
    return sorted((str(each), each.lstat().st_size) for each in folder.rglob("*"))


def flag(option):
    return f"--{option.replace('_', '-')}"


def suffix(option):
    return {"picture": ".png", "json": ".json", "log": ".json", "decisions": ".jsonl"}.get(option, ".out")


def test_the_paths_are_found():
    """What they are derived from may fail in silence: these are there."""
    assert set(MINIMAL) == set(cli.COMMANDS)
    assert {name: {option for option, written in FOUND[name].items() if written} for name in FOUND} == {
        "demo": {"out"},
        "run": {"log", "decisions"},
        "simulate": {"out", "json"},
        "tasks": {"picture"},
        "doctor": {"json"},
        "gateway": {"decisions"},
        "grade": set(),
        "dataset": {"out"},
        "workload": {"picture", "json"},
        "servegen": {"out", "quantiles"},
        "profiles": {"json"},
        "validate": {"json", "picture"},
        "bench": {"json"},
        "compare": {"json", "picture"},
        "calibrate live": {"out", "json", "picture"},
        "calibrate kernels": {"out", "json"},
        "calibrate predictions": {"out"},
    }
    assert len(INPUTS) >= 25


def bad_output(world, kind, name):
    folder = world.parent / "bad"
    folder.mkdir()
    if kind == "in no folder":
        return folder / "absent" / name
    if kind == "in a file":
        (folder / "file").write_text("kept")
        return folder / "file" / name
    if kind == "a folder":
        (folder / name).mkdir()
    elif kind == "a link to itself":
        (folder / name).symlink_to(folder / name)
    elif kind == "a link into no folder":
        (folder / name).symlink_to(folder / "absent" / "x")
    elif kind == "a pipe":
        os.mkfifo(folder / name)
    return folder / name


@pytest.mark.parametrize(
    "kind", ["in no folder", "in a file", "a folder", "a link to itself", "a link into no folder", "a pipe"]
)
@pytest.mark.parametrize(("command", "option"), OUTPUTS)
def test_what_cannot_be_written_is_refused_before_any_work(world, capsys, command, option, kind):
    is_folder = (command, option) in {("demo", "out"), ("dataset", "out")}
    if is_folder and kind not in ("in a file", "a link to itself"):
        return  # is made, or is one
    path = bad_output(world, kind, f"x{suffix(option)}")
    before = tree(world.parent)
    assert call(world, command, flag(option), str(path), without=[option]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 or is_folder
    assert said[-1].startswith("llmserve: ")
    assert path.name in said[-1]
    assert tree(world.parent) == before


@pytest.mark.parametrize(
    ("command", "option", "read", "name"),
    [
        ("simulate", "out", "trace", "trace.csv"),
        ("simulate", "json", "trace", "trace.csv"),
        ("workload", "json", None, "trace.csv"),
        ("bench", "json", "trace", "trace.csv"),
        ("compare", "json", "trace", "trace.csv"),
        ("calibrate live", "out", "model-config", "model.json"),
        ("calibrate live", "json", "model-config", "model.json"),
        ("calibrate kernels", "out", "model-config", "model.json"),
        ("calibrate predictions", "out", None, "grid.csv"),
        ("validate", "json", None, "run/requests.jsonl"),
    ],
)
@pytest.mark.parametrize("by", ["its name", "a link"])
def test_what_is_read_is_never_written_over(world, capsys, command, option, read, name, by):
    path = world / name
    if name.startswith("run/"):
        path.write_text("kept")
    before = path.read_bytes()
    target = path if by == "its name" else world / "other"
    if by == "a link":
        target.symlink_to(path)
    assert call(world, command, flag(option), str(target), without=[option]) == 2
    assert "itself: give another file" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.parametrize("command", ["simulate", "validate", "compare", "calibrate live", "workload", "run"])
def test_two_outputs_are_two_files(world, capsys, command):
    first, second, *_ = (option for option, written in FOUND[command].items() if written)
    (world / "link").symlink_to(world)
    same = "same.png"
    options = [flag(first), str(world / same), flag(second), str(world / "link" / same)]
    assert call(world, command, *options, without=[first, second]) == 2
    assert "give another" in capsys.readouterr().err
    assert not (world / same).exists()


def bad_input(world, kind, name):
    path = world.parent / name
    if kind == "a folder":
        path.mkdir()
    elif kind == "nothing":
        path.touch()
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(5 * 2**30)  # of which nothing is on the disk
    elif kind == "bytes":
        path.write_bytes(bytes(range(256)))
    elif kind == "a bomb":
        path.write_bytes(BOMB)
    elif kind == "deep":
        path.write_text("[" * 200_000)
    elif kind == "a link to itself":
        path.symlink_to(path)
    return path


BOMB = gzip.compress(bytes(2**20), mtime=0) * 1500
"""1.5 MB that are 1.5 GB."""


@pytest.mark.parametrize(
    "kind", ["absent", "a folder", "nothing", "huge", "bytes", "a bomb", "deep", "a link to itself"]
)
@pytest.mark.parametrize(("command", "option"), [each for each in INPUTS if each not in ASKS_FIRST])
def test_what_cannot_be_read_is_refused_in_a_line(world, capsys, command, option, kind):
    if (command, option) in OF_THE_LIVE_LOG and kind in ("huge", "nothing"):
        return
    if (command, option) in MAY_BE_EMPTY and kind in ("absent", "nothing"):
        return
    endings = {"task": ".toml", "profile": ".toml", "tenants": ".toml", "file": ".json.gz", "name": ".toml"}
    name = f"bad{endings.get(option, '.csv')}"
    path = bad_input(world, kind, INSIDE.get(option, name))
    given = str(path.parent if option in INSIDE else path)
    more = [given] if option in POSITIONAL else [flag(option), given]
    if option == "points":
        more += ["--scale-to", "h200_sxm"]
    if option == "base_model_config":
        more += ["--tp", "2", "--link-latency-us", "1", "--link-bandwidth-gbps", "1"]
    if option == "decisions":
        minimal = []
    else:
        words = [re.sub(r"\{(.*)\}", lambda each: str(world / each[1]), word) for word in MINIMAL[command]]
        minimal = words[1:] if option in POSITIONAL else words
        if flag(option) in minimal:
            del minimal[minimal.index(flag(option)) : minimal.index(flag(option)) + 2]
    before = tree(world)
    assert main([*command.split(), *more, *minimal]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    # Of a live log the lines that are left out are told, too.
    assert len(said) == 1 or (command, option) in OF_THE_LIVE_LOG, said
    assert said[-1].startswith("llmserve: ")
    assert len(said[-1]) < 2000
    if option != "agent":
        assert path.name in said[-1] or str(path.parent) in said[-1]
    assert tree(world) == before


def test_a_trace_of_one_line_is_not_read_to_its_end(tmp_path, capsys):
    path = tmp_path / "line.csv"
    with path.open("wb") as file:
        file.truncate(2 * 2**30)
    assert main(["workload", str(path)]) == 2
    assert "lines of at most" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["out", "../world/link"])
def test_relative_paths_and_linked_folders_do(world, monkeypatch, capsys, where):
    (world / "out").mkdir()
    (world / "link").symlink_to("out")
    monkeypatch.chdir(world)
    commands = {
        "profiles": ["--json", f"{where}/profiles.json"],
        "workload": ["--json", f"{where}/workload.json", "--picture", f"{where}/workload.png"],
        "simulate": ["--out", f"{where}/requests.csv", "--json", f"{where}/simulate.json"],
        "tasks": ["--picture", f"{where}/task.svg"],
        "run": [
            "--log",
            f"{where}/log.json.gz",
            "--pilot",
            "always",
            "--decisions",
            f"{where}/decisions.jsonl",
        ],
        "dataset": ["--out", where],
    }
    for command, more in commands.items():
        outputs = [each for each in ("out",) if f"--{each}" in more]
        assert call(Path(), command, *more, without=outputs) == 0, capsys.readouterr().err
        for path in more[1::2]:
            assert Path(path).exists() or path == "always"
    assert main(["grade", f"{where}/log.json.gz"]) == 0
    assert len(read_log(f"{where}/log.json.gz").actions) == 2
    data = world / "out" / "llmserve" / TASK / "defaults-v0" / "data"
    assert len(minari.MinariDataset(data)) == 1
    assert main(["dataset", "--decisions", f"{where}/decisions.jsonl", "--out", where]) == 0
    assert str(data.parent.with_name("defaults-live-v0").name) in capsys.readouterr().out
    assert (world / "link").is_symlink()
    assert not list((world / "out").rglob("*.tmp"))


def test_a_dataset_that_fails_leaves_no_folder(world, monkeypatch, capsys):
    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmserve_env.commands.dataset._storage", fails)
    assert call(world, "dataset", "--out", str(world / "new" / "sets"), without=["out"]) == 2
    assert "No space left" in capsys.readouterr().err
    assert not (world / "new").exists()


def test_a_log_of_more_windows_is_read_where_it_is_allowed(world, capsys):
    path = world / "log.json"
    assert main(["grade", str(path), "--max-windows", "2"]) == 0
    assert main(["grade", str(path), "--max-windows", "1"]) == 2
    assert "expected at most 1 windows, found 2" in capsys.readouterr().err
    assert main(["grade", str(path), "--max-windows", "0"]) == 2
