"""Clients that ask for too much, for the benchmark of the service; each in a process of its own."""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from llmserve_env import Episode, load_task
from llmserve_env.schema import ServeAction

JSON = {"Content-Type": "application/json"}
_BILLION: dict[str, Any] = {
    "order": "cycle",
    "tenants": {"flood": {"slo": "mlperf-llama-3.1-8b-server", "lengths": "fixed:128,16"}},
    "regimes": [{"name": "flood", "dwell_s": [300, 300], "rates": {"flood": 1e9 / 300}}],
}


def _repeat(seconds: float, once: Callable[[], str]) -> dict[str, int]:
    found: Counter[str] = Counter()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            found[once()] += 1
        except httpx.TransportError:
            found["hung up on"] += 1
    return dict(found)


def _post(url: str, path: str, seconds: float, content: Any) -> dict[str, int]:
    with httpx.Client(base_url=url, timeout=60, headers=JSON) as http:

        def once() -> str:
            http.cookies.clear()
            return str(http.post(path, content=content() if callable(content) else content).status_code)

        return _repeat(seconds, once)


def huge_bodies(url: str, seconds: float) -> dict[str, int]:
    """Bodies of 64 MB."""
    return _post(url, "/reset", seconds, b" " * 64_000_000)


def endless_bodies(url: str, seconds: float) -> dict[str, int]:
    """Bodies of 1 GB that do not say so."""

    def parts() -> Iterator[bytes]:
        for _ in range(1000):
            yield b" " * 1_000_000

    return _post(url, "/reset", seconds, parts)


def full_bodies(url: str, seconds: float) -> dict[str, int]:
    """Step_n of just under 4 MB, of actions that are no actions."""
    actions = [{"batch_cap": "x" * 90}] * 35_000
    return _post(url, "/step_n", seconds, json.dumps({"actions": actions}).encode())


def deep_json(url: str, seconds: float) -> dict[str, int]:
    """A million brackets."""
    return _post(url, "/reset", seconds, b"[" * 1_000_000)


def huge_messages(url: str, seconds: float) -> dict[str, int]:
    """WebSocket messages of 8 MB."""

    def once() -> str:
        with connect(url.replace("http", "ws", 1) + "/ws", compression=None) as ws:
            try:
                ws.send("[" * 8_000_000)
                return str(ws.recv(timeout=60))[:80]
            except ConnectionClosed as closed:
                return f"closed {closed.rcvd.code}" if closed.rcvd else "hung up on"

    return _repeat(seconds, once)


def half_open(url: str, seconds: float) -> dict[str, int]:
    """500 connections that send a byte of their request each second."""
    request = b"POST /reset HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    handles = [_connected(url) for _ in range(500)]
    found: Counter[str] = Counter(connections=len(handles))
    sent, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        for handle in tuple(handles):
            try:
                handle.sendall(request[sent % len(request) : sent % len(request) + 1])
            except OSError:
                found["hung up on"] += 1
                handles.remove(handle)
        sent += 1
        time.sleep(1.0)
    for handle in handles:
        handle.close()
    return dict(found)


def half_bodies(url: str, seconds: float) -> dict[str, int]:
    """100 bodies of just under 4 MB whose end does not come, all at once."""
    request = b"POST /reset HTTP/1.1\r\nHost: x\r\nContent-Length: 4000000\r\n\r\n" + b" " * 3_999_990
    handles = [_connected(url) for _ in range(100)]
    found: Counter[str] = Counter(connections=len(handles))
    until = time.monotonic() + seconds
    for handle in handles:
        try:
            handle.sendall(request)
        except OSError:
            found["hung up on"] += 1
    time.sleep(max(0.0, until - time.monotonic()))
    for handle in handles:
        handle.close()
    return dict(found)


def endless_headers(url: str, seconds: float) -> dict[str, int]:
    """Headers of 150 MB."""

    def once() -> str:
        with _connected(url) as handle:
            try:
                handle.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: ")
                for _ in range(150):
                    handle.sendall(b"a" * 1_000_000)
            except OSError:
                pass  # the server has hung up
            return handle.recv(12).decode()[-3:]

    return _repeat(seconds, once)


def _connected(url: str) -> socket.socket:
    where = urlsplit(url)
    return socket.create_connection((where.hostname, where.port), timeout=60)


def billion_requests(url: str, seconds: float) -> dict[str, int]:
    """Scenarios of 1e9 requests."""
    body = {"task_id": "static_workload", "workload": _BILLION, "horizon_s": 300.0}
    return _post(url, "/reset", seconds, json.dumps(body).encode())


def endless_draw(url: str, seconds: float) -> dict[str, int]:
    """Generators of 3e7 requests, which take memory and time to draw before they can be counted."""
    body = {"task_id": "static_workload", "workload": "poisson://?rate=100000", "horizon_s": 300.0}
    return _post(url, "/reset", seconds, json.dumps(body).encode())


def endless_logs(url: str, seconds: float) -> dict[str, int]:
    """Logs whose traffic has 3e7 requests."""
    episode = Episode(load_task("static_workload"))
    episode.reset(1)
    episode.step(ServeAction())
    log = episode.log().model_dump(mode="json")
    log["task"]["workload"] = "poisson://?rate=100000"
    return _post(url, "/grader", seconds, json.dumps({"episode_log": log}).encode())


def long_step_n(url: str, seconds: float) -> dict[str, int]:
    """What is allowed, at once and again: 1,000 windows of 1 s in a request, every one answered."""
    begun = {"task_id": "static_workload", "seed": 1, "workload": "poisson://?rate=4", "horizon_s": 1000.0}
    with httpx.Client(base_url=url, timeout=60) as http:

        def once() -> str:
            answers = [http.post("/reset", json=begun), http.post("/step_n", json={"actions": [{}] * 1000})]
            answers.append(http.post("/grader"))
            return " ".join(str(answer.status_code) for answer in answers)

        return _repeat(seconds, once)


ABUSES: dict[str, Callable[[str, float], dict[str, int]]] = {
    "64 MB bodies": huge_bodies,
    "bodies without end": endless_bodies,
    "4 MB of wrong actions": full_bodies,
    "a million brackets": deep_json,
    "8 MB messages": huge_messages,
    "500 half-open connections": half_open,
    "100 bodies that do not end": half_bodies,
    "headers of 150 MB": endless_headers,
    "scenarios of 1e9 requests": billion_requests,
    "generators of 3e7 requests": endless_draw,
    "logs of 3e7 requests": endless_logs,
    "step_n of 1,000 windows, graded": long_step_n,
}
