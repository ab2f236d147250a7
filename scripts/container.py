"""Build the image and run it, as hardened as OpenEnv's validator does, and check what is in it.

python scripts/container.py: with Docker, else Podman, else buildah (as root, without a daemon).
python scripts/container.py --debian-base: on a base image made here by debootstrap, if none can be pulled.

Runs it as a user without a name, without capabilities, with a root that cannot be written; at the end it says
what that did not show. The exit status is 1 if a check fails.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx
import tyro
from checkout_checks import copy_checkout, read_manifest
from checks import Check, Problem, Row, expect, run_checks
from container_engines import UID, Container, Engine, Limits, command, find_engine
from container_validate import validate_image
from server_checks import TIMEOUT_S, server_checks

ROOT = Path(__file__).resolve().parents[1]
_START_S = 30.0
"""Time that OpenEnv's validator gives an image to answer (s)."""
_DEBIAN, _DEBIAN_BASE = "bookworm", "localhost/llmserve-base"


@dataclass(frozen=True)
class Arguments:
    """How to build and run the image."""

    engine: Literal["auto", "docker", "podman", "buildah"] = "auto"
    """Program that builds and runs the image; auto takes the first of these that there is."""
    image: str = "llmserve"
    """Name of the image."""
    base: str | None = None
    """Base image (default: the Dockerfile's)."""
    debian_base: bool = False
    """Whether to make a base image of Debian and its Python by debootstrap (root, once)."""
    mirror: str | None = None
    """Debian's mirror for that (default: this machine's)."""
    pip_conf: Path | None = None
    """pip's settings for the build, as of a package index of your own. They do not get into the image."""
    ca_bundle: Path | None = None
    """Certificates for the build, likewise."""
    build: bool = True
    """Whether to build it, or take the one that is there."""
    openenv: bool = True
    """Whether OpenEnv's validator runs the image, too (Docker and Podman)."""
    helper: str | None = None
    """Image with a Python, by its digest, from which that validator looks at the network (default: its own,
    which it pulls).
    """


def main(arguments: Arguments) -> int:
    """Build, run, check.

    Returns:
        The exit status.
    """
    try:
        engine = find_engine(arguments.engine)
        rows = run_checks([("build", lambda: _build(engine, arguments))]) if arguments.build else []
        if all(row.passed for row in rows):
            rows += _run(engine, arguments)
    except Problem as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    failed = [row.name for row in rows if not row.passed]
    print(f"\n{len(rows) - len(failed)} of {len(rows)} checks pass with {engine.name}")
    stand_in = "the Dockerfile's own base image, " if arguments.debian_base else ""
    print(f"not shown by this: {stand_in}{engine.not_shown}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def _build(engine: Engine, arguments: Arguments) -> str:
    base = arguments.base
    if arguments.debian_base:
        base = _DEBIAN_BASE
        if not engine.has(base):
            with tempfile.TemporaryDirectory() as folder:
                _bootstrap(Path(folder) / "root", arguments.mirror)
                engine.import_base(Path(folder) / "root", base)
    given = {"pip": arguments.pip_conf, "ca": arguments.ca_bundle}
    secrets = {name: file.resolve() for name, file in given.items() if file is not None}
    with tempfile.TemporaryDirectory() as folder:
        copy_checkout(ROOT, Path(folder))
        engine.build(Path(folder), arguments.image, base, secrets)
    size = engine.size_bytes(arguments.image)
    of_base = f" (its base {engine.size_bytes(base) / 1e6:,.0f} MB)" if base else ""
    return f"{engine.name}: {size / 1e6:,.0f} MB{of_base}"


def _bootstrap(folder: Path, mirror: str | None) -> None:
    if shutil.which("debootstrap") is None:
        raise Problem("not installed: debootstrap; on Debian: apt-get install debootstrap")
    sources = [*Path("/etc/apt").glob("sources.list.d/*.sources"), *Path("/etc/apt").glob("sources.list")]
    text = "\n".join(source.read_text() for source in sources)
    found = re.findall(r"^(?:URIs:|deb)\s+(https?://\S+)", text, re.M)
    packages = "python3,python3-venv,python3-pip,ca-certificates"
    where = [mirror or found[0]] if mirror or found else []
    command("debootstrap", "--variant=minbase", f"--include={packages}", _DEBIAN, folder, *where)


def _run(engine: Engine, arguments: Arguments) -> list[Row]:
    manifest, _ = read_manifest(ROOT)
    resources = manifest.resources
    limits = Limits(resources.cpu, resources.memory_mb, resources.disk_mb)
    begun = time.monotonic()
    container = engine.start(arguments.image, limits)
    try:
        checks: list[Check] = [("answers on 8000", lambda: _check_start(container, begun))]
        rows = run_checks(checks)
        if not rows[0].passed:
            print(container.output()[-3000:])
            return rows
        rows += run_checks(
            [
                ("answers on 7860", lambda: _check_first_reset(container)),
                ("HEALTHCHECK", lambda: _check_health(container)),
                ("user, root, capabilities", lambda: _check_hardened(container)),
                *server_checks(container.urls[8000], ROOT),
                ("nothing was compiled", lambda: _check_cache(container)),
                ("memory", lambda: _memory(container, limits)),
                ("SIGTERM", lambda: _check_stop(container)),
            ]
        )
    finally:
        container.remove()
    if arguments.openenv and engine.name in ("docker", "podman"):
        rows += run_checks([("OpenEnv's validator", lambda: _validate(engine, arguments))])
    return rows


def _check_start(container: Container, begun: float) -> str:
    while time.monotonic() - begun < _START_S:
        try:
            if httpx.get(f"{container.urls[8000]}/health", timeout=1).status_code == 200:
                return f"{time.monotonic() - begun:.1f} s after the start of the container"
        except httpx.TransportError:
            time.sleep(0.1)
    raise Problem(f"no answer within {_START_S:g} s")


def _check_first_reset(container: Container) -> str:
    begun = time.monotonic()
    response = httpx.post(f"{container.urls[7860]}/reset", timeout=TIMEOUT_S)
    expect(response.status_code == 200, f"/reset: {response.status_code}: {response.text[:200]}")
    return f"first reset {time.monotonic() - begun:.2f} s"


def _check_health(container: Container) -> str:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    found = re.search(r"^HEALTHCHECK.*?CMD (\[.*?\])$", text, re.M | re.S)
    if found is None:
        raise Problem('Dockerfile: expected HEALTHCHECK ... CMD ["..."]')
    container.inside(*json.loads(found[1]))
    return "passes"


def _check_hardened(container: Container) -> str:
    expect(container.inside("id", "-u") == str(UID), "another user")
    written = container.inside("sh", "-c", "touch /probe /app/probe /opt/probe /opt/numba/probe 2>&1 || true")
    expect(written.count("Read-only file system") == 4, f"something but /tmp can be written: {written}")
    status = container.inside("sh", "-c", "cat /proc/1/status")
    held = {key: re.search(rf"^{key}:\s*(\S+)", status, re.M) for key in ("CapEff", "CapBnd", "NoNewPrivs")}
    found = {key: match[1] for key, match in held.items() if match}
    expect(int(found["CapEff"], 16) == int(found["CapBnd"], 16) == 0, f"capabilities: {found}")
    expect(found["NoNewPrivs"] == "1", "it can gain privileges")
    return f"uid {UID}, root read-only, no capabilities"


def _check_cache(container: Container) -> str:
    shipped, used = (
        len(container.inside("find", f"{at}/numba", "-type", "f").split()) for at in ("/opt", "/tmp")
    )
    expect(shipped == used, f"the image has {shipped} files of Numba's cache, in use are {used}")
    return f"{used} files of Numba's cache in use, as shipped"


def _memory(container: Container, limits: Limits) -> str:
    files = "/sys/fs/cgroup/memory.peak /sys/fs/cgroup/memory/memory.max_usage_in_bytes"
    peak = container.inside("sh", "-c", f"cat {files} 2>/dev/null || true").split()
    if peak:
        return f"peak {int(peak[0]) / 2**20:,.0f} of {limits.memory_mb:,} MB, /tmp included"
    status = container.inside("sh", "-c", "cat /proc/[0-9]*/status")
    resident = [int(kb) for kb in re.findall(r"VmHWM:\s+(\d+)", status)]
    return f"peaks of its {len(resident)} processes sum to {sum(resident) / 1024:,.0f} MB; not limited"


def _check_stop(container: Container) -> str:
    begun = time.monotonic()
    status = container.stop()
    expect(status in (0, 143), f"exit status {status}: {container.output()[-300:]}")  # 143: 128 + SIGTERM
    return f"ends in {time.monotonic() - begun:.1f} s, exit status {status}"


def _validate(engine: Engine, arguments: Arguments) -> str:
    with tempfile.TemporaryDirectory() as folder:
        copy_checkout(ROOT, Path(folder))
        return validate_image(engine, arguments.image, Path(folder), arguments.helper)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
