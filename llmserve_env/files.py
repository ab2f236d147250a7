"""Writing result files so that a reader never meets a half-written one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from llmserve_env.errors import InputError


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
