"""Entries: the compiled functions that Python calls."""

from __future__ import annotations

import gc
import sys
import threading
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from numba import config

from llmserve_env.compiled.linking import whole
from llmserve_env.compiled.stamp import stamp
from llmserve_env.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SAY_AFTER_S = 2.0


class Entry:
    """A compiled function that Python calls.

    It is compiled, or loaded from the cache, at the first call. A line on stderr tells of a compilation
    that takes longer than two seconds.

    Args:
        factory: makes the Python function for the digest that it has to name.
        duration: about how long it takes to compile, for people.
    """

    def __init__(self, factory: Callable[[int], Callable[..., Any]], duration: str) -> None:
        self.__doc__, self.__module__ = factory.__doc__, factory.__module__
        self._factory = factory
        self._duration = duration
        self._lock = threading.Lock()
        self._run: Callable[..., Any] = self._first

    def __call__(self, *args: Any) -> Any:
        """Run it.

        Raises:
            InputError: NUMBA_DISABLE_JIT is set: what is compiled here cannot run as Python.
        """
        return self._run(*args)

    @property
    def digest(self) -> int:
        """Digest of everything that it is compiled from."""
        return stamp(self._factory)

    def __reduce__(self) -> str:
        return self._factory.__name__

    def _first(self, *args: Any) -> Any:
        """Compile it, or load it, and run it."""
        with self._lock:
            if self._run == self._first:
                dispatcher, kept = self._dispatcher()
                with _told(self._factory.__name__, self._duration, kept), _no_collection():
                    dispatcher.compile(tuple(dispatcher.typeof_pyval(arg) for arg in args))
                self._run = dispatcher
        return self._run(*args)

    def _dispatcher(self) -> tuple[Any, str]:
        """The function to compile, and where the result is kept."""
        if config.DISABLE_JIT:  # type: ignore[attr-defined] # set when Numba is imported
            raise InputError("the simulator runs only compiled: unset it", field="NUMBA_DISABLE_JIT")
        function = self._factory(self.digest)
        try:
            dispatcher = whole(function, cache=True)
        except RuntimeError:  # no folder that can be written
            return whole(function, cache=False), "set NUMBA_CACHE_DIR to a folder in which it can be kept"
        return dispatcher, f"kept in {dispatcher.stats.cache_path}"


def entry(duration: str) -> Callable[[Callable[[int], Callable[..., Any]]], Entry]:
    """Decorates a function that takes a digest and returns the one to compile, which must name the digest.

    Args:
        duration: about how long it takes to compile, for people.
    """
    return partial(Entry, duration=duration)


@contextmanager
def _told(name: str, duration: str, kept: str) -> Iterator[None]:
    """Say what is going on where it takes longer than somebody waits without wondering."""

    def tell() -> None:
        text = f"llmserve: compiling the simulator ({name}), {duration}, once on this machine; {kept}"
        if sys.stderr is not None:  # print would take stdout
            print(text, file=sys.stderr, flush=True)

    timer = threading.Timer(_SAY_AFTER_S, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Leave the garbage of a compilation for later: looking for it takes a tenth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
