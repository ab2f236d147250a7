"""Who made a file of results: the command, the commit, the machine."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path


def made_by() -> dict[str, str]:
    """The running command (files by their names), the commit of the code, the CPU and the Python version."""
    arguments = [Path(each).name if os.path.exists(each) else each for each in sys.argv[1:]]
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *arguments]),
        "commit": _commit(),
        "cpu": _cpu(),
        "python": platform.python_version(),
    }


def made_on() -> dict[str, str | int]:
    """The commit of the code, the CPU and how many of its cores there are to use."""
    return {"commit": _commit(), "cpu": _cpu(), "cores": os.cpu_count() or 1}


def _commit() -> str:
    """Commit of the checkout, with "-dirty" if it was changed since; "unknown" for an installed package."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            check=False,
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return f"{facts.get('model name', platform.machine())}, {facts.get('cpu MHz', '?')} MHz"
