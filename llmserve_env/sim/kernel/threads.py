"""Threads that serve the episodes of a batch together.

Waking a sleeping thread takes as long as serving some dozen episodes. So a helper looks at the board for a
moment after each window, and only then sleeps; for how long depends on the time between the last two
windows. Thread 0, which asked for the window, looks in the same way for what its helpers still have in hand.
Nobody waits for a helper that has not come: the others serve its slice.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmserve_env.errors import InputError
from llmserve_env.sim.kernel.serve import AWAKE, FAILED, JOB, LEAVE, LOOK, NEXT, ROW, WAIT, serve
from llmserve_env.sim.state import Batch

_SHORTEST_LOOK_S, _LONGEST_LOOK_S = 100e-6, 1e-3
"""For how long a thread looks for what another one does before it sleeps."""
_TIMED_TURNS = 2000
"""Turns by which it is found how long one takes."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def checked_threads(threads: int | None) -> int:
    """A number of threads, at least one; None: as many as this process has cores.

    Raises:
        InputError: it is less than 1.
    """
    if threads is None:
        return cores()
    if threads < 1:
        raise InputError(f"expected 1 or more, found {threads}", field="threads")
    return threads


def new_board(threads: int, episodes: int) -> NDArray[np.int64]:
    """A board for so many threads, on which no episode is to be served."""
    board = np.zeros((threads + 1) * ROW, np.int64)
    board[NEXT : threads * ROW : ROW] = episodes
    return board


def serve_batch(batch: Batch, actions: Any, start_ps: Any, until_ps: Any) -> None:
    """Serve one window of each episode of a batch, on as many threads as its board is for.

    The results do not depend on their number.

    Args:
        batch: its records are changed in place.
        actions: ACTION[episode].
        start_ps: int64[episode], start of the window.
        until_ps: int64[episode], its end; negative: the episode is left alone.
    """
    board = batch.board
    shared = len(board) - ROW
    job = int(board[shared + JOB]) + 1
    if shared == ROW:
        serve(batch, actions, start_ps, until_ps, 0, job)
        return
    with _crew.turn:  # helpers work for one caller at a time
        board[shared + LOOK], board[shared + WAIT] = _crew.looks(batch)
        helpers = _crew.helpers(shared // ROW - 1)
        for helper in helpers:
            helper.wake(batch)
        interrupt = None
        left = 1
        while left > 0:
            try:
                left = serve(batch, actions, start_ps, until_ps, 0, job)
                if left > 0:
                    _crew.told.get()
            except KeyboardInterrupt as error:  # what is begun is brought to its end
                interrupt = error
        if left < 0:
            board[shared + LEAVE] = 1
            while board[ROW + AWAKE : shared : ROW].any():
                time.sleep(1e-3)
        _crew.ended_s = time.perf_counter()
        for helper in helpers:
            helper.check()
        if interrupt is not None:
            raise interrupt


class _Helper:
    """A thread that serves slices while the process lives.

    Args:
        number: number of its slice.
        told: where it says that it has served some of it while somebody sleeps.
    """

    def __init__(self, number: int, told: SimpleQueue[None]) -> None:
        self._number = number
        self._told = told
        self._asked: SimpleQueue[Batch | None] = SimpleQueue()
        self._board = new_board(1, 0)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="llmserve-kernel", daemon=True)
        self._thread.start()

    def wake(self, batch: Batch) -> None:
        """Make sure that it looks at the board of a batch."""
        board, awake = batch.board, self._number * ROW + AWAKE
        if self._board is not board:
            self._leave()
            self._board = board
        elif board[awake]:
            return
        board[awake] = 1
        self._asked.put(batch)

    def check(self) -> None:
        """Raise what it has failed with."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def end(self) -> None:
        """Have it end, and wait until it has."""
        self._leave()
        self._asked.put(None)
        self._thread.join(timeout=1.0)

    def _leave(self) -> None:
        self._board[len(self._board) - ROW + LEAVE] = 1

    def _run(self) -> None:
        while (batch := self._asked.get()) is not None:
            try:
                while serve(batch, batch.actions, batch.start_ps, batch.until_ps, self._number, 0):
                    self._told.put(None)
            except BaseException as error:
                self._error = error
                batch.board[self._number * ROW + AWAKE] = 0
                batch.board[self._number * ROW + FAILED] = 1
                self._told.put(None)
            del batch  # which nobody may want any more


class _Crew:
    """The helpers of this process."""

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self.told: SimpleQueue[None] = SimpleQueue()
        self._helpers: list[_Helper] = []
        self._turns_per_s: float | None = None
        self.ended_s = 0.0

    def helpers(self, count: int) -> list[_Helper]:
        """So many of them."""
        while len(self._helpers) < count:
            self._helpers.append(_Helper(len(self._helpers) + 1, self.told))
        return self._helpers[:count]

    def looks(self, batch: Batch) -> tuple[int, int]:
        """Turns for which helpers look for the next window, and thread 0 for the end of this one."""
        if len(batch.board) // ROW - 1 > cores():
            return 0, 0  # somebody else needs the core
        if self._turns_per_s is None:
            self._turns_per_s = _turns_per_s(batch)
        twice_s = 2 * (time.perf_counter() - self.ended_s)
        look_s = max(twice_s, _SHORTEST_LOOK_S) if twice_s < _LONGEST_LOOK_S else _SHORTEST_LOOK_S
        return int(look_s * self._turns_per_s), int(_SHORTEST_LOOK_S * self._turns_per_s)

    def end(self) -> None:
        """End all of them."""
        for helper in self._helpers:
            helper.end()
        self._helpers.clear()


def _turns_per_s(batch: Batch) -> float:
    """How often a second a helper looks at the board."""
    board = new_board(2, len(batch.cells))
    board[2 * ROW + LOOK] = _TIMED_TURNS
    elapsed_s = []
    for _ in range(3):
        begun = time.perf_counter()
        serve(batch._replace(board=board), batch.actions, batch.start_ps, batch.until_ps, 1, 0)
        elapsed_s.append(time.perf_counter() - begun)
    return _TIMED_TURNS / min(elapsed_s)


_crew = _Crew()


def _after_fork() -> None:
    """A child has none of its parent's threads."""
    global _crew  # noqa: PLW0603
    _crew = _Crew()


def _end() -> None:
    """Machine code must not be taken from under a thread."""
    _crew.end()


atexit.register(_end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
