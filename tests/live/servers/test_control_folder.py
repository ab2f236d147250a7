"""The folder of a server's engines: what was found in it comes back, even after a kill, and one steers it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from llmserve_env.errors import InputError
from llmserve_env.live.servers.control_folder import FOUND_FILE, ControlFolder
from llmserve_env.live.servers.engine_settings import EngineSettings, read_settings

FIRST, SECOND = EngineSettings(batch_cap=8), EngineSettings(batch_cap=16)

KILLED = """
import sys
from pathlib import Path
from llmserve_env.live.gateway.deployment import Deployment
from llmserve_env.live.gateway.gateway import Gateway
from llmserve_env.live.servers.upstreams import Upstream
from llmserve_env.schema import ServeAction
upstream = Upstream("http://127.0.0.1:9", control=Path(sys.argv[1]))
deployment = Deployment(Gateway([upstream]))
for cap in (8, 16):
    deployment.apply(ServeAction(batch_cap=cap))
print("applied", flush=True)
sys.stdin.read()
"""


def names(folder):
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("found", [None, b'{"batch_cap": 3}', b"", b"no JSON \xff\x00"])
def test_what_was_found_comes_back_whatever_it_was(tmp_path, found):
    path = tmp_path / "settings.json"
    if found is not None:
        path.write_bytes(found)
    folder = ControlFolder(tmp_path)
    for settings in (FIRST, SECOND):
        folder.write(settings)
        assert read_settings(tmp_path) == folder.written == settings
        assert FOUND_FILE in names(tmp_path)
    folder.close()  # as at the end of a process that brings nothing back
    again = ControlFolder(tmp_path)
    for _ in range(2):
        assert (path.read_bytes() if path.exists() else None) == found
        assert FOUND_FILE not in names(tmp_path)
        again.write(FIRST)
        again.restore()
        again.restore()
    again.close()


def test_a_killed_gateway_loses_no_settings_and_another_one_waits_for_its_end(tmp_path, caplog):
    (tmp_path / "settings.json").write_text('{"batch_cap": 3}')
    command = [sys.executable, "-c", KILLED, tmp_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as gateway:
        assert gateway.stdout.readline() == b"applied\n"
        with pytest.raises(InputError, match=f"{tmp_path}: another process that steers engines uses this"):
            ControlFolder(tmp_path)
        assert read_settings(tmp_path).batch_cap == 16
        os.kill(gateway.pid, signal.SIGKILL)
    assert read_settings(tmp_path).batch_cap == 16
    folder = ControlFolder(tmp_path)
    assert read_settings(tmp_path).batch_cap == 3
    assert "brought back the settings" in caplog.text
    assert names(tmp_path) == ["settings.json"]
    folder.close()


def test_a_folder_that_is_made_anew_keeps_them_too(tmp_path):
    path = tmp_path / "control"
    path.mkdir()
    folder = ControlFolder(path)
    folder.write(FIRST)
    (path / FOUND_FILE).unlink()
    folder.write(SECOND)
    folder.close()
    ControlFolder(path).close()
    assert names(path) == []


@pytest.mark.parametrize("content", [b"", b"[" * 5000, b'{"settings": 3}', b"\xff"])
def test_a_file_of_found_settings_that_cannot_be_read_is_named_and_stays(tmp_path, content):
    (tmp_path / FOUND_FILE).write_bytes(content)
    with pytest.raises(InputError, match=f"{FOUND_FILE}: expected the settings that were found"):
        ControlFolder(tmp_path)
    (tmp_path / FOUND_FILE).unlink()
    ControlFolder(tmp_path).close()  # and the lock was not kept


def test_what_cannot_be_brought_back_now_is_later(tmp_path):
    folder = ControlFolder(tmp_path)
    folder.write(FIRST)
    (tmp_path / "settings.json").unlink()
    (tmp_path / "settings.json" / "full").mkdir(parents=True)  # nobody can remove a folder as a file
    with pytest.raises(InputError, match="cannot be restored"):
        folder.restore()
    (tmp_path / "settings.json" / "full").rmdir()
    (tmp_path / "settings.json").rmdir()
    folder.restore()
    assert names(tmp_path) == []
    folder.close()
