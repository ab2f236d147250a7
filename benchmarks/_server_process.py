"""The service in a process of its own, watched from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
"""Folder of the checkout that measures."""
_START_S = 120
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Service:
    """A running service.

    Args:
        url: where it is.
        pid: of its process; None if it is another machine's, and nothing is known of its memory and CPU.
    """

    def __init__(self, url: str, pid: int | None = None) -> None:
        self.url = url
        self.pid = pid

    @property
    def ws_url(self) -> str:
        """Address of its WebSocket."""
        return self.url.replace("http", "ws", 1) + "/ws"

    def rss_mb(self) -> float:
        """Memory of the process, without the guard's (MB; nan if unknown)."""
        if self.pid is None:
            return float("nan")
        for line in Path(f"/proc/{self.pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
        raise AssertionError("no VmRSS in /proc")

    def cpu_s(self) -> float:
        """CPU time that the process took (s; nan if unknown)."""
        if self.pid is None:
            return float("nan")
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * _TICK_S

    def get(self, path: str, session_id: str | None = None) -> int:
        """Status of a GET."""
        headers = {"X-Session-Id": session_id} if session_id else {}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.url + path, headers=headers), timeout=60
            ) as got:
                return int(got.status)
        except urllib.error.HTTPError as error:
            return error.code


def command_of(checkout: Path, module: str, *options: str) -> dict[str, Any]:
    """Arguments of `subprocess.Popen` for a module of a checkout."""
    if not (checkout / "llmserve_env").is_dir():
        raise SystemExit(f"--against: expected the folder of a checkout, found {checkout}")
    environment = os.environ | {"PYTHONPATH": str(checkout)}  # before what is installed
    return {
        "args": [sys.executable, "-m", module, *options],
        "cwd": checkout,
        "env": environment,
        "stdout": subprocess.PIPE,
        "text": True,
    }


@contextmanager
def started(*options: str, checkout: Path = CHECKOUT) -> Iterator[Service]:
    """The service of a checkout with these options, on a free port, until the end of the block."""
    given = command_of(checkout, "server.app", "--port", "0", "--no-web", *options)
    with subprocess.Popen(**given) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().removeprefix("listening on ").strip()
            service = Service(url, process.pid)
            until = time.monotonic() + _START_S
            while True:
                try:
                    service.get("/health")
                    break
                except OSError:
                    if not url or time.monotonic() > until:
                        raise SystemExit("the service did not start") from None
                    time.sleep(0.1)
            # The guard loads its code for some seconds after the start.
            service_warm(service)
            yield service
        finally:
            process.terminate()
            process.wait(60)


def service_warm(service: Service) -> None:
    """Play a custom workload, for which the guard has to be there, and every task once."""
    from benchmarks._server_client import warm_up

    warm_up(service.ws_url)
