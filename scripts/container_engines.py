"""What builds and runs an image: Docker, Podman, or buildah and the kernel's namespaces without either."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from checks import Problem

PORTS = (8000, 7860)
UID = 65532
"""As OpenEnv's validator runs an image; it has no entry in /etc/passwd."""


@dataclass(frozen=True)
class Limits:
    """What a container may use."""

    cpus: float
    memory_mb: int
    writable_mb: int
    """Size of /tmp, the only place that can be written."""


def command(*words: str | Path, **options: Any) -> str:
    """Run a program; returns what it printed.

    Raises:
        Problem: it failed; with the end of what it said.
    """
    ran = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False, **options)
    if ran.returncode:
        raise Problem(f"{' '.join(map(str, words[:4]))} ...: {(ran.stderr or ran.stdout)[-800:]}")
    return str(ran.stdout).strip()


def succeeds(*words: str) -> bool:
    """Whether a program ends well."""
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


class Container(ABC):
    """A container that runs.

    Attributes:
        urls: by port of the container, where it is reached from here.
    """

    urls: dict[int, str]

    @abstractmethod
    def inside(self, *words: str) -> str:
        """Run a program in the container as its user; returns what it printed. Raises Problem."""

    @abstractmethod
    def output(self) -> str:
        """What the server printed."""

    @abstractmethod
    def stop(self) -> int:
        """Send SIGTERM and wait; returns the exit status."""

    @abstractmethod
    def remove(self) -> None:
        """Leave nothing behind."""


class Engine(ABC):
    """Builds and runs images.

    Attributes:
        name: of its program.
        not_shown: what a run here does not prove, in words.
    """

    name: str
    not_shown: str

    @abstractmethod
    def missing(self) -> str | None:
        """Why it cannot be used here, and what to do; None if it can."""

    @abstractmethod
    def has(self, image: str) -> bool:
        """Whether an image is there."""

    @abstractmethod
    def import_base(self, folder: Path, image: str) -> None:
        """Make an image of a file system."""

    @abstractmethod
    def build(self, root: Path, image: str, base: str | None, secrets: dict[str, Path]) -> None:
        """Build the Dockerfile in a folder, on a base image, with files that only the build sees."""

    @abstractmethod
    def size_bytes(self, image: str) -> int:
        """Size of an image, its base included (bytes)."""

    @abstractmethod
    def start(self, image: str, limits: Limits) -> Container:
        """Run an image, hardened as OpenEnv's validator does."""


class CommandLineEngine(Engine):
    """Docker or Podman.

    Args:
        name: docker or podman.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.not_shown = "a Space's own builder and proxy"

    def missing(self) -> str | None:
        """See `Engine`."""
        if shutil.which(self.name) is None:
            return f"{self.name} is not installed"
        try:
            command(self.name, "info")
        except Problem as problem:
            return str(problem)
        return None

    def has(self, image: str) -> bool:
        """See `Engine`."""
        return succeeds(self.name, "image", "inspect", image)

    def import_base(self, folder: Path, image: str) -> None:
        """See `Engine`."""
        with subprocess.Popen(["tar", "-C", folder, "-c", "."], stdout=subprocess.PIPE) as packed:
            command(self.name, "import", "-", image, stdin=packed.stdout)

    def build(self, root: Path, image: str, base: str | None, secrets: dict[str, Path]) -> None:
        """See `Engine`."""
        kept = ["--format", "docker"] if self.name == "podman" else []  # its own has no HEALTHCHECK
        command(self.name, "build", *kept, *_build_options(image, base, secrets), root)

    def size_bytes(self, image: str) -> int:
        """See `Engine`."""
        return int(json.loads(command(self.name, "image", "inspect", image))[0]["Size"])

    def start(self, image: str, limits: Limits) -> Container:
        """See `Engine`."""
        published = [f"--publish=127.0.0.1::{port}" for port in PORTS]
        container = command(
            *(self.name, "run", "--detach", f"--user={UID}:{UID}", "--read-only", "--cap-drop=ALL"),
            *("--security-opt=no-new-privileges", "--pids-limit=256", f"--cpus={limits.cpus}"),
            *(f"--memory={limits.memory_mb}m", f"--memory-swap={limits.memory_mb}m"),
            f"--tmpfs=/tmp:rw,nosuid,nodev,noexec,size={limits.writable_mb}m,mode=1777",
            *("--no-healthcheck", *published, image),
        ).splitlines()[-1]
        return _EngineContainer(self.name, container)


class _EngineContainer(Container):
    def __init__(self, program: str, container: str) -> None:
        self._program, self._container = program, container
        try:
            found = {port: self._run("port", f"{port}/tcp", last=True) for port in PORTS}
        except Problem as problem:  # it has ended already
            said = self.output()[-1000:]
            self.remove()
            raise Problem(f"{problem}; it printed: {said}") from None
        self.urls = {port: f"http://{address.splitlines()[0]}" for port, address in found.items()}

    def _run(self, verb: str, *rest: str, last: bool = False) -> str:
        words = (self._container, *rest) if last else (*rest, self._container)
        return command(self._program, verb, *words)

    def inside(self, *words: str) -> str:
        return self._run("exec", *words, last=True)

    def output(self) -> str:
        with tempfile.TemporaryFile("w+") as both:  # in the order in which they were written
            words = [self._program, "logs", self._container]
            subprocess.run(words, stdout=both, stderr=subprocess.STDOUT, check=False)
            both.seek(0)
            return both.read()

    def stop(self) -> int:
        self._run("stop", "--time=60")
        return int(self._run("inspect", "--format={{.State.ExitCode}}"))

    def remove(self) -> None:
        self._run("rm", "--force", "--volumes")


class ChrootEngine(Engine):
    """Builds with buildah's chroot isolation, runs in the kernel's namespaces; needs root, and no daemon."""

    name = "buildah"
    not_shown = (
        "limits of memory, CPUs and processes, seccomp, a network of its own (the host's is used), "
        "a Space's own builder and proxy"
    )

    def missing(self) -> str | None:
        """See `Engine`."""
        if os.geteuid() != 0:
            return "building with chroot isolation needs root"
        absent = [name for name in ("buildah", "unshare", "nsenter", "pgrep") if shutil.which(name) is None]
        return f"not installed: {', '.join(absent)}; on Debian: apt-get install buildah" if absent else None

    def has(self, image: str) -> bool:
        """See `Engine`."""
        return succeeds("buildah", "inspect", "--type", "image", image)

    def import_base(self, folder: Path, image: str) -> None:
        """See `Engine`."""
        container = command("buildah", "from", "scratch")
        command("buildah", "add", "-q", container, folder, "/")
        command("buildah", "commit", "-q", "--rm", container, image)

    def build(self, root: Path, image: str, base: str | None, secrets: dict[str, Path]) -> None:
        """See `Engine`."""
        options = ("--isolation=chroot", "--format=docker", "--layers=false")
        command("buildah", "build", *options, *_build_options(image, base, secrets), root)

    def size_bytes(self, image: str) -> int:
        """See `Engine`."""
        container = command("buildah", "from", "--pull=never", image)
        try:
            return int(command("du", "-sb", command("buildah", "mount", container)).split()[0])
        finally:
            command("buildah", "rm", container)

    def start(self, image: str, limits: Limits) -> Container:
        """See `Engine`."""
        found = json.loads(command("buildah", "inspect", "--type", "image", image))
        return _ChrootContainer(image, found["Docker"]["config"], limits)


_ENTER = """
root=$1 size_mb=$2
shift 2
mount --make-rprivate /
mount --bind "$root" "$root"
mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
mount -t tmpfs -o nosuid,noexec,mode=755 tmpfs "$root/dev"
mknod -m 666 "$root/dev/null" c 1 3
mknod -m 666 "$root/dev/zero" c 1 5
mknod -m 666 "$root/dev/random" c 1 8
mknod -m 666 "$root/dev/urandom" c 1 9
mkdir -m 1777 "$root/dev/shm"
mount -t tmpfs -o "nosuid,nodev,noexec,mode=1777,size=${size_mb}m" tmpfs "$root/tmp"
mount -o remount,bind,ro "$root"
exec chroot "$root" "$@"
"""
"""Enters a root in a mount namespace: $1 the root, $2 the size of its /tmp (MB), and what to run there."""


class _ChrootContainer(Container):
    def __init__(self, image: str, config: dict[str, Any], limits: Limits) -> None:
        for port in PORTS:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    raise Problem(f"port {port} is in use, and this engine runs on the host's network")
        self.urls = {port: f"http://127.0.0.1:{port}" for port in PORTS}
        self._env = ["env", "-i", *config["Env"]]
        self._container = command("buildah", "from", "--pull=never", image)
        self._log: IO[bytes] = tempfile.NamedTemporaryFile()  # noqa: SIM115 # lives as long as the container
        root = command("buildah", "mount", self._container)
        become = ("setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--no-new-privs")
        stripped = ("--bounding-set=-all", "--inh-caps=-all")
        clean = ("env", f"--chdir={config['WorkingDir']}", *self._env[1:])
        started = (*become, *stripped, *clean, *(config["Entrypoint"] or []), *(config["Cmd"] or []))
        apart = ("unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child")
        self._process = subprocess.Popen(
            [*apart, "sh", "-euc", _ENTER, "sh", root, str(limits.writable_mb), *started],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def _first(self) -> int:
        """Number of the container's first process, seen from here."""
        return int(command("pgrep", "--parent", str(self._process.pid)))

    def inside(self, *words: str) -> str:
        target = str(self._first())
        user = ("--setuid", str(UID), "--setgid", str(UID))
        return command("nsenter", "--target", target, "--mount", "--pid", "--root", *user, *self._env, *words)

    def output(self) -> str:
        return Path(self._log.name).read_text(errors="replace")

    def stop(self) -> int:
        os.kill(self._first(), signal.SIGTERM)
        return self._process.wait(timeout=60)

    def remove(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()
        command("buildah", "rm", self._container)


def _build_options(image: str, base: str | None, secrets: dict[str, Path]) -> list[str]:
    based = [] if base is None else [f"--build-arg=BASE={base}"]
    return [*based, *(f"--secret=id={name},src={file}" for name, file in secrets.items()), f"--tag={image}"]


ENGINES: dict[str, Engine] = {
    "docker": CommandLineEngine("docker"),
    "podman": CommandLineEngine("podman"),
    "buildah": ChrootEngine(),
}
"""By name, in the order of what a run with them shows."""


def find_engine(name: str) -> Engine:
    """An engine that can be used here.

    Args:
        name: of one, or auto for the first that can.

    Raises:
        Problem: there is none; what is missing.
    """
    reasons = {}
    for known in ENGINES if name == "auto" else (name,):
        reason = ENGINES[known].missing()
        if reason is None:
            return ENGINES[known]
        reasons[known] = reason
    raise Problem("; ".join(f"{known}: {reason}" for known, reason in reasons.items()))
