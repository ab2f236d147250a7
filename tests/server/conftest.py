"""A server for the tests, in a process of its own as its users have it."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

_START_S = 60


class Server(NamedTuple):
    """A server and where it is."""

    url: str
    process: subprocess.Popen[str]


@contextmanager
def started(*options: str, messages: Path | None = None) -> Iterator[Server]:
    """A server with these options, which ends with the block; its messages go to a file if one is named."""
    command = [sys.executable, "-m", "server.app", "--port", "0", "--no-web", *options]
    with ExitStack() as stack:
        stderr = stack.enter_context(messages.open("w")) if messages else None
        process = stack.enter_context(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        )
        try:
            assert process.stdout is not None
            url = process.stdout.readline().removeprefix("listening on ").strip()
            assert url, "the server did not start: its reason is on stderr"
            urllib.request.urlopen(f"{url}/health", timeout=_START_S).close()  # it is ready
            yield Server(url, process)
        finally:
            process.terminate()
            process.wait(_START_S)


@contextmanager
def running(*options: str) -> Iterator[str]:
    """The URL of a server with these options, which ends with the block."""
    with started(*options) as server:
        yield server.url


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """The URL of a server that all tests share."""
    with running() as url:
        yield url


@pytest.fixture(scope="session")
def single_url() -> Iterator[str]:
    """The URL of a server with room for one session; a test leaves none behind."""
    with running("--max-sessions", "1") as url:
        yield url


@pytest.fixture(scope="session")
def tight_url() -> Iterator[str]:
    """The URL of a server that allows little, so that tests can ask for more."""
    with running(
        *(
            "--max-body-bytes",
            "20000",
            "--max-actions",
            "8",
            "--max-windows",
            "400",
            "--max-requests",
            "4000",
        ),
        *("--guard-timeout-s", "60", "--guard-memory-gb", "0.5"),
    ) as url:
        yield url


def ends(url: str, session_id: str) -> bool:
    """Whether a session ends now: the server hears soon that its connection is closed."""
    named = {"X-Session-Id": session_id}
    return any(httpx.get(f"{url}/state", headers=named, timeout=60).status_code == 404 for _ in range(1000))
