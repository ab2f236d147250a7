"""A server with its page, and a browser to look at it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_START_S = 120
_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def serving(*options: str) -> Iterator[str]:
    """The URL of a server with its page, which ends with the block."""
    command = [sys.executable, "-m", "server.app", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().removeprefix("listening on ").strip()
            assert url, "the server did not start: its reason is on stderr"
            urllib.request.urlopen(f"{url}/health", timeout=_START_S).close()  # it is ready
            yield url
        finally:
            server.terminate()
            server.wait(_START_S)


@pytest.fixture(scope="session")
def page_url() -> Iterator[str]:
    """The URL of the page of a server that all tests share."""
    with serving() as url:
        yield f"{url}/web/"


@pytest.fixture(scope="module")  # while it is open, its event loop runs: other modules have their own
def browser() -> Iterator[Any]:
    """The system's Chromium."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on PATH (Debian: apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=list(_ARGUMENTS))
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Any, page_url: str) -> Iterator[Callable[..., Any]]:
    """Opens the page as a visitor of its own; in the end nobody's console may have an error, nor a request
    have gone to another host, or out of the path below which the page is.
    """
    contexts: list[Any] = []
    faults: list[str] = []

    def open_page(url: str = page_url, **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda told: faults.append(told.text) if told.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        ours = (url.removesuffix("/web/"), "data:", "blob:")
        page.on("request", lambda sent: None if sent.url.startswith(ours) else faults.append(sent.url))
        page.goto(url)
        page.locator("#play-one").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults
