"""The way into the kernel: one window of each of n episodes."""

from __future__ import annotations

from llmserve_env.compiled import entry, part
from llmserve_env.compiled.atomic import add, give_way, load, store
from llmserve_env.sim.kernel.blocks import reset_blocks
from llmserve_env.sim.kernel.cell import serve_window
from llmserve_env.sim.kernel.record import apply, record
from llmserve_env.sim.state import Service

# The board on which threads tell each other where they are: a row for each thread, and one for all. A row is
# two cache lines long, so that no thread writes where another one is looking.
ROW = 16
NEXT = 0  # of a thread: the episode of its slice that is served next, by whoever takes it
DONE = 1  # episodes that it has served in this window
AWAKE = 2  # whether it looks at the board
FAILED = 3
JOB = 0  # for all: number of the window
WAITING = 1  # whether thread 0 sleeps until it is told that more is done
LEAVE = 2  # whether the helpers are needed elsewhere
LOOK = 3  # turns for which a helper looks for the next window before it sleeps
WAIT = 4  # turns for which thread 0 looks for its helpers' last episodes before it sleeps


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


@part
def wait(board, episodes):
    """Look whether all episodes are served; returns how many are not after a while, -1 after a failure."""
    threads = len(board) // ROW - 1
    shared = threads * ROW
    turns = 0
    while True:
        left = episodes
        failed = 0
        for thread in range(threads):
            left -= load(board, thread * ROW + DONE)
            failed += load(board, thread * ROW + FAILED)
        if left == 0:
            return 0
        if failed > 0:
            return -1
        if load(board, shared + WAITING) != 0:
            return left
        if turns >= board[shared + WAIT]:
            store(board, shared + WAITING, 1)  # and look once more
        turns += 1
        give_way()


@entry("some 15 s")
def serve(digest):
    """Serve one window of each episode of a batch, together with other threads that call it.

    Thread 0 begins a window and returns when it is served; the others are its helpers. Each thread serves its
    own slice of the episodes, then what is left of the others'. No episode depends on another.

    Args of the compiled function:
        b: Batch, its records changed in place; `windows` is filled.
        actions: ACTION[episode].
        start_ps: int64[episode], start of the window.
        until_ps: int64[episode], its end; every decision before it is taken. Negative: the episode is left
            alone.
        me: number of this thread.
        job: number of the window. Thread 0 begins it where it is not the board's own.

    Returns:
        Thread 0: episodes that helpers are still serving, -1 where a helper has failed. A helper: whether
        thread 0 sleeps until it is told that more episodes are served.
    """

    def serve(b, actions, start_ps, until_ps, me, job):
        digest  # noqa: B018 - of all that is compiled here: a part of the cache's key
        board, episodes = b.board, len(b.cells)
        threads = len(board) // ROW - 1
        shared, mine = threads * ROW, me * ROW
        if me == 0 and job != board[shared + JOB]:
            for i in range(episodes):
                b.actions[i] = actions[i]
                b.start_ps[i] = start_ps[i]
                b.until_ps[i] = until_ps[i]
            store(board, shared + LEAVE, 0)
            store(board, shared + WAITING, 0)
            for thread in range(threads):
                store(board, thread * ROW + DONE, 0)
                store(board, thread * ROW + FAILED, 0)
            for thread in range(threads):
                store(board, thread * ROW + NEXT, episodes * thread // threads)
            store(board, shared + JOB, job)
        if me > 0:
            store(board, mine + AWAKE, 1)
        while True:
            seen = load(board, shared + JOB)
            done = 0
            for other in range(threads):
                thread = (me + other) % threads
                high = episodes * (thread + 1) // threads
                while load(board, thread * ROW + NEXT) < high:
                    i = add(board, thread * ROW + NEXT, 1)
                    if i >= high:
                        break
                    if b.until_ps[i] >= 0:
                        serve_episode(b, i, b.actions[i], b.start_ps[i], b.until_ps[i])
                    done += 1
            if done > 0:
                add(board, mine + DONE, done)
            if me == 0:
                return wait(board, episodes)
            if load(board, shared + WAITING) != 0:
                store(board, shared + WAITING, 0)
                return 1
            turns = 0
            while load(board, shared + JOB) == seen:
                if turns >= load(board, shared + LOOK) or load(board, shared + LEAVE) != 0:
                    store(board, mine + AWAKE, 0)
                    return 0
                turns += 1
                give_way()

    return serve
