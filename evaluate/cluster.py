"""Jobs on a Ray cluster: those of `evaluate.jobs`, parted alike, so that they come out the same bit for bit.

The nodes play with the code that they have, and it must be the one here: a checkout at the same path with the
same libraries, as in an image or a shared file system.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import llmserve_env
from evaluate.jobs import Job, Setting, play_job
from llmserve_env.agents.find import policy_folder
from llmserve_env.agents.policy import CONFIG, WEIGHTS
from llmserve_env.errors import InputError
from llmserve_env.play import Played

LOCAL = "local"
RETRIES = 3
"""How often a job begins again because its node or process was lost."""


def play_on_cluster(jobs: Sequence[Job], address: str, processes: int = 1) -> Iterator[tuple[Job, Played]]:
    """Play jobs on all nodes of a cluster, one on each of their CPUs; results come as they are done.

    Args:
        jobs: what is played.
        address: "auto", HOST:PORT or ray://HOST:PORT; "local" starts a cluster here and ends it.
        processes: of the cluster that is started here.

    Raises:
        InputError: Ray is not installed, no cluster answers, a node has other code or files, a job cannot be
            played.
    """
    if not jobs:
        return
    ray = _connect(address, processes)
    try:
        play_there = ray.remote(num_cpus=1, max_retries=RETRIES, scheduling_strategy="SPREAD")(_play)
        waiting = {
            play_there.remote(job, os.getcwd(), _fingerprint(job.agent, job.setting)): job for job in jobs
        }
        nodes: Counter[str] = Counter()
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            played, node = _result(ray, done)
            nodes[node] += 1
            yield waiting.pop(done), played
        print(f"played {len(jobs)} jobs on {len(nodes)} nodes", file=sys.stderr)
    finally:
        ray.shutdown()


def _connect(address: str, processes: int) -> Any:
    """The module `ray`, connected."""
    try:
        ray = import_module("ray")
    except ImportError as error:
        raise InputError("the package ray is missing: pip install ray", field="ray") from error
    host, colon, port = address.rpartition(":")
    if not colon and address not in (LOCAL, "auto"):
        raise InputError(f"expected local, auto or HOST:PORT, found '{address}'", field="ray")
    try:
        if colon:  # Ray itself goes on trying for a minute, and may end the process then
            socket.create_connection((host.rpartition("/")[2].strip("[]"), int(port)), timeout=10).close()
        started = {"num_cpus": processes, "include_dashboard": False} if address == LOCAL else {}
        ray.init(address, log_to_driver=False, logging_level="WARNING", **started)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise InputError(f"no Ray cluster at '{address}': {error}", field="ray") from error
    return ray


def _play(job: Job, folder: str, expected: str) -> tuple[Played, str]:
    """A job's episodes, and the node that played them.

    Args:
        job: to play, on a node.
        folder: in which the command runs that asks for it; paths of policies and tasks may start there.
        expected: fingerprint of what it is to play with.
    """
    node: str = import_module("ray").get_runtime_context().get_node_id()
    if os.path.isdir(folder):
        os.chdir(folder)
    if _fingerprint(job.agent, job.setting) != expected:
        raise InputError(
            f"node {node} ({socket.gethostname()}) has other code, libraries, tasks or weights than this "
            f"machine in {folder}",
            field="ray",
        )
    return play_job(job), node


def _result(ray: Any, done: Any) -> tuple[Played, str]:
    try:
        played: tuple[Played, str] = ray.get(done)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise InputError(f"the cluster lost a job {RETRIES + 1} times: {error}", field="ray") from error
    return played


@cache
def _fingerprint(agent: str, setting: Setting) -> str:
    """SHA-256 of all on which an agent's results depend."""
    task = setting.open()
    found = hashlib.sha256(_code().encode() + task.model_dump_json().encode())
    folder = policy_folder(agent, task)
    if folder is not None:
        found.update((folder / CONFIG).read_bytes() + (folder / WEIGHTS).read_bytes())
    return found.hexdigest()


@cache
def _code() -> str:
    """SHA-256 of the sources, and of the versions of Python and of what computes."""
    import numba
    import numpy as np

    found = hashlib.sha256(f"{sys.version_info[:2]} {np.__version__} {numba.__version__}".encode())
    root = Path(llmserve_env.__file__).parent
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".toml"):
            found.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    found.update(Path(__file__).with_name("jobs.py").read_bytes())
    return found.hexdigest()
