"""Files of lines that are only ever appended to: each line is there whole, or not at all."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from llmserve_env.disk.lock import lock
from llmserve_env.errors import InputError

MAX_LINE_BYTES = 64 << 20
"""Longest line that is written, and that a reader takes into memory."""

_log = logging.getLogger(__name__)
_BLOCK = 1 << 16


class AppendLog:
    """A file that this process alone appends lines to, for as long as it is open.

    What a process that was killed left of a line is cut off when the file is opened, and the log told. Where
    lines cannot be written to their end (a full disk, an error of the disk) the file is cut back to what it
    was before.

    Args:
        path: path of the file; made where it is missing, unless `size` is given.
        size: bytes of it that count (default: up to the end of its last whole line). What is beyond is cut
            off.
        sync: whether lines are on the disk once they are appended, and outlive the machine. Without, they are
            the system's to write: they outlive this process.

    Attributes:
        path: as given.
        size: bytes that count.

    Raises:
        BlockingIOError: another process has it open.
        OSError: it cannot be opened, locked or cut, or is shorter than `size`.

    Example:
        >>> with AppendLog(Path("log.jsonl")) as log:
        ...     log.append(b'{"a": 1}', b'{"a": 2}')
    """

    def __init__(self, path: Path, *, size: int | None = None, sync: bool = True) -> None:
        self.path = path
        self._sync = sync
        self._descriptor: int | None = None
        self._descriptor, status = _open_locked(path, os.O_CREAT if size is None else 0)
        self._regular = stat.S_ISREG(status.st_mode)  # a device has no size, and cannot be cut
        self._torn = False  # whether a failure may have left what does not count
        there = status.st_size if self._regular else 0
        try:
            self.size = _end_of_lines(self._descriptor, there) if size is None else size
            if there < self.size:
                raise OSError(errno.EIO, f"expected {self.size} bytes or more, found {there}", str(path))
            if there > self.size:
                text = "%s: cut off %d bytes at its end, of lines that were not written whole"
                _log.warning(text, path, there - self.size)
                self._cut(self._descriptor)
        except BaseException:
            self.close()
            raise

    def append(self, *lines: bytes) -> None:
        """Write lines, all of them or none.

        Args:
            lines: lines without their ends.

        Raises:
            OSError: they cannot be written; the file is as it was.
            ValueError: a line is longer than `MAX_LINE_BYTES`, or is two.
        """
        for line in lines:
            _check(line)
        descriptor = self._descriptor
        if descriptor is None:
            raise OSError(errno.EBADF, "is closed", str(self.path))
        if self._torn:
            self._cut(descriptor)
        content = memoryview(b"".join(line + b"\n" for line in lines))
        written = 0
        try:
            while written < len(content):  # a disk that is nearly full takes a part, and says nothing
                written += os.write(descriptor, content[written:])
            if self._sync:
                os.fsync(descriptor)
        except BaseException:
            self._torn = True
            with suppress(OSError):  # then the next call does it
                self._cut(descriptor)
            raise
        self.size += written

    def close(self) -> None:
        """No more is written."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        """Close what nobody closed."""
        self.close()

    def __enter__(self) -> AppendLog:
        """As it is."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def _cut(self, descriptor: int) -> None:
        """Cut off what does not count."""
        if self._regular:
            os.ftruncate(descriptor, self.size)
        self._torn = False


class Line(NamedTuple):
    """A line of a file.

    Attributes:
        number: its 1-based number.
        content: the line without its end.
        end: bytes of the file up to its end.
        whole: whether it was written to its end; only the last one may not be.
    """

    number: int
    content: bytes
    end: int
    whole: bool


def read_lines(path: Path, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Line]:
    """Lines of a file, one at a time in memory.

    Args:
        path: path of the file.
        max_line_bytes: most bytes of a line.

    Raises:
        InputError: a line is longer; names it.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        number = end = 0
        while content := file.readline(max_line_bytes + 1):
            number, end = number + 1, end + len(content)
            whole = content.endswith(b"\n")
            if len(content) > max_line_bytes and not whole:
                reason = f"expected a line of at most {max_line_bytes:,} bytes, found a longer one"
                raise InputError(reason, file=str(path), line=number)
            yield Line(number, content.removesuffix(b"\n"), end, whole)


def write_lines(path: Path, *lines: bytes) -> int:
    """Write a file anew, whole or not at all. It outlives this process; the machine need not have it on disk.

    Args:
        path: path of the file; an existing one is replaced.
        lines: lines without their ends.

    Returns:
        Its size (bytes).

    Raises:
        OSError: it cannot be written; an existing file is as it was.
        ValueError: a line is longer than `MAX_LINE_BYTES`, or is two.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with suppress(FileNotFoundError):
            temporary.unlink()
        with AppendLog(temporary, sync=False) as log:
            log.append(*lines)
            temporary.replace(path)
            return log.size
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _check(line: bytes) -> None:
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"expected at most {MAX_LINE_BYTES:,} bytes, found {len(line):,}")
    if b"\n" in line:
        raise ValueError("expected one line, found two")


def _open_locked(path: Path, flags: int) -> tuple[int, os.stat_result]:
    """A descriptor of the file that has the name, even if another process moves one away meanwhile."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | flags, 0o666)
        try:
            lock(descriptor)
            status = os.fstat(descriptor)
            if os.path.samestat(status, os.stat(path)):
                return descriptor, status
        except FileNotFoundError:
            pass  # it was moved away, and its place is empty
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _end_of_lines(descriptor: int, size: int) -> int:
    """Bytes of a file up to the end of its last whole line."""
    while size:
        start = max(0, size - _BLOCK)
        block = os.pread(descriptor, size - start, start)
        found = block.rfind(b"\n")
        if found >= 0:
            return start + found + 1
        size = start
    return 0
