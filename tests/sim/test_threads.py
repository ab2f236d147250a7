"""Threads that serve a batch: the same bytes whoever serves which episode, and no end that hangs."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest

from llmserve_env.controls import to_array
from llmserve_env.schema import ServeAction
from llmserve_env.sim.kernel import threads as kernel_threads
from llmserve_env.sim.simulator import SimulatorBatch

from .cells import ANYONE, PROFILE, random_workload

EPISODES = 7
WINDOWS = 5
ENDS = """
from llmserve_env.envs.vector_env import LLMServeVectorEnv

env = LLMServeVectorEnv(8, threads=2, horizon_s=20.0)
env.reset(seed=0)
env.step(env.action_space.sample())
"""


def batch(threads):
    rng = np.random.default_rng(5)
    workloads = [random_workload(rng, int(n), ANYONE, shared=False) for n in rng.integers(20, 200, EPISODES)]
    return SimulatorBatch(PROFILE, workloads, engines=2, threads=threads)


def steps(served):
    """Serve some windows, not all of every episode, and return after each what the batch has come to."""
    rng = np.random.default_rng(6)
    for _ in range(WINDOWS):
        which = rng.random(EPISODES) < 0.8
        actions = to_array([ServeAction(batch_cap=int(cap)) for cap in rng.integers(1, 64, EPISODES)])
        served.serve(actions, 1.0, which)
        yield served.windows.tobytes() + served.outcomes.tobytes() + served.slots.tobytes()


@pytest.fixture
def alone():
    return list(steps(batch(1)))


@pytest.mark.parametrize("threads", [2, 3, 9])
@pytest.mark.parametrize("cores", [1, 64], ids=["asleep", "looking"])
def test_any_number_of_threads_gives_the_same_bytes(monkeypatch, alone, threads, cores):
    monkeypatch.setattr(kernel_threads, "cores", lambda: cores)
    assert list(steps(batch(threads))) == alone


def test_batches_that_take_turns_do_not_meet(alone):
    for both in zip(steps(batch(2)), steps(batch(3)), alone, strict=True):
        assert both[0] == both[1] == both[2]


def test_nobody_waits_for_a_helper_that_does_not_come(monkeypatch, alone):
    monkeypatch.setattr(kernel_threads._Helper, "wake", lambda self, batch: None)
    assert list(steps(batch(3))) == alone


@pytest.mark.parametrize("left", [0, -1], ids=["served by others", "given up"])
def test_a_failure_of_a_helper_is_raised_and_the_next_window_is_served(monkeypatch, alone, left):
    serve, failed = kernel_threads.serve, threading.Event()

    def fails_once(*args):
        if failed.is_set():
            return serve(*args)
        if threading.current_thread().name == "llmserve-kernel":
            failed.set()
            raise MemoryError("no room")
        failed.wait()
        return serve(*args) or left

    served = steps(batch(2))
    assert next(served) == alone[0]
    monkeypatch.setattr(kernel_threads, "serve", fails_once)
    rest = batch(2)
    with pytest.raises(MemoryError, match="no room"):
        next(steps(rest))
    assert list(served) == alone[1:]


def test_an_interrupt_comes_when_the_window_is_served(monkeypatch, alone):
    serve, interrupts = kernel_threads.serve, [KeyboardInterrupt()]

    def interrupted(*args):
        left = serve(*args)
        if interrupts and args[4] == 0:
            raise interrupts.pop()
        return left

    served = batch(2)
    monkeypatch.setattr(kernel_threads, "serve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(steps(served))
    assert served.windows.tobytes() + served.outcomes.tobytes() + served.slots.tobytes() == alone[0]


def test_a_process_ends_while_its_helpers_look_for_work():
    subprocess.run([sys.executable, "-c", ENDS], check=True)
