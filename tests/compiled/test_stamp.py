"""A compile cache that cannot lie: what is cached is keyed with everything that it was compiled from."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import llmserve_env
from llmserve_env import rewards
from llmserve_env.compiled import part, stamp
from llmserve_env.episode import prepare
from llmserve_env.observation import observer
from llmserve_env.sim import kernel

PACKAGE = Path(llmserve_env.__file__).parent
DIGEST = """
from llmserve_env.episode import Episode
from llmserve_env.schema import ServeAction
from llmserve_env.sim import kernel
from llmserve_env.tasks import load_task

episode = Episode(load_task("death_spiral"))
observation = episode.reset(seed=0)
while not observation.done:
    observation = episode.step(ServeAction())
print(episode.log().digests[-1])
print(kernel.serve.digest)
"""

ENTRIES = 4  # the kernel, two of rewards, one of observations
FACTOR = 3


@part
def _inner(x):
    return x * FACTOR


def _factory(digest):
    def outer(x):
        digest  # noqa: B018
        return _inner(x)

    return outer


def played(copy: Path, cache: Path | None = None) -> list[str]:
    """What an episode came to in a copy of the package, and the digest of its kernel.

    Args:
        copy: the folder with the copy.
        cache: the folder of the cache (default: beside the copy's sources).
    """
    environment = {**os.environ, "PYTHONPATH": str(copy), "NUMBA_CACHE_DIR": str(cache or "")}
    ran = subprocess.run(
        [sys.executable, "-c", DIGEST], env=environment, cwd=copy, check=True, capture_output=True, text=True
    )
    return ran.stdout.splitlines()


def kept(folder: Path) -> list[str]:
    """Names of the files with machine code."""
    return sorted(path.name for path in folder.rglob("*.nbc"))


def test_a_constant_of_another_file_changes_what_a_warm_cache_gives(tmp_path: Path):
    prepare()
    copy, empty = tmp_path / "copy", tmp_path / "empty"
    package = copy / "llmserve_env"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, folder in (("_fill", ""), ("_add", ""), ("serve", "sim/kernel"), ("_fill", "observation")):
        module = {"": rewards, "observation": observer}.get(folder, kernel)
        shutil.copytree(
            getattr(module, name)._run.stats.cache_path, package / folder / "__pycache__", dirs_exist_ok=True
        )
    warm = kept(copy)
    before = played(copy)
    assert kept(copy) == warm, "the copy finds what was compiled for the package"
    state = package / "sim" / "state.py"
    text = state.read_text(encoding="utf-8")
    state.write_text(re.sub(r"^MAX_DOUBLINGS = 4$", "MAX_DOUBLINGS = 0", text, flags=re.M), encoding="utf-8")
    assert state.read_text(encoding="utf-8") != text
    after = played(copy)
    assert after[0] != before[0], "clients who do not wait longer each time come back sooner"
    assert after == played(copy, empty)
    assert len(kept(empty)) == ENTRIES, f"parts are in their entries alone: {kept(empty)}"


def test_a_stamp_follows_constants_through_callees(monkeypatch: pytest.MonkeyPatch):
    before = stamp(_factory)
    assert stamp(_factory) == before
    monkeypatch.setitem(globals(), "FACTOR", 4)
    assert stamp(_factory) != before
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    assert stamp(_factory) != before, "another type is another machine code"
    monkeypatch.setitem(globals(), "FACTOR", 3)
    assert stamp(_factory) == before


@pytest.mark.parametrize("value", [np.arange(3), ("a", 1), np.int64(3)], ids=["array", "tuple", "scalar"])
def test_a_stamp_takes_every_constant_that_numba_freezes(monkeypatch: pytest.MonkeyPatch, value):
    before = stamp(_factory)
    monkeypatch.setitem(globals(), "FACTOR", value)
    assert stamp(_factory) != before


def test_what_cannot_be_stamped_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(globals(), "FACTOR", {"a": 1})
    with pytest.raises(TypeError, match="FACTOR"):
        stamp(_factory)


def test_what_a_function_closes_over_is_refused():
    factor = 3

    def closed(x):
        return x * factor

    with pytest.raises(TypeError, match="closed"):
        stamp(closed)


@pytest.mark.parametrize(
    ("entry", "module", "name"),
    [
        (kernel.serve, "llmserve_env.sim.kernel.clients", "MAX_DOUBLINGS"),
        (kernel.serve, "llmserve_env.sim.kernel.cell", "MAX_DEPTH"),
        (rewards._fill, "llmserve_env.rewards", "KV_LIMIT"),
    ],
    ids=["state", "hardware", "rewards"],
)
def test_every_entry_is_keyed_with_the_constants_of_other_files(monkeypatch, entry, module, name):
    before = entry.digest
    monkeypatch.setattr(f"{module}.{name}", 17)
    assert entry.digest != before
