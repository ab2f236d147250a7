"""An event loop whose time jumps: where nothing is left to do until a timer, it is the timer's turn at once.

Sockets are real ones. All that talks over them is in the loop, so that nothing can be under way while it has
nothing to do. An hour of waiting takes no time, and how fast the machine is changes nothing.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from time import sleep
from typing import Any, TypeVar
from unittest.mock import patch

T = TypeVar("T")

_TURN_S = 20e-6
"""What a turn of the loop takes of its time (s): a loop that is never idle has time limits, too."""
_THREADS_S = 60.0
"""Real time that work in threads has (s)."""


class _Selector(selectors.DefaultSelector):
    """Tells what is ready; where nothing is, time goes on to the next timer."""

    now_s = 1000.0
    threads = 0

    def select(self, timeout=None):
        self.now_s += _TURN_S
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        if self.threads or timeout is None:
            return super().select(_THREADS_S)
        sleep(0)  # so that the kernel can hand over what was just written
        ready = super().select(0)
        if not ready:
            self.now_s += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """The loop."""

    def __init__(self):
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self):
        return self._virtual.now_s

    def run_in_executor(self, executor, func, *args):
        future = super().run_in_executor(executor, func, *args)
        self._virtual.threads += 1

        def ended(_):
            self._virtual.threads -= 1

        future.add_done_callback(ended)
        return future


def run(main: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns, run in such a loop, whose time is `time.monotonic` meanwhile."""
    loop = VirtualTimeLoop()
    try:
        asyncio.set_event_loop(loop)
        with patch("time.monotonic", loop.time):
            return loop.run_until_complete(main)
    finally:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        asyncio.set_event_loop(None)
        loop.close()
