"""Writing result files so that a reader never meets a half-written one."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from llmserve_env.errors import InputError


def write_atomic(path: Path | str, content: str | bytes) -> None:
    """Write a file under a temporary name beside it, then rename: it appears whole or not at all.

    Args:
        path: the file; an existing one is replaced.
        content: text (written as UTF-8) or bytes.

    Raises:
        InputError: the file cannot be written there.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot be written: {error.strerror or error}", file=str(path)) from error
