"""A worker process that looks through what clients sent, and that can be killed.

A scenario may ask for any number of requests and a log may name any. What they cost is found by playing them
once within bounds of time and memory, where going past a bound harms nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import multiprocessing
import os
import pickle
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from pebble import ProcessExpired, ProcessPool

from llmserve_env.errors import InputError
from server.messages.refusals import AtCapacity, Unavailable

if TYPE_CHECKING:
    from server.settings import Settings

P = ParamSpec("P")
R = TypeVar("R")


class Guard:
    """Runs functions in the worker, one after the other.

    Args:
        settings: bounds.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._waiting = 0
        self._pool: ProcessPool | None = None

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The result of a function that can be imported, with arguments that can be pickled.

        Raises:
            AtCapacity: too many wait already.
            InputError: it took too much time or memory; or what the function raised.
            Unavailable: the process does not start.
        """
        settings = self._settings
        if self._waiting >= settings.guard_queue:
            raise AtCapacity(f"{self._waiting} requests wait to be looked through", settings.guard_timeout_s)
        self._waiting += 1
        try:
            # Not by the pool: what cannot be pickled ends its thread, and with that the pool.
            task = pickle.dumps((function, args, kwargs))
            future = self._started().schedule(_run, args=[task], timeout=settings.guard_timeout_s)
            result: R = await asyncio.wrap_future(future)
            return result
        except (FutureTimeout, asyncio.TimeoutError):
            raise InputError(f"takes longer than the {settings.guard_timeout_s:g} s that there are") from None
        except RecursionError:
            raise InputError("is nested too deeply") from None
        except ProcessExpired:
            memory = f"{settings.guard_memory_gb:g} GB"
            raise InputError(f"takes more than the {memory} of memory that there are") from None
        except BrokenProcessPool as error:
            raise Unavailable("the process that looks through what clients send does not start") from error
        finally:
            self._waiting -= 1

    async def start(self) -> None:
        """Have the worker load what it needs, which takes seconds, before somebody waits for it."""
        await self.run(_nothing)

    def close(self) -> None:
        """End the worker."""
        if self._pool is not None:
            self._pool.stop()  # type: ignore[no-untyped-call]
            self._pool.join()
            self._pool = None

    def _started(self) -> ProcessPool:
        if self._pool is None or not self._pool.active:
            self._pool = ProcessPool(
                max_workers=1,
                context=multiprocessing.get_context("spawn"),
                initializer=_limit,
                initargs=[self._settings.guard_memory_gb],
            )
        return self._pool


def _nothing() -> None:
    pass


def _run(task: bytes) -> Any:
    function, args, kwargs = pickle.loads(task)
    try:
        return function(*args, **kwargs)
    except (MemoryError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOMEM:
            raise
        os._exit(1)  # not all that it took is given back: the next one gets a new process


def _limit(memory_gb: float) -> None:
    """Load the code, then bound what more memory the process gets."""
    import llmserve_env.episode
    import llmserve_env.grading  # noqa: F401

    with contextlib.suppress(ImportError, OSError, ValueError):  # not on every system
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + int(memory_gb * 1e9)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
