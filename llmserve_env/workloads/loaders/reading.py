"""From a file to text: gzip or not, byte order mark or not, any line ending."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from llmserve_env.errors import InputError

_GZIP_MAGIC = b"\x1f\x8b"


def read_text(path: Path | str) -> str:
    r"""The text of a file, unpacked if it is gzip, with "\n" line endings and no byte order mark.

    Raises:
        InputError: the file cannot be opened, is damaged gzip, is not UTF-8 text, or is empty.
    """
    name = str(path)
    try:
        data = Path(path).read_bytes()
        if data.startswith(_GZIP_MAGIC):
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"damaged or truncated gzip: {error}", file=name) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"cannot be read: {reason}", file=name) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"expected UTF-8 text, byte {error.start} is none", file=name) from error
    if "\0" in text:
        raise InputError("expected text, found a NUL byte: is this a binary file?", file=name)
    if not text.strip():
        raise InputError("is empty", file=name)
    return text.replace("\r\n", "\n").replace("\r", "\n")
