"""SIGTERM: what is under way is answered, and what is open can go on after a restart."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from urllib.parse import urlsplit

import httpx
import pytest
from pydantic_core import from_json
from websockets.exceptions import ConnectionClosed

from tests.server._playing import ACTIONS, BEGIN, ask, bare, client, local, ok, open_ws
from tests.server.conftest import started

WINDOWS = 1200
LONG = {"task_id": "static_workload", "seed": 1, "horizon_s": float(WINDOWS), "workload": "poisson://?rate=2"}
MESSAGE = {"actions": [{}] * WINDOWS, "every": False}


def test_requests_under_way_are_answered_and_sessions_kept(tmp_path):
    options = ("--journal", str(tmp_path), "--max-actions", str(WINDOWS))
    with started(*options) as server:
        address = urlsplit(server.url)
        where = (address.hostname, address.port)
        with (
            client(server.url) as idle,
            open_ws(server.url) as by_ws,
            open_ws(server.url) as quiet,
            socket.create_connection(where, timeout=60) as by_http,
        ):
            ok(idle.post("/reset", json=BEGIN))
            ok(idle.post("/step", json={"action": ACTIONS[0]}))
            quiet_id = ask(quiet, "reset", BEGIN)["data"]["metadata"]["session_id"]
            ask(quiet, "step", ACTIONS[0])
            ask(by_ws, "reset", LONG)
            with client(server.url) as other:
                session_id = ok(other.post("/reset", json=LONG))["metadata"]["session_id"]
            by_ws.send(json.dumps({"type": "step_n", "data": MESSAGE}))
            body = json.dumps({**MESSAGE, "session_id": session_id}).encode()
            head = f"POST /step_n HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            by_http.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            ok(idle.get("/health"))  # sent after them, so that they have arrived
            server.process.send_signal(signal.SIGTERM)

            assert from_json(by_ws.recv(timeout=60))["data"]["played"] == WINDOWS
            for ws in (by_ws, quiet):
                with pytest.raises(ConnectionClosed) as closed:
                    ws.recv(timeout=60)
                assert closed.value.rcvd.code == 1012  # the server restarts
            answer = b""
            while part := by_http.recv(1 << 16):
                answer += part
            assert answer.startswith(b"HTTP/1.1 200")
            assert from_json(answer.partition(b"\r\n\r\n")[2])["played"] == WINDOWS
            assert server.process.wait(60) == 0
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{server.url}/health")
            idle_id = idle.cookies["llmserve_session"]
    with started(*options) as server:
        for session_id in (idle_id, quiet_id):
            with open_ws(server.url, session_id) as ws:
                assert bare(ask(ws, "step", ACTIONS[1])["data"]) == local()[0][2]


def test_an_interrupt_ends_it_without_a_trace(tmp_path):
    with started(messages=tmp_path / "messages") as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 0
    assert "Traceback" not in (tmp_path / "messages").read_text()


def test_a_port_that_is_taken_is_said(server_url):
    port = str(urlsplit(server_url).port)
    command = [sys.executable, "-m", "server.app", "--no-web", "--port", port]
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    assert found.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in found.stderr
    assert "Traceback" not in found.stderr
