"""Who plays jobs: this process, others on this machine, or a Ray cluster."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from threading import Thread

from evaluate.cluster import play_on_cluster
from evaluate.jobs import Job, play_job
from llmserve_env.episode import prepare
from llmserve_env.play import Played


def play_jobs(
    jobs: Sequence[Job], processes: int, cluster: str | None = None
) -> Iterator[tuple[Job, Played]]:
    """Play jobs, in spawned processes if more than one is asked for; results come as they are done.

    Ctrl-C ends the processes with whoever iterates.

    Args:
        jobs: what is played.
        processes: to play in.
        cluster: address of the Ray cluster to play on instead, see `evaluate.cluster`.
    """
    prepare()  # once, before processes begin that would each do it
    if cluster is not None:
        yield from play_on_cluster(jobs, cluster, processes)
        return
    if processes < 2 or len(jobs) < 2:
        for job in jobs:
            yield job, play_job(job)
        return
    with ProcessPoolExecutor(
        min(processes, len(jobs)), mp_context=get_context("spawn"), initializer=_end_with_parent
    ) as pool:
        futures = {pool.submit(play_job, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _end_with_parent() -> None:
    """Only the process that gives the work out has something to say, and no other outlives it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C goes to all of them
    Thread(target=_await_parent, daemon=True).start()


def _await_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
