"""An end to what a task waits for."""

from __future__ import annotations

import asyncio
import sys
from typing import Any


class Cutoff:
    """Ends what the current task awaits within it, after a time or when told, with asyncio.TimeoutError.

    `asyncio.wait_for` does so with another task, which often takes longer than what is waited for, and
    `asyncio.timeout` is not in Python 3.10.

    Args:
        seconds: time after which (s).

    Example:
        >>> with Cutoff(30.0) as cutoff:
        ...     message = await receive()  # another task's `cutoff.cut()` ends it before
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._task: asyncio.Task[Any] | None = None
        self._was_cut = False

    def __enter__(self) -> Cutoff:
        self._task = asyncio.current_task()
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self.cut)
        return self

    def cut(self) -> None:
        """End it; nothing where it has ended. Not for the task itself, which cannot wait meanwhile."""
        if self._task is not None and not self._was_cut:
            self._was_cut = True
            self._task.cancel()

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        self._timer.cancel()
        task, self._task = self._task, None
        if not self._was_cut or task is None:
            return
        # Before Python 3.11 nothing tells this cancellation from another one at the same time.
        others = task.uncancel() if sys.version_info >= (3, 11) else 0
        if kind is asyncio.CancelledError and not others:
            raise asyncio.TimeoutError from None
