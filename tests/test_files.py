"""Files appear whole or not at all."""

from __future__ import annotations

import pytest

from llmserve_env.errors import InputError
from llmserve_env.files import open_atomic, write_atomic


def test_writes_text_and_bytes_and_replaces(tmp_path):
    path = tmp_path / "result.json"
    write_atomic(path, "é")
    assert path.read_bytes() == "é".encode()
    write_atomic(path, b"\x00")
    assert path.read_bytes() == b"\x00"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_nothing_behind(tmp_path):
    folder = tmp_path / "taken"
    folder.mkdir()
    (tmp_path / "file").write_text("")
    for path in (folder, tmp_path / "absent" / "file", tmp_path / "file" / "inside"):
        with pytest.raises(InputError, match="cannot be written"):
            write_atomic(path, "text")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file", folder]


def test_parts_appear_at_the_end_or_not_at_all(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("old")

    def write(parts):
        with open_atomic(path) as file:
            for part in parts:
                file.write(part)

    def interrupted():
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(interrupted())
    assert (path.read_text(), list(tmp_path.iterdir())) == ("old", [path])
    write([b"a,b\n", b"1,2\n"])
    assert (path.read_text(), list(tmp_path.iterdir())) == ("a,b\n1,2\n", [path])
