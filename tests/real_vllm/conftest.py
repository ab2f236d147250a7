"""One real vLLM on the CPU, set up by scripts/vllm_cpu.sh; what cannot be started fails the tests."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from llmserve_env.live.servers.engine_settings import (
    EngineSettings,
    EngineStatus,
    read_statuses,
    write_settings,
)

ROOT = Path(__file__).parents[2]
START_S = 600
"""Time that a server has to start (s). On an idle machine it takes half a minute."""
STEP_S = 600
"""Time that anything has which takes a moment (s): only a server that hangs runs into it."""
TRIES = 20
"""Times that a load is sent which need not be served at once on a machine that is busy with other things."""

BLOCKS, BLOCK_TOKENS = 64, 32
MAX_QUEUED = 48
"""Requests, running ones too, above which the server refuses."""

_ITERATION = re.compile(
    r"Iteration\((?P<index>\d+)\): "
    r"(?P<prefills>\d+) context requests, (?P<prefill_tokens>\d+) context tokens, "
    r"(?P<decodes>\d+) generation requests, (?P<decode_tokens>\d+) generation tokens, "
    r"iteration elapsed time: \S+ ms, \S+ KV cache usage: (?P<kv_percent>[\d.]+)%"
)


def pytest_addoption(parser):
    parser.addoption("--vllm", default=".vllm", help="folder of scripts/vllm_cpu.sh setup (.vllm)")


@dataclass
class Iteration:
    """A line of vLLM's --enable-logging-iteration-details."""

    index: int
    prefills: int
    prefill_tokens: int
    decodes: int
    decode_tokens: int
    kv_percent: float

    @property
    def running(self) -> int:
        return self.prefills + self.decodes


@dataclass
class Server:
    """`vllm serve` with `LiveScheduler`, which may be killed and started again."""

    command: list[str | Path]
    port: int
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    _read: int = 0
    _iterations: list[Iteration] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def control(self) -> Path:
        return self.folder / "control"

    @property
    def log_file(self) -> Path:
        """Of the last start."""
        return self.folder / f"vllm-{self.starts}.log"

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    # Its life

    @property
    def up(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def launch(self) -> None:
        """Start it, and do not wait."""
        self.starts += 1
        self._read, self._iterations = 0, []
        with self.log_file.open("wb") as file:
            self.process = subprocess.Popen(
                self.command,
                env={**os.environ, "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(STEP_S)},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        end = time.monotonic() + START_S
        while True:
            assert self.up, f"vLLM ended:\n{self.log()[-4000:]}"
            assert time.monotonic() < end, f"vLLM is not ready:\n{self.log()[-4000:]}"
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)

    def signal(self, number: int) -> None:
        """To all its processes."""
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """All its processes, with no time for anything."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        """As Ctrl-C does."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
        self.kill()

    # What it tells

    def iterations(self, after: int = -1) -> list[Iteration]:
        """Those with a larger index, oldest first."""
        with self.log_file.open("rb") as file:
            file.seek(self._read)
            lines, newline, _ = file.read().rpartition(b"\n")
        self._read += len(lines) + len(newline)
        for match in _ITERATION.finditer(lines.decode(errors="replace")):
            found = {k: float(v) if k == "kv_percent" else int(v) for k, v in match.groupdict().items()}
            self._iterations.append(Iteration(**found))
        return [iteration for iteration in self._iterations if iteration.index > after]

    def last_iteration(self) -> int:
        return max((iteration.index for iteration in self.iterations()), default=-1)

    def metric(self, name: str) -> float:
        """Sum over all labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=STEP_S).text
        values = re.findall(rf"^vllm:{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
        assert values, f"no metric {name}"
        return sum(map(float, values))

    def status(self) -> EngineStatus:
        (status,) = read_statuses(self.control)
        return status

    def set(self, **fields) -> EngineStatus:
        """Set, and wait for the engine's answer."""
        settings = EngineSettings(**fields)
        write_settings(self.control, settings)
        wait_for(lambda: self.status().asked == settings and self.status().refused is None)
        return self.status()

    def wait_idle(self) -> None:
        wait_for(lambda: self.metric("num_requests_running") + self.metric("num_requests_waiting") == 0)


def wait_for(condition) -> None:
    """Until it holds; a hang is a failure."""
    end = time.monotonic() + STEP_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def prompt(tokens, seed):
    """Token ids without a repetition to speak of."""
    draw = random.Random(seed)
    return [draw.randrange(4, 4096) for _ in range(tokens)]


def completion(prompt, tokens, **more):
    """A request for so many tokens."""
    exactly = {"max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True}
    return {"model": "tiny", "prompt": prompt, "temperature": 0, **exactly, **more}


@pytest.fixture(scope="session")
def vllm_python(request) -> Path:
    """The interpreter of vLLM's venv."""
    python = (ROOT / request.config.getoption("--vllm")).resolve() / "venv" / "bin" / "python"
    assert python.exists(), f"{python} is missing: scripts/vllm_cpu.sh setup makes it"
    return python


@pytest.fixture(scope="session")
def launched_server(vllm_python, tmp_path_factory):
    """On its way up: what needs no server can be done meanwhile."""
    folder = tmp_path_factory.mktemp("vllm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    speculation = {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
        "num_speculative_tokens_per_batch_size": [[1, 64, 4]],
    }
    command = [
        ROOT / "scripts" / "vllm_cpu.sh", "serve", vllm_python.parents[2], str(port),
        "--scheduler-cls", "llmserve_env.live.vllm_scheduler.LiveScheduler",
        "--additional-config", json.dumps({"llmserve_control": str(folder / "control")}),
        "--speculative-config", json.dumps(speculation),
        "--scheduling-policy", "priority",
        "--enable-logging-iteration-details",
        "--max-model-len", str(BLOCKS * BLOCK_TOKENS),
        "--num-gpu-blocks-override", str(BLOCKS + 1),  # one is vLLM's own
        "--max-num-queued-reqs", str(MAX_QUEUED),
    ]  # fmt: skip
    server = Server(command, port, folder)
    server.control.mkdir()
    server.launch()
    yield server
    server.stop()


@pytest.fixture
def server(launched_server):
    """The server, idle, with the settings that it was started with."""
    if launched_server.process is None:
        launched_server.launch()
    launched_server.wait_ready()
    launched_server.wait_idle()
    launched_server.set()
    yield launched_server
    assert launched_server.process is None or launched_server.up, launched_server.log()[-4000:]
