"""Work in the background: whatever a turn raises, the next one comes, and the log is told once."""

from __future__ import annotations

import asyncio
import logging
import sys

import pytest

from llmserve_env.net.loops import Failures, forever


def turns(raised, *, coroutine):
    """A turn that raises these, one after the other, None for nothing; and an event for its last."""
    left, over = list(raised), asyncio.Event()

    def turn():
        error = left.pop(0) if left else None
        if not left:
            over.set()
        if error is not None:
            raise error

    async def later():
        turn()

    return (later if coroutine else turn), over


async def play(raised, *, coroutine=False):
    turn, over = turns(raised, coroutine=coroutine)
    task = asyncio.create_task(forever(turn, 0.0, "the test"))
    await asyncio.wait_for(over.wait(), 60)
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()


class Unsayable(Exception):
    def __str__(self):
        raise RuntimeError


@pytest.mark.parametrize("coroutine", [False, True])
@pytest.mark.parametrize(
    "error",
    [ValueError("boom"), OSError(28, "No space left"), RecursionError(), MemoryError(), Unsayable()],
    ids=lambda error: type(error).__name__,
)
def test_a_turn_that_raises_is_not_the_last(error, coroutine, caplog):
    asyncio.run(play([error, None, None], coroutine=coroutine))
    assert type(error).__name__ in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.WARNING]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="nothing tells the two apart")
def test_what_a_turn_waited_for_may_be_cancelled():
    async def scenario():
        gone = asyncio.get_running_loop().create_future()
        gone.cancel()
        seen = asyncio.Event()
        count = 0

        async def turn():
            nonlocal count
            count += 1
            if count > 1:
                seen.set()
            await gone

        task = asyncio.create_task(forever(turn, 0.0, "the test"))
        await asyncio.wait_for(seen.wait(), 60)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()

    asyncio.run(scenario())


def test_a_failure_is_told_once_and_every_other_one(caplog):
    errors = [OSError(28, "No space", "/log/1"), OSError(28, "No space", "/log/22"), OSError(30, "Read-only")]
    asyncio.run(play([errors[0], errors[1], errors[2], errors[2], None, None, errors[2], None]))
    said = [record.getMessage() for record in caplog.records]
    assert [("/log/1" in each, "Read-only" in each, "works again" in each) for each in said] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
        (False, True, False),
        (False, False, True),
    ]


def test_threads_tell_alike(caplog):
    failures = Failures("the thread")
    for error in (ValueError("a"), ValueError("a"), KeyError("a")):
        failures.tell(error)
    failures.end()
    failures.end()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "the thread failed, and goes on",
        "the thread failed, and goes on",
        "the thread works again",
    ]
