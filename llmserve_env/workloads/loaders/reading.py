"""From a file to text: gzip or not, byte order mark or not, any line ending."""

from __future__ import annotations

from pathlib import Path

from llmserve_env.errors import InputError
from llmserve_env.files import read_bytes

FILE_BYTES = 4 * 2**30
"""Longest trace that is read; it takes several times as much memory."""
LINE_BYTES = 256 * 2**20
"""Longest line of a trace."""


def read_text(path: Path | str, longest_line: int | None = None) -> str:
    r"""The text of a file, unpacked if it is gzip, with "\n" line endings and no byte order mark.

    Args:
        path: the file, of at most `FILE_BYTES`.
        longest_line: bytes that a line may have (default: any number).

    Raises:
        InputError: the file cannot be opened, is damaged gzip, is not UTF-8 text, is empty, or is too long.
    """
    name = str(path)
    data = read_bytes(path, FILE_BYTES, packed=None, longest_line=longest_line)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"expected UTF-8 text, byte {error.start} is none", file=name) from error
    if "\0" in text:
        raise InputError("expected text, found a NUL byte: is this a binary file?", file=name)
    if not text.strip():
        raise InputError("is empty", file=name)
    return text.replace("\r\n", "\n").replace("\r", "\n")
