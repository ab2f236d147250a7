"""What a task waits for ends when it is cut off, and at no other time."""

from __future__ import annotations

import asyncio
import sys

import pytest

from llmserve_env.net.cutoff import Cutoff


async def wait_within(cutoff, found):
    try:
        with cutoff:
            await found
    except asyncio.TimeoutError:
        return "cut off"
    await asyncio.sleep(0)  # a cancellation that is left over would come here
    return "ended"


async def outcome(do, seconds=3600.0):
    """What becomes of a task that waits within a cutoff, when something is done to it."""
    cutoff, found = Cutoff(seconds), asyncio.get_running_loop().create_future()
    task = asyncio.ensure_future(wait_within(cutoff, found))
    await asyncio.sleep(0)
    do(cutoff, found, task)
    try:
        return await task
    except asyncio.CancelledError:
        return "cancelled"


def both(cutoff, found, task):
    cutoff.cut()
    task.cancel()


def found_first(cutoff, found, task):
    found.set_result(None)
    cutoff.cut()


async def late_cut():
    cutoff, found = Cutoff(3600.0), asyncio.get_running_loop().create_future()
    found.set_result(None)
    assert await wait_within(cutoff, found) == "ended"
    cutoff.cut()
    await asyncio.sleep(0)
    return "nothing"


@pytest.mark.parametrize(
    ("do", "becomes"),
    [
        (lambda cutoff, found, task: cutoff.cut(), "cut off"),
        (lambda cutoff, found, task: (cutoff.cut(), cutoff.cut()), "cut off"),
        (lambda cutoff, found, task: found.set_result(None), "ended"),
        (lambda cutoff, found, task: task.cancel(), "cancelled"),
        (found_first, "cut off"),  # it has not gone on yet
    ],
)
def test_only_what_is_cut_off_ends_so(do, becomes):
    assert asyncio.run(outcome(do)) == becomes


@pytest.mark.skipif(sys.version_info < (3, 11), reason="nothing tells two cancellations apart")
def test_a_task_that_is_cancelled_and_cut_off_is_cancelled():
    assert asyncio.run(outcome(both)) == "cancelled"


def test_time_cuts_off():
    assert asyncio.run(outcome(lambda cutoff, found, task: None, seconds=0.0)) == "cut off"


def test_a_cut_after_the_end_does_nothing():
    assert asyncio.run(late_cut()) == "nothing"
