"""Entries as Python meets them."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading

import pytest

from llmserve_env.compiled.entry import _told
from llmserve_env.sim import kernel

FIRST_STEP = """
from llmserve_env.episode import prepare

try:
    prepare()
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_of_an_entry_is_the_entry(copied):
    assert copied(kernel.serve) is kernel.serve


def test_where_there_is_no_stderr_nothing_is_told_on_stdout(monkeypatch, capsys):
    monkeypatch.setattr(threading, "Timer", Now)
    with _told("serve", "some 15 s", "kept"):
        pass
    assert "compiling" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stderr", None)
    with _told("serve", "some 15 s", "kept"):
        pass
    assert capsys.readouterr().out == ""


def test_numba_without_compilation_is_refused_by_name():
    environment = {"NUMBA_DISABLE_JIT": "1", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", FIRST_STEP], env=environment, capture_output=True, text=True, check=True
    )
    assert "NUMBA_DISABLE_JIT" in done.stdout


class Now:
    """A timer that does not wait."""

    def __init__(self, after_s, function) -> None:
        self.start = function
        self.cancel = bool
