"""Pictures of the page for the README: a server of its own, an agent's episode, a browser.

    python scripts/screenshot.py

Needs Chromium on PATH (Debian: apt-get install chromium) and the development requirements. Writes
docs/images/page.png, as on a desk, and docs/images/page-phone.png.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from playwright.sync_api import sync_playwright

_IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
_DESK: dict[str, Any] = {"viewport": {"width": 1280, "height": 1200}}
_PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844},
    "is_mobile": True,
    "has_touch": True,
    "device_scale_factor": 2,
}


@dataclass
class Arguments:
    """Pictures of the page."""

    folder: Path = _IMAGES
    """Folder of the pictures."""
    task: str = "bursty_workload"
    """Task that is played."""
    agent: str = "reactive"
    """Agent that plays it."""
    scheme: str = "light"
    """Colours: light or dark."""


def main(arguments: Arguments) -> None:
    """Take the pictures."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("error: no chromium on PATH (Debian: apt-get install chromium)")
    command = [sys.executable, "-m", "server.app", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().removeprefix("listening on ").strip()
            _take(chromium, f"{url}/web/", arguments)
        finally:
            server.terminate()


def _take(chromium: str, url: str, arguments: Arguments) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for name, screen in (("page", _DESK), ("page-phone", _PHONE)):
            page = browser.new_page(color_scheme=arguments.scheme, **screen)
            page.goto(url)
            _play(page, arguments.task, arguments.agent)
            page.locator("#begin").evaluate("each => each.scrollIntoView({block: 'start'})")
            path = arguments.folder / f"{name}.png"
            page.screenshot(path=path, full_page=name == "page")
            print(path, f"{path.stat().st_size / 1000:.0f} kB")
        browser.close()


def _play(page: Any, task: str, agent: str) -> None:
    for name, option in (("task", task), ("agent", agent), ("pace", "full speed")):
        page.locator(f"#{name} input").click()
        page.get_by_role("option", name=option).click()
    page.get_by_label("evaluation", exact=True).check()
    page.locator("#let-play").click()
    played = page.locator('#board [data-key="window"]').filter(has_text=re.compile(r"^\s*(\d+) / \1\s*$"))
    played.wait_for()
    page.locator("#grade").click()
    page.locator("#result table").wait_for()


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
