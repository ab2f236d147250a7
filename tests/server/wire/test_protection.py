"""What browsers and strangers may not have of the service."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from base64 import b64encode
from urllib.parse import urlsplit

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from llmserve_env import LLMServeEnv
from llmserve_env.client import NotFoundError
from server.wire.keys import bears
from tests.server._playing import ACTIONS, BEGIN, client, ok
from tests.server.conftest import running

OTHERS = (
    {"Sec-Fetch-Site": "cross-site", "Origin": "https://other.example"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Origin": "https://other.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost:3000", "Sec-Fetch-Site": "same-site"},
)
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@pytest.fixture
def http(server_url):
    with client(server_url) as http:
        yield http
        http.delete("/session")


@pytest.mark.parametrize("other", OTHERS)
def test_a_page_of_another_site_changes_nothing_of_a_visitor_s(http, server_url, other):
    ok(http.post("/reset", json=BEGIN))
    ok(http.post("/step", json={"action": ACTIONS[0]}))
    for method, path in (("POST", "/reset"), ("POST", "/step_n"), ("DELETE", "/session"), ("POST", "/mcp")):
        assert http.request(method, path, headers={**other, **FORM}).status_code == 403
    assert http.get("/baseline", params={"task_id": "static_workload"}, headers=other).status_code == 403
    assert ok(http.get("/state", headers=other))["step_count"] == 1  # whose answer that page does not see


@pytest.mark.parametrize("path", ["/ws", "/mcp"])
@pytest.mark.parametrize("other", OTHERS)
def test_nor_does_it_open_a_websocket(server_url, path, other):
    with (
        pytest.raises(InvalidStatus) as refused,
        connect(server_url.replace("http", "ws") + path, additional_headers=other),
    ):
        pass
    assert refused.value.response.status_code == 403


def test_a_page_of_our_own_plays_also_in_a_frame_of_another_site(http, server_url):
    # As browsers send it: what embeds the page is told nowhere.
    own = {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors", "Origin": server_url}
    ok(http.post("/reset", json=BEGIN, headers=own))
    ok(http.post("/step", json={"action": ACTIONS[0]}, headers={"Origin": server_url}))
    with connect(server_url.replace("http", "ws") + "/ws", additional_headers=own):
        pass


def test_a_name_that_is_not_ours_is_refused(http):
    for host in ("rebound.example", "rebound.example:8000"):
        assert http.get("/health", headers={"Host": host}).status_code == 400
        assert http.post("/reset", json=BEGIN, headers={"Host": host}).status_code == 400
    ok(http.get("/health", headers={"Host": "localhost:1234"}))


def test_answers_say_how_browsers_are_to_take_them(http):
    for path in ("/health", "/nowhere", "/docs"):
        assert http.get(path).headers["x-content-type-options"] == "nosniff"
    assert http.post("/reset", headers=OTHERS[0]).headers["x-content-type-options"] == "nosniff"
    page = http.get("/docs").headers
    assert "frame-ancestors 'self' https://huggingface.co" in page["content-security-policy"]
    assert page["referrer-policy"] == "same-origin"
    assert "content-security-policy" not in http.get("/health").headers


def test_headers_and_bodies_are_bounded(server_url):
    place = urlsplit(server_url)
    for head in (b"GET /health HTTP/1.1\r\nX: ", b"POST /reset HTTP/1.1\r\nX: ", b"GET /ws HTTP/1.1\r\nX: "):
        with socket.create_connection((place.hostname, place.port), 60) as connection:
            connection.sendall(head + b"a" * 100_000)
            assert connection.recv(12) == b"HTTP/1.1 431"
    with httpx.Client(base_url=server_url, headers={"X": "a" * 60_000}) as http:
        ok(http.get("/health"))


def test_real_engines_are_not_for_strangers(monkeypatch):
    command = [sys.executable, "-m", "server.app", "--mode", "real", "--host", "0.0.0.0", "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "LLMSERVE_API_KEY"}
    refused = subprocess.run(
        command, check=False, capture_output=True, text=True, env=environment, timeout=120
    )
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("error: field 'api_key': expected a key")

    monkeypatch.setenv("LLMSERVE_API_KEY", "sesame")
    options = ("--mode", "real", "--host", "0.0.0.0", "--allowed-host", "llm.example", "--no-web")
    with running(*options) as url:
        url = url.replace("0.0.0.0", "127.0.0.1")
        with client(url) as http:
            refused = http.post("/reset", json=BEGIN)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"].startswith("Basic ")
            ok(http.get("/health"))
            named = {"Authorization": "Bearer sesame", "Host": "llm.example"}
            assert http.post("/reset", json={"task_id": "none"}, headers=named).status_code == 404
            assert http.get("/health", headers={"Host": "other.example"}).status_code == 400
            assert http.post("/reset", json={"task_id": "none"}, auth=("me", "sesame")).status_code == 404
        with pytest.raises(InvalidStatus), connect(url.replace("http", "ws") + "/ws"):
            pass
        with connect(url.replace("http://", "ws://me:sesame@") + "/ws"):
            pass
        bearer = {"Authorization": "Bearer sesame"}
        with LLMServeEnv.from_url(url, headers=bearer).sync() as env, pytest.raises(NotFoundError):
            env.reset(task_id="none")


@pytest.mark.parametrize(
    ("sent", "good"),
    [
        (b"Bearer sesame", True),
        (b"bearer  sesame", True),
        (b"Basic " + b64encode(b"me:sesame"), True),
        (b"Basic " + b64encode(b"sesame"), False),
        (b"Basic sesame", False),
        (b"Bearer sesam", False),
        (b"Bearer", False),
        (b"sesame", False),
        (b"Digest sesame", False),
        (b"", False),
    ],
)
def test_the_key_is_borne_as_token_or_password(sent, good):
    assert bears([(b"host", b"h"), (b"authorization", sent)], "sesame") is good
    assert not bears([], "sesame")


def test_a_missing_package_is_named_in_a_line():
    code = (
        "import sys; sys.modules['uvicorn'] = None; from server.app import main; sys.argv = ['app']; main()"
    )
    refused = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120
    )
    assert refused.returncode == 1
    how = "pip install -e '.[server]' in the checkout"
    assert refused.stderr == f"error: the uvicorn package is missing: {how}\n"
