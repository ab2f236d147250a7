"""The way into the kernel: one window of each of n episodes."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
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
    rest = [
        _threads(threads - 1).submit(serve, batch, actions, start_ps, until_ps, low, high)
        for low, high in pairwise(edges[1:])
    ]
    serve(batch, actions, start_ps, until_ps, 0, edges[1])
    for each in rest:
        each.result()


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "llmserve-kernel")


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_threads.cache_clear)
