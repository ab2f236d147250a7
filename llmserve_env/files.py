"""Files that users name: read within bounds, and written so that no reader meets a half-written one."""

from __future__ import annotations

import gzip
import io
import os
import secrets
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from llmserve_env.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SETTINGS_BYTES = 16 * 2**20
"""Longest file of settings that is read (TOML, JSON); those that there are have some kB."""
TABLE_BYTES = 2**30
"""Longest table of measurements, and longest file of weights, that is read."""
UNPACKED_RATIO = 50
"""How many times its size a file may be when it is unpacked: tables of numbers come to some ten times."""
UNPACKED_BYTES = 64 * 2**20
"""What a file may come to when it is unpacked, however small it is."""

_PART_BYTES = 2**20
_ZSTD_PART_BYTES = 2**10
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_OTHER_PACKERS = {b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"PK\x03\x04": "zip"}


def read_bytes(
    path: Path | str, most: int, *, packed: bool | None = False, longest_line: int | None = None
) -> bytes:
    """What a file holds, if that is no more than there may be: nothing beyond it is read or unpacked.

    Args:
        path: the file; a pipe will do.
        most: bytes that it may hold, unpacked. What is packed may also be no more than `UNPACKED_RATIO` times
            its size, or `UNPACKED_BYTES`.
        packed: whether it is gzip or zstd; None: if it begins as such.
        longest_line: bytes that a line may have (default: any number).

    Raises:
        InputError: it cannot be read, is damaged, or holds more.
    """
    name = str(path)
    try:
        with Path(path).open("rb") as file:
            begins = file.peek(8)[:8]
            if packed is None:
                packed = begins.startswith((_GZIP, _ZSTD))
                for magic, packer in _OTHER_PACKERS.items():
                    if begins.startswith(magic):
                        raise InputError(
                            f"is packed with {packer}: unpack it, or pack it with gzip or zstd", file=name
                        )
            size = os.fstat(file.fileno()).st_size  # 0 of a pipe
            if not packed:
                return _within(file, most, longest_line, name, size)
            if not begins:
                return b""
            most = min(most, max(UNPACKED_RATIO * size, UNPACKED_BYTES))
            unpacked = _Zstd(file) if begins.startswith(_ZSTD) else gzip.GzipFile(fileobj=file)
            return _within(cast("IO[bytes]", unpacked), most, longest_line, name)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        kind = "zstd" if begins.startswith(_ZSTD) else "gzip"
        raise InputError(f"cannot be read: damaged or truncated {kind}: {error}", file=name) from error
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", file=name) from error
    except MemoryError as error:
        raise InputError("cannot be read: it takes more memory than there is", file=name) from error
    except InputError:
        raise
    except ValueError as error:  # a NUL in the path
        raise InputError(f"cannot be read: {error}", file=name) from error


class _Zstd:
    """What a zstd file holds, a piece at a time: a thousand packed bytes may be many millions.

    Args:
        file: the packed bytes.
    """

    def __init__(self, file: IO[bytes]) -> None:
        import zstandard

        self._file = file
        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame = self._decompressor.decompressobj()
        self._left = b""

    def read(self, _: int) -> bytes:
        """The next piece; b"" at the end.

        Raises:
            EOFError: it is damaged, or ends within a frame.
        """
        while part := self._left or self._file.read(_ZSTD_PART_BYTES):
            if self._frame.eof:
                self._frame = self._decompressor.decompressobj()
            try:
                found = self._frame.decompress(part)
            except self._error as error:
                raise EOFError(error) from error
            self._left = self._frame.unused_data if self._frame.eof else b""
            if found:
                return bytes(found)
        if not self._frame.eof:
            raise EOFError("it ends within a frame")
        return b""


def _within(
    source: IO[bytes], most: int, longest_line: int | None, name: str, size: int | None = None
) -> bytes:
    """All of a stream."""
    found = io.BytesIO()
    line = 0
    if size is not None and size > most:
        raise InputError(f"expected at most {most:,} bytes, found {size:,}", file=name)
    while part := source.read(_PART_BYTES):
        found.write(part)
        if found.tell() > most:
            unpacked = "" if size is not None else " unpacked"
            raise InputError(f"expected at most {most:,} bytes{unpacked}, found more", file=name)
        if longest_line is not None:
            end = max(part.rfind(b"\n"), part.rfind(b"\r"))
            line = line + len(part) if end < 0 else len(part) - end - 1
            if line > longest_line:
                raise InputError(f"expected lines of at most {longest_line:,} bytes, found more", file=name)
    return found.getvalue()


def read_text(path: Path | str, most: int = SETTINGS_BYTES) -> str:
    """The text of a file.

    Args:
        path: the file.
        most: bytes that it may have.

    Raises:
        InputError: it cannot be read, is longer, or is not UTF-8.
    """
    try:
        return read_bytes(path, most).decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"cannot be read: expected UTF-8 text, byte {error.start} is none", file=str(path)
        ) from error


def read_toml(path: Path | str) -> dict[str, Any]:
    """A file of settings in TOML.

    Raises:
        InputError: it cannot be read, is longer than `SETTINGS_BYTES`, or is not TOML.
    """
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of too many digits
        raise InputError(f"cannot be read as TOML: {error}", file=str(path)) from error


def write_atomic(path: Path | str, content: str | bytes) -> None:
    """Write a file under a temporary name beside it, then rename: it appears whole or not at all.

    Args:
        path: the file; an existing one is replaced.
        content: text (written as UTF-8) or bytes.

    Raises:
        InputError: the file cannot be written there.
    """
    with open_atomic(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def open_atomic(path: Path | str) -> Iterator[BinaryIO]:
    """As `write_atomic`, for content that comes in parts.

    The file appears when the block ends; a block that raises, or is interrupted, leaves nothing. A link is
    followed.

    Raises:
        InputError: the file cannot be written there.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        raise InputError("cannot be written: not a regular file", file=str(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror or error}", file=str(path)) from error
    finally:
        with suppress(OSError):  # gone after a rename; never there where the folder is none
            temporary.unlink()
