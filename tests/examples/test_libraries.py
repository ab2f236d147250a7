"""Libraries that play here, each by its shortest program; docs/interop.md tells of all."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PROGRAMS = sorted(Path(__file__).with_name("libraries").glob("play_*.py"))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.stem.removeprefix("play_"))
def test_a_library_plays_here(program, tmp_path):
    library = program.stem.removeprefix("play_")
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    # A process of its own: their imports warn, and change what others see.
    done = subprocess.run(
        [sys.executable, program, tmp_path], check=False, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
