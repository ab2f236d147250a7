"""The way into the kernel: one window of each of n episodes."""

from __future__ import annotations

import os
import threading
from functools import cache
from queue import SimpleQueue
from typing import Any

from llmserve_env.compiled import entry, part
from llmserve_env.sim.kernel.blocks import reset_blocks
from llmserve_env.sim.kernel.cell import serve_window
from llmserve_env.sim.kernel.record import apply, record
from llmserve_env.sim.state import Service


@part
def serve_episode(b, i, action, start_ps, until_ps):
    """Apply an action to episode i of a batch, serve one window of it, and record it."""
    low = b.first[i]
    high = low + b.cells[i].requests
    offsets = b.prefix_offsets
    if b.cells[i].blocks_per_id > 0:
        offsets = offsets[low + i : high + i + 1]
    s = Service(
        b.engines[i],
        b.slots,
        b.cells[i],
        b.windows[i],
        b.sums[i],
        b.requests[low:high],
        b.outcomes[low:high],
        b.tenants,
        b.accept,
        b.queue,
        b.nodes,
        b.table,
        offsets,
        b.prefix_ids,
        b.transfers[low:high],
        b.retries[low:high],
        b.cost,
    )
    for word in range(b.window_words.shape[1]):
        b.window_words[i, word] = 0
    for word in range(b.sum_words.shape[1]):
        b.sum_words[i, word] = 0
    if s.cell.begun == 0:
        for j in range(len(s.engines)):
            reset_blocks(s, s.engines[j])
        s.cell.begun = 1
    apply(s, action)
    serve_window(s, start_ps, until_ps)
    record(s, start_ps, until_ps)


@entry
def serve(digest):
    """Serve one window of each episode from `low` to `high` - 1 of a batch.

    Args of the compiled function:
        b: Batch, its records changed in place; `windows` is filled.
        actions: ACTION[episode].
        start_ps: int64[episode], start of the window.
        until_ps: int64[episode], its end; every decision before it is taken. Negative: the episode is left
            alone.
        low: first episode.
        high: the one after the last.
    """

    def serve(b, actions, start_ps, until_ps, low, high):
        digest  # noqa: B018 - of all that is compiled here: a part of the cache's key
        for i in range(low, high):
            if until_ps[i] >= 0:
                serve_episode(b, i, actions[i], start_ps[i], until_ps[i])

    return serve


def serve_on_threads(threads: int, batch: Any, actions: Any, start_ps: Any, until_ps: Any) -> None:
    """`serve` for all episodes of a batch, a slice on each of so many threads; the results are the same."""
    episodes = len(until_ps)
    edges = [episodes * i // threads for i in range(threads + 1)]
    asked = [_Helper.number(i) for i in range(threads - 1)]
    with _turn:  # helpers answer one caller at a time
        for helper, low, high in zip(asked, edges[1:-1], edges[2:], strict=True):
            helper.asked.put((batch, actions, start_ps, until_ps, low, high))
        try:
            serve(batch, actions, start_ps, until_ps, 0, edges[1])
        finally:
            failed = [error for error in [helper.done.get() for helper in asked] if error is not None]
    for error in failed:
        raise error


class _Helper:
    """A thread that serves slices while the process lives, without a pool's bookkeeping for every one."""

    def __init__(self) -> None:
        self.asked: SimpleQueue[tuple[Any, ...]] = SimpleQueue()
        self.done: SimpleQueue[BaseException | None] = SimpleQueue()
        threading.Thread(target=self._run, name="llmserve-kernel", daemon=True).start()

    def _run(self) -> None:
        while True:
            slice_ = self.asked.get()
            try:
                serve(*slice_)
                self.done.put(None)
            except BaseException as error:
                self.done.put(error)
            del slice_  # holds a batch that nobody may want any more

    @staticmethod
    @cache
    def number(index: int) -> _Helper:
        """The helper of this index in this process."""
        return _Helper()


_turn = threading.Lock()


def _after_fork() -> None:
    """A child has none of its parent's threads."""
    global _turn  # noqa: PLW0603
    _turn = threading.Lock()
    _Helper.number.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
