"""Files appear whole or not at all."""

from __future__ import annotations

import pytest

from llmserve_env.errors import InputError
from llmserve_env.files import write_atomic


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
    for path in (folder, tmp_path / "absent" / "file"):
        with pytest.raises(InputError, match="cannot be written"):
            write_atomic(path, "text")
    assert list(tmp_path.iterdir()) == [folder]
