"""Locks on files and folders: one process at a time, and never longer than it lives."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

from llmserve_env.errors import InputError


def lock(descriptor: int) -> None:
    """Lock an open file or folder for this process, until the descriptor is closed or the process ends.

    Raises:
        BlockingIOError: somebody else holds it.
        OSError: it cannot be locked there.
    """
    import fcntl  # on Linux and macOS: elsewhere a package that never locks can still be imported

    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


class FolderLock:
    """A folder that belongs to one process. Nothing is written to it.

    Args:
        folder: existing folder.
        owner: who else may hold it, for the refusal, such as "another gateway".

    Raises:
        InputError: somebody else holds it, or it is no folder that can be locked; names it.
    """

    def __init__(self, folder: Path, owner: str) -> None:
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise InputError(f"expected a folder: {error.strerror}", file=str(folder)) from error
        self._close = weakref.finalize(self, os.close, descriptor)  # also of an owner that nobody closes
        try:
            lock(descriptor)
        except OSError as error:
            self._close()
            held = isinstance(error, BlockingIOError)
            reason = f"{owner} uses this folder" if held else f"cannot be locked: {error.strerror or error}"
            raise InputError(reason, file=str(folder)) from error

    def close(self) -> None:
        """Let others have it."""
        self._close()
