"""Everything that is checked before the environment is submitted or deployed.

python scripts/pre_submission_check.py: this checkout, with a server of its own.
python scripts/pre_submission_check.py --container: and the image, built and run.
python scripts/pre_submission_check.py --space-url https://USER-SPACE.hf.space: a deployed one, from outside.

Prints a line for each check; the exit status is 1 if one fails.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import tyro
from checkout_checks import checkout_checks
from checks import Problem, Row, expect, run_checks
from server_checks import TIMEOUT_S, server_checks

ROOT = Path(__file__).resolve().parents[1]
_START_S = 30.0
"""Time that OpenEnv's validator gives a server to answer (s)."""


@dataclass(frozen=True)
class Arguments:
    """What to check."""

    space_url: str | None = None
    """Address of a deployed server; nothing else is checked then."""
    container: bool = False
    """Whether to build the image and run it, too, as `python scripts/container.py` does."""


def main(arguments: Arguments) -> int:
    """Run the checks.

    Returns:
        The exit status.
    """
    if arguments.space_url is not None:
        rows = run_checks(server_checks(arguments.space_url, ROOT))
    else:
        rows = run_checks(checkout_checks(ROOT)) + _check_own_server()
        if arguments.container:
            rows += run_checks([("container", check_container)])
    failed = [row.name for row in rows if not row.passed]
    print(f"\n{len(rows) - len(failed)} of {len(rows)} checks pass")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def _check_own_server() -> list[Row]:
    begun = time.monotonic()
    try:
        with own_server(ROOT) as (urls, process):
            rows = [Row("python -m server.app", True, "answers", time.monotonic() - begun)]
            print(rows[0], flush=True)
            rows += run_checks([("both ports", lambda: check_both_ports(urls))])
            rows += run_checks(server_checks(urls[0], ROOT))
            return rows + run_checks([("SIGTERM", lambda: check_stops(process))])
    except Problem as problem:
        row = Row("python -m server.app", False, str(problem), time.monotonic() - begun)
        print(row)
        return [row]


@contextmanager
def own_server(root: Path) -> Iterator[tuple[list[str], subprocess.Popen[bytes]]]:
    """The server of a checkout on two free ports.

    Args:
        root: the checkout.

    Yields:
        Its two addresses, and its process, which does not outlive the block.

    Raises:
        Problem: it does not answer in time.
    """
    command = [sys.executable, "-m", "server.app", "--port", "0", "--port", "0"]
    env = {**os.environ, "ENV_README_PATH": str(root / "README.md")}
    with tempfile.NamedTemporaryFile() as output:
        process = subprocess.Popen(command, cwd=root, env=env, stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + _START_S
            while not (urls := _answering(Path(output.name).read_text())):
                if process.poll() is not None or time.monotonic() > deadline:
                    said = Path(output.name).read_text()[-500:]
                    raise Problem(f"no answer within {_START_S:g} s; it says: {said}")
                time.sleep(0.1)
            yield urls, process
        finally:
            process.kill()
            process.wait()


def _answering(output: str) -> list[str]:
    """Addresses in what a server printed, once it answers there."""
    urls = re.findall(r"listening on (http://\S+)", output)
    try:
        for url in urls:
            httpx.get(f"{url}/health", timeout=5)
    except httpx.TransportError:
        return []
    return urls if len(urls) == 2 else []


def check_both_ports(urls: list[str]) -> str:
    """A session that was opened at one port is known at the other."""
    first = httpx.post(f"{urls[0]}/reset", timeout=TIMEOUT_S)
    session = {"X-Session-Id": first.headers["X-Session-Id"]}
    state = httpx.get(f"{urls[1]}/state", headers=session, timeout=TIMEOUT_S)
    expect(state.status_code == 200, f"/state at the other port: {state.status_code}")
    return "one service"


def check_stops(process: subprocess.Popen[bytes]) -> str:
    """SIGTERM ends the server."""
    process.send_signal(signal.SIGTERM)
    status = process.wait(timeout=60)
    expect(status in (0, -signal.SIGTERM), f"exit status {status}")
    return "ends"


def check_container() -> str:
    """The image builds, runs and stops."""
    ran = subprocess.run([sys.executable, ROOT / "scripts" / "container.py"], check=False)
    expect(ran.returncode == 0, "the lines above tell why")
    return "built, run, stopped"


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
