"""Which of Gradio's routes a public page has, and how browsers are to take it. Without a browser."""

from __future__ import annotations

import httpx
import pytest

CLOSED = [
    ("POST", "upload"),
    ("GET", "upload_progress"),
    ("GET", "file=/etc/hostname"),
    ("GET", "file/etc/hostname"),
    ("GET", "proxy=http://127.0.0.1:1/"),
    ("GET", "info"),
    ("GET", "openapi.json"),
    ("GET", "runs"),
    ("GET", "custom_component/1/client/component/index.js"),
    ("GET", "stream/a/b/1/playlist.m3u8"),
    ("POST", "run/predict"),
    ("POST", "api/predict"),
    ("POST", "call/predict"),
    ("POST", "cancel"),
    ("POST", "reset"),
    ("POST", "component_server"),
    ("POST", "process_recording"),
    ("GET", "vibe-code"),
]


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_what_the_page_does_not_use_is_closed(page_url, method, path):
    answer = httpx.request(method, f"{page_url}gradio_api/{path}", json={}, timeout=60)
    assert (answer.status_code, answer.text) == (404, "Not Found")


@pytest.mark.parametrize("path", ["monitoring", "monitoring/summary", "login", "logout", "openapi.json"])
def test_so_are_gradio_s_own_pages(page_url, path):
    assert httpx.get(f"{page_url}{path}", timeout=60).status_code == 404


def test_pages_of_other_sites_neither_read_nor_send(page_url):
    origin = page_url.removesuffix("/web/")
    join = {"fn_index": 0, "data": [], "session_hash": "abc"}
    for other in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://other.example"}):
        sent = httpx.post(f"{page_url}gradio_api/queue/join", json=join, headers=other, timeout=60)
        assert sent.status_code == 403
        streams = {"session_hash": "abc"}
        for path in ("queue/data", "heartbeat/abc"):
            read = httpx.get(f"{page_url}gradio_api/{path}", params=streams, headers=other, timeout=60)
            assert read.status_code == 403
    config = httpx.get(f"{page_url}config", headers={"Origin": "https://other.example"}, timeout=60)
    assert config.status_code == 200
    assert "access-control-allow-origin" not in config.headers
    framed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "iframe", "Sec-Fetch-Mode": "navigate"}
    page = httpx.get(page_url, headers=framed, timeout=60)
    assert page.status_code == 200
    assert "frame-ancestors 'self' https://huggingface.co" in page.headers["content-security-policy"]
    assert page.headers["referrer-policy"] == "same-origin"
    assert httpx.get(f"{origin}/web/", timeout=60).headers["x-content-type-options"] == "nosniff"


def test_the_page_may_be_below_a_path(page_url):
    origin, told = page_url.removesuffix("/web/"), {"X-Forwarded-Prefix": "/llmserve"}
    for path in ("/", "/web", "/demo"):
        assert httpx.get(f"{origin}{path}", timeout=60).headers["location"] == "web/"
        assert httpx.get(f"{origin}{path}", headers=told, timeout=60).headers["location"] == "/llmserve/web/"
    assert httpx.get(f"{origin}/favicon.ico", timeout=60).headers["location"] == "web/favicon.ico"
    for url in (f"{origin}/web/config", f"{origin}/llmserve/web/config"):
        assert httpx.get(url, headers=told, timeout=60).json()["root"] == f"{origin}/llmserve/web"
        public = {**told, "X-Forwarded-Host": "llm.example", "X-Forwarded-Proto": "https"}
        assert httpx.get(url, headers=public, timeout=60).json()["root"] == "https://llm.example/llmserve/web"
    for path in ("upload", "file=/etc/hostname"):
        assert (
            httpx.get(f"{origin}/llmserve/web/gradio_api/{path}", headers=told, timeout=60).status_code == 404
        )
    other = {**told, "Sec-Fetch-Site": "cross-site"}
    read = httpx.get(f"{origin}/llmserve/web/gradio_api/heartbeat/abc", headers=other, timeout=60)
    assert read.status_code == 403
