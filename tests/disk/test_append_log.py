"""Files of lines: each is there whole or not at all, whatever the disk and other processes do."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from llmserve_env.disk.append_log import MAX_LINE_BYTES, AppendLog, read_lines, write_lines
from llmserve_env.disk.lock import FolderLock
from llmserve_env.errors import InputError

LIMITED = """
import resource, sys
from pathlib import Path
from llmserve_env.disk.append_log import AppendLog, write_lines
path = Path(sys.argv[1])
log = AppendLog(path)
log.append(b"first")
most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (9, most))  # what is beyond is written in part
for write in (lambda: log.append(b"a", b"second"), lambda: write_lines(path, b"anew", b"and longer")):
    try:
        write()
    except OSError as error:
        print(error.errno, path.read_bytes())
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
log.append(b"third")
"""

HOLDER = """
import sys
from pathlib import Path
from llmserve_env.disk.append_log import AppendLog
from llmserve_env.disk.lock import FolderLock
log, lock = AppendLog(Path(sys.argv[1]) / "log"), FolderLock(Path(sys.argv[1]), "another test")
print("held", flush=True)
sys.stdin.read()
"""


def contents(path):
    return [(line.content, line.whole) for line in read_lines(path)]


def test_what_does_not_fit_leaves_no_trace(tmp_path):
    path = tmp_path / "log"
    done = subprocess.run([sys.executable, "-c", LIMITED, path], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{errno.EFBIG} b'first\\n'"] * 2
    assert contents(path) == [(b"first", True), (b"third", True)]
    assert os.listdir(tmp_path) == ["log"]


@pytest.mark.parametrize("failing", ["write", "fsync"])
def test_an_error_of_the_disk_leaves_no_trace(tmp_path, monkeypatch, failing):
    path = tmp_path / "log"
    with AppendLog(path) as log:
        log.append(b"first")
        real = os.write

        def fail(descriptor, *content):
            if content:
                real(descriptor, content[0][:5])
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patched:
            patched.setattr(os, failing, fail)
            with pytest.raises(OSError, match="Input/output"):
                log.append(b"second", b"third")
            assert path.read_bytes() == b"first\n"
            # If it cannot even be cut back, the next line is not written behind the rest of this one.
            patched.setattr(os, "ftruncate", lambda descriptor, size: fail(descriptor))
            with pytest.raises(OSError, match="Input/output"):
                log.append(b"second")
            assert path.read_bytes() != b"first\n"
            with pytest.raises(OSError, match="Input/output"):
                log.append(b"second")
        log.append(b"fourth")
    assert contents(path) == [(b"first", True), (b"fourth", True)]


@pytest.mark.parametrize(
    ("left", "kept"),
    [
        (b"", b""),
        (b"torn", b""),
        (b"one\ntorn", b"one\n"),
        (b"one\ntwo\n" + b"\x00" * 200_000, b"one\ntwo\n"),  # as a machine leaves it that lost its power
        (b"one\ntwo\n", b"one\ntwo\n"),
    ],
)
def test_a_torn_end_is_cut_off_and_told(tmp_path, caplog, left, kept):
    path = tmp_path / "log"
    path.write_bytes(left)
    with AppendLog(path) as log:
        assert (log.size, path.read_bytes()) == (len(kept), kept)
        log.append(b"next")
    assert path.read_bytes() == kept + b"next\n"
    assert (f"{path}: cut off {len(left) - len(kept)} bytes" in caplog.text) == (left != kept)


def test_what_does_not_count_is_cut_off_and_what_is_missing_is_told(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\n")
    AppendLog(path, size=4).close()
    assert path.read_bytes() == b"one\n"
    with pytest.raises(OSError, match="expected 8 bytes or more, found 4"):
        AppendLog(path, size=8)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        AppendLog(path, size=4)
    assert not path.exists()


def test_a_line_is_one_and_of_a_length_that_can_be_read(tmp_path):
    with AppendLog(tmp_path / "log") as log:
        for line in (b"a\nb", bytes(MAX_LINE_BYTES + 1)):
            with pytest.raises(ValueError, match="expected"):
                log.append(b"good", line)
        assert log.size == 0
        log.close()
        with pytest.raises(OSError, match="closed"):
            log.append(b"good")


def test_a_lock_is_of_one_process_and_ends_with_it(tmp_path):
    command = [sys.executable, "-c", HOLDER, tmp_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError):
            AppendLog(tmp_path / "log")
        with pytest.raises(InputError, match=f"{tmp_path}: another test uses this folder"):
            FolderLock(tmp_path, "another test")
        os.kill(holder.pid, signal.SIGKILL)
    AppendLog(tmp_path / "log").close()
    first = FolderLock(tmp_path, "another test")
    with pytest.raises(InputError, match="another test"):
        FolderLock(tmp_path, "another test")  # nor twice in a process
    first.close()
    del first
    forgotten = FolderLock(tmp_path, "another test")
    del forgotten
    FolderLock(tmp_path, "another test").close()
    with pytest.raises(InputError, match="expected a folder"):
        FolderLock(tmp_path / "log", "another test")


def test_a_file_that_is_moved_away_while_it_is_opened_is_not_the_one(tmp_path, monkeypatch):
    path, real = tmp_path / "log", os.open
    path.write_bytes(b"old\n")

    def opened(*arguments):
        descriptor = real(*arguments)
        if path.read_bytes() == b"old\n":
            path.replace(tmp_path / "log.1")
            path.write_bytes(b"new\n")
        return descriptor

    monkeypatch.setattr(os, "open", opened)
    with AppendLog(path) as log:
        log.append(b"line")
    assert (path.read_bytes(), (tmp_path / "log.1").read_bytes()) == (b"new\nline\n", b"old\n")


def test_lines_are_read_one_at_a_time_up_to_a_length(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"12345\n\n\xff\x00\ntorn")
    assert [(line.number, line.end) for line in read_lines(path, 5)] == [(1, 6), (2, 7), (3, 10), (4, 14)]
    assert contents(path) == [(b"12345", True), (b"", True), (b"\xff\x00", True), (b"torn", False)]
    lines = read_lines(path, 4)
    with pytest.raises(InputError, match=f"{path}:1: expected a line of at most 4 bytes"):
        next(lines)
    with path.open("wb") as file:
        file.truncate(1 << 40)  # zeros, which take no room on the disk
    with pytest.raises(InputError, match="of at most 1,000 bytes"):
        next(read_lines(path, 1000))
    with pytest.raises(IsADirectoryError):
        next(read_lines(tmp_path))


def test_a_file_is_written_anew_in_one(tmp_path):
    path = tmp_path / "log"
    (tmp_path / "log.tmp").write_bytes(b"of a process that was killed")
    assert write_lines(path, b"one", b"two") == 8
    assert write_lines(path, b"three") == 6
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"three\n", ["log"])
