"""Work in the background that outlives what fails in it."""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import time
import traceback
from collections.abc import Callable

from llmserve_env.errors import InputError

_LONGEST = 1000  # characters of a reason
_log = logging.getLogger(__name__)


async def forever(turn: Callable[[], object], interval_s: float, name: str) -> None:
    """Call a function again and again, until cancelled. Whatever it raises, its next turn comes.

    The first turn comes at once. A turn that takes longer than the interval is followed by the next at once.

    Args:
        turn: function without arguments, plain or a coroutine function. It bounds its own time: nobody ends
            a turn that hangs.
        interval_s: time from the beginning of a turn to that of the next (s).
        name: what fails, for the log.

    Example:
        >>> task = asyncio.create_task(forever(gateway.tick, 0.1, "the gateway's tick"))
        >>> ...
        >>> task.cancel()
    """
    failures = Failures(name)
    while True:
        begun_s = time.monotonic()
        try:
            awaited = turn()
            if inspect.isawaitable(awaited):
                await awaited
        except asyncio.CancelledError as error:
            if _is_cancelled():
                raise
            failures.tell(error)  # of something that the turn waited for
        except Exception as error:
            failures.tell(error)
        else:
            failures.end()
        await asyncio.sleep(max(0.0, begun_s + interval_s - time.monotonic()))


class Failures:
    """Tells the log of failures in work that goes on: of each once, until it changes or is over.

    Failures are alike that have the same type and the same words, whatever their numbers.

    Args:
        name: what fails, for the log.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._told: str | None = None

    def tell(self, error: BaseException) -> None:
        """Say that it failed, unless that was said."""
        reason = "".join(traceback.format_exception_only(type(error), error)).strip()[:_LONGEST]
        kind = re.sub(r"\d+", "0", reason)
        if kind != self._told:
            trace = None if isinstance(error, InputError) else error  # that one says all
            _log.error("%s failed, and goes on: %s", self._name, reason, exc_info=trace)
        self._told = kind

    def end(self) -> None:
        """Say that it works again, if it failed before."""
        if self._told is not None:
            _log.warning("%s works again", self._name)
        self._told = None


def _is_cancelled() -> bool:
    """Whether the running task itself is to end."""
    task = asyncio.current_task()
    cancelling = getattr(task, "cancelling", None)  # from Python 3.11 on; before, nothing tells the two apart
    return cancelling is None or cancelling() > 0
