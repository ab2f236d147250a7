"""The package as it is installed: light to import, one version, a command line that says what it knows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile
from importlib import import_module, metadata
from pathlib import Path

import numpy as np
import pytest

import llmserve_env
from llmserve_env import cli
from llmserve_env.agents.policy import PolicyAgent, save_policy
from llmserve_env.backend import WINDOW
from llmserve_env.errors import InputError
from llmserve_env.tasks import load_task
from tests.of_every_task import FEATURES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCK = (ROOT / "requirements-dev.lock").read_text(encoding="utf-8")
SERVER_LOCK = (ROOT / "requirements-server.lock").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
# Gymnasium, and NumPy with it, is there: environments are registered on import (0.1 s).
HEAVY = {
    "fastapi", "gradio", "matplotlib", "numba", "openenv", "pandas", "pydantic", "scipy", "stable_baselines3",
    "torch", "tqdm", "tyro",
}  # fmt: skip


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False, cwd=ROOT)


def llmserve(*args: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "llmserve_env", *args)


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `code`."""
    done = python("-c", f"{code}\nimport sys\nprint('\\n'.join(sys.modules))")
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.split()}


# Import


@pytest.mark.parametrize(
    "code",
    [
        "import llmserve_env; llmserve_env.__version__; dir(llmserve_env)",
        "import llmserve_env; llmserve_env.InputError",
        "from llmserve_env.cli import main; main(['--help'])",
    ],
)
def test_import_and_help_load_no_heavy_library(code):
    loaded = modules_after(code)
    assert "llmserve_env" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("name", llmserve_env.__all__)
def test_public_name_resolves(name):
    assert name in dir(llmserve_env)
    value = getattr(llmserve_env, name)
    if name != "__version__":
        assert value is getattr(import_module(llmserve_env._HOMES[name]), name)
        assert value.__doc__, f"{name} has no docstring"


def test_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = llmserve_env.no_such_name


# Metadata


def test_version_has_one_source():
    assert "version" in PYPROJECT["project"]["dynamic"]
    assert metadata.version("llmserve-env") == llmserve_env.__version__
    assert (
        re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1]
        == llmserve_env.__version__
    )


def test_supported_pythons_are_declared():
    prefix = "Programming Language :: Python :: "
    versions = {c.removeprefix(prefix) for c in PYPROJECT["project"]["classifiers"] if c.startswith(prefix)}
    assert {"3.10", "3.11", "3.12", "3.13"} <= versions
    assert PYPROJECT["project"]["requires-python"] == ">=3.10"


def test_package_is_typed():
    assert (ROOT / "llmserve_env" / "py.typed").is_file()


def test_lock_names_no_host():
    assert not re.findall(
        r"^.*(?:\w://|--index-url|--extra-index|--find-links|--trusted-host| @ ).*$", LOCK, re.M
    )


def test_locks_pin_and_hash_everything_that_pyproject_asks_for():
    groups, extras = PYPROJECT["dependency-groups"], PYPROJECT["project"]["optional-dependencies"]
    installed = [*PYPROJECT["project"]["dependencies"], *extras["server"]]
    built = [*PYPROJECT["build-system"]["requires"], *groups["build"]]
    tools = [each for each in groups["dev"] if isinstance(each, str)]
    # torch: which build it is is for pip's settings to say; the Makefile pins its version.
    assert _missing(LOCK, [*installed, *built, *tools]) == {"torch"}
    assert f"TORCH := {next(each for each in tools if each.startswith('torch'))}\n" in MAKEFILE
    assert _missing(SERVER_LOCK, [*installed, *groups["build"]]) == set()
    # What the service is tested with is what its container has; tools may need it on more Pythons.
    assert _without_markers(SERVER_LOCK) <= _without_markers(LOCK)


def _without_markers(lock):
    return {re.sub(r" ; [^\\]*", " ", block) for block in _pins(lock)}


def _missing(lock, asked):
    pinned = {re.match(r"[a-z0-9-]+", block)[0] for block in _pins(lock)}
    return {re.match(r"[A-Za-z0-9-]+", requirement)[0].lower() for requirement in asked} - pinned


def _pins(lock):
    blocks = re.split(r"\n(?=[a-z])", re.sub(r"^\s*#.*\n", "", lock, flags=re.M).strip())
    for block in blocks:
        assert re.match(r"[a-z0-9-]+==\S+", block), block.splitlines()[0]
        assert "--hash=sha256:" in block, block.splitlines()[0]
    return set(blocks)


# Archives


@pytest.fixture(scope="module")
def archives(tmp_path_factory, random_policy):
    """Wheel and source archive of a checkout with the weights of one policy more, and that policy."""
    folder = tmp_path_factory.mktemp("checkout")
    policy = random_policy(load_task("static_workload"))
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    for name in ("llmserve_env", "server", "weights"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    save_policy(folder / "weights" / "static_workload" / "ppo-1", policy)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, policy


def test_archives_carry_the_weights(archives):
    folder, _ = archives
    carried = {str(path.relative_to(folder)) for path in (folder / "weights").rglob("*") if path.is_file()}
    assert {"weights/README.md", "weights/static_workload/ppo-1/policy.safetensors"} <= carried
    (wheel,), (source,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    found = zipfile.ZipFile(wheel).namelist()
    assert {name for name in found if "weights" in name} == {f"llmserve_env/{name}" for name in carried}
    assert {f"llmserve_env/live/data/{name}" for name in ("dashboard.html", "grafana.json")} <= set(found)
    assert {name.partition("/")[0] for name in found if "dist-info" not in name} == {"llmserve_env", "server"}
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in names if name.startswith("weights/")} == carried


def test_an_installed_wheel_plays_its_policies_without_torch(archives, tmp_path):
    folder, policy = archives
    (wheel,) = (folder / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    task = load_task("static_workload")
    agent = PolicyAgent(policy)
    agent.reset(task, [0])
    expected = agent.act(np.full((1, len(FEATURES)), 0.3, np.float32), np.zeros(1, WINDOW))
    code = (
        "import sys, numpy as np; from llmserve_env.agents import load_agent; "
        "from llmserve_env.tasks import load_task; from llmserve_env.backend import WINDOW; "
        "task = load_task('static_workload'); agent = load_agent('ppo', task); agent.reset(task, [0]); "
        f"seen = np.full((1, {len(FEATURES)}), 0.3, np.float32); "
        "print(agent.act(seen, np.zeros(1, WINDOW)).tolist(), load_agent.__code__.co_filename, "
        "'torch' in sys.modules, sep='; ')"
    )
    command = [sys.executable, "-c", code]
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    action, home, torch = done.stdout.strip().split("; ")
    assert home == str(tmp_path / "site" / "llmserve_env" / "agents" / "__init__.py")
    assert (action, torch) == (str(expected.tolist()), "False")


# Command line


def test_llmserve_is_installed():
    (script,) = metadata.entry_points(group="console_scripts", name="llmserve")
    assert script.load() is cli.main


@pytest.mark.parametrize("args", [(), ("--help",), ("-h",)])
def test_help_lists_every_command(args):
    done = llmserve(*args)
    assert done.returncode == 0
    assert not done.stderr
    for name, summary in cli.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", done.stdout, re.M)


def test_version_flag():
    done = llmserve("--version")
    assert (done.returncode, done.stdout) == (0, f"llmserve {llmserve_env.__version__}\n")


def test_unknown_command_names_the_known_ones():
    done = llmserve("simulat", "--window-s", "10")
    assert done.returncode == 2
    assert not done.stdout
    assert "unknown command 'simulat'" in done.stderr
    assert "Did you mean 'simulate'?" in done.stderr
    assert all(name in done.stderr for name in cli.COMMANDS)


@pytest.mark.parametrize("args", [["calibrate"], ["calibrate", "--help"]])
def test_group_lists_its_commands(args, capsys):
    assert cli.main(args) == 0
    out = capsys.readouterr().out
    assert "  calibrate kernels " in out
    assert "  simulate " not in out


def test_unknown_command_of_a_group(capsys):
    assert cli.main(["calibrate", "kernel"]) == 2
    assert "Did you mean 'calibrate kernels'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_with_hyphenated_flags(name, capsys):
    module = ROOT.joinpath("llmserve_env", "commands", *name.split()).with_suffix(".py")
    assert module.is_file()
    with pytest.raises(SystemExit) as stop:
        cli.main([*name.split(), "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: llmserve {name}" in out
    assert not re.findall(r"--[a-z]+_\w*", out)


@pytest.fixture
def give(monkeypatch):
    """Puts a function in the table as the command `given`."""

    def put(function):
        module = types.ModuleType("llmserve_env.commands.given")
        module.given = function
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(cli.COMMANDS, "given", "a command of this test")

    return put


def test_arguments_reach_the_function(give, capsys):
    def given(path: str, /, max_num_seqs: int = 8) -> None:
        print(path, max_num_seqs)

    give(given)
    assert cli.main(["given", "a.csv", "--max-num-seqs", "3"]) == 0
    assert capsys.readouterr().out == "a.csv 3\n"


def test_status_is_what_the_function_returns(give):
    give(lambda: 3)
    assert cli.main(["given"]) == 3


def test_bad_argument_exits_2(give, capsys):
    def given(max_num_seqs: int = 8) -> None:
        pass

    give(given)
    with pytest.raises(SystemExit) as stop:
        cli.main(["given", "--max-num-seqs", "many"])
    assert stop.value.code == 2
    assert "--max-num-seqs" in capsys.readouterr().err


def test_input_error_is_told_without_a_traceback(give, capsys):
    def given() -> None:
        raise InputError("expected a number, found 'x'", file="trace.csv", line=3, field="prompt_tokens")

    give(given)
    assert cli.main(["given"]) == 2
    assert (
        capsys.readouterr().err
        == "llmserve: trace.csv:3: field 'prompt_tokens': expected a number, found 'x'\n"
    )


def test_interrupt_exits_130(give, capsys):
    def given() -> None:
        raise KeyboardInterrupt

    give(given)
    assert cli.main(["given"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_reader_that_goes_away_is_no_error():
    with subprocess.Popen(
        [sys.executable, "-m", "llmserve_env", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
