"""Files appear whole or not at all, and are read within bounds."""

from __future__ import annotations

import gzip
import os
import threading
from contextlib import suppress
from functools import partial

import pytest
import zstandard

from llmserve_env.errors import InputError
from llmserve_env.files import (
    SETTINGS_BYTES,
    UNPACKED_BYTES,
    UNPACKED_RATIO,
    open_atomic,
    read_bytes,
    read_text,
    read_toml,
    write_atomic,
)


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


def test_what_fits_is_read_whole(tmp_path):
    path = tmp_path / "file"
    for content in (b"", b"a", b"a\r\nb" * 1000, bytes(range(256)) * 9000):
        path.write_bytes(content)
        assert read_bytes(path, len(content)) == content
        assert read_bytes(path, len(content), packed=None) == content
        if content:
            with pytest.raises(
                InputError, match=f"at most {len(content) - 1:,} bytes, found {len(content):,}"
            ):
                read_bytes(path, len(content) - 1)
        half = len(content) // 2
        for packed in (
            gzip.compress(content, mtime=0),
            zstandard.compress(content),
            zstandard.compress(content[:half]) + zstandard.compress(content[half:]),
        ):
            path.write_bytes(packed)
            assert read_bytes(path, len(content), packed=True) == content
            assert read_bytes(path, len(content), packed=None) == content
            if content:
                with pytest.raises(InputError, match="bytes unpacked, found more"):
                    read_bytes(path, len(content) - 1, packed=True)


def test_how_much_is_unpacked_follows_from_the_size(tmp_path):
    path = tmp_path / "file.gz"
    path.write_bytes(zstandard.compress(bytes(UNPACKED_BYTES + 1)))
    with pytest.raises(InputError, match=f"at most {UNPACKED_BYTES:,} bytes unpacked"):
        read_bytes(path, 2**40, packed=True)
    part = gzip.compress(bytes(2**20), mtime=0)
    for members in (70, 1500):
        path.write_bytes(part * members)
        most = max(UNPACKED_BYTES, UNPACKED_RATIO * len(part) * members)
        with pytest.raises(InputError, match=f"at most {most:,} bytes unpacked"):
            read_bytes(path, 2**40, packed=True)
    path.write_bytes(part * 60)
    assert len(read_bytes(path, 2**40, packed=True)) == 60 * 2**20


@pytest.mark.parametrize("compress", [partial(gzip.compress, mtime=0), zstandard.compress])
def test_what_is_cut_off_or_damaged_is_told(tmp_path, compress):
    path = tmp_path / "file"
    whole = compress(bytes(range(256)) * 3000)
    for content in (whole[:-3], whole[:6], whole + b"and more", whole[:5] + b"\xff" * 40):
        path.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read: damaged or truncated"):
            read_bytes(path, 2**30, packed=None)


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_lines_are_bounded_across_parts(tmp_path, end):
    path = tmp_path / "file"
    long = 3 * 2**20 // 2
    path.write_bytes(b"a" * long + end + b"b" * long)
    assert len(read_bytes(path, 2**30, longest_line=long + 1)) == 2 * long + len(end)
    with pytest.raises(InputError, match="lines of at most"):
        read_bytes(path, 2**30, longest_line=2**20)


@pytest.mark.parametrize(
    ("begins", "named"),
    [(b"\xfd7zXZ\0", "xz"), (b"BZh9", "bzip2"), (b"PK\x03\x04", "zip")],
)
def test_what_is_packed_in_another_way_is_named(tmp_path, begins, named):
    path = tmp_path / "file"
    path.write_bytes(begins + bytes(20))
    with pytest.raises(InputError, match=f"packed with {named}: unpack it"):
        read_bytes(path, 2**20, packed=None)
    assert read_bytes(path, 2**20).startswith(begins)


def test_a_pipe_is_read_within_bounds(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)

    def write(content):
        def run():
            with suppress(BrokenPipeError):
                path.write_bytes(content)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    thread = write(gzip.compress(b"a,b", mtime=0))
    assert read_bytes(path, 2**20, packed=None) == b"a,b"
    thread.join()
    thread = write(bytes(3 * 2**20))
    with pytest.raises(InputError, match="found more"):
        read_bytes(path, 2**20)
    thread.join()


def test_settings_are_text_of_some_length(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text("a = 'é'", encoding="utf-8")
    assert read_toml(path) == {"a": "é"}
    for content, reason in (
        (b"a = '\xe9'", "byte 5 is none"),
        (b"a = [", "as TOML"),
        (b"a = " + b"[" * 100_000, "as TOML"),
        (b"a = " + b"9" * 5000, "as TOML"),
        (bytes(SETTINGS_BYTES + 1), "at most"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"settings\.toml: .*{reason}"):
            read_toml(path)
    for absent in (tmp_path, tmp_path / "absent", "a\0b"):
        with pytest.raises(InputError, match="cannot be read"):
            read_text(absent)
