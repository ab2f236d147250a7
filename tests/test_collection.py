"""Tests have the same names and order at any time, on any machine: the workers of a run compare them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHANGING = {
    "a compressed file": "[gzip.compress(b'', mtime=time.time()).hex()]",
    "a day": "[time.localtime().tm_mday]",
    "the environment": "[os.environ['TZ']]",
    "random numbers": "[random.random()]",
    "a process": "[os.getpid()]",
    "files": "[path.name for path in FOLDER.iterdir()]",
    "files that match": "[path.name for path in FOLDER.glob('?')]",
    "a list of files": "os.listdir(FOLDER)",
    "a set": "{'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', 'i', 'j'}",
}


def collected(*options: str, cwd: Path = ROOT, hash_seed: int, **environment: str) -> list[str]:
    """Names of the tests that a process finds, in its order."""
    environment = {"PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *options],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_another_process_on_another_day_collects_the_same(request):
    """All that this run has collected: of a run of the whole suite, all there is."""
    here = [item.nodeid for item in request.session.items]
    files = {name.partition("::")[0]: None for name in here}
    there = collected("-p", "tests.elsewhere", *files, hash_seed=1, TZ="Asia/Kathmandu")
    chosen = set(here)
    assert [name for name in there if name in chosen] == here


def test_names_that_change_are_noticed(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in "ab":
        (tmp_path / "folder" / name).touch()
    lines = ["import gzip, os, pathlib, random, time, pytest", "FOLDER = pathlib.Path('folder')"]
    for number, values in enumerate(CHANGING.values()):
        lines += [f"@pytest.mark.parametrize('value', {values})", f"def test_{number}(value): ..."]
    (tmp_path / "test_changing.py").write_text("\n".join(lines))
    alone = {"cwd": tmp_path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    here = collected(**alone, hash_seed=0, TZ="UTC")
    there = collected("-p", "tests.elsewhere", **alone, hash_seed=1, TZ="Asia/Kathmandu")
    for number, what in enumerate(CHANGING):
        place = f"::test_{number}["
        assert [name for name in here if place in name] != [name for name in there if place in name], what
