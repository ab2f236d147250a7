"""The gateway's dashboard, as an operator has it in a browser."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.live.endpoint_server import CompletionEndpoint
from tests.live.endpoint_server import serving as serving_endpoint

_STEERED = ("--agent", "reactive", "--task", "static_workload", "--window-s", "0.5")
_BODY = {"model": "m", "prompt": "some words", "max_tokens": 3, "stream": True}


@contextmanager
def _gateway(upstream: str, *options: str, port: str = "0") -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """URL and process of a gateway."""
    command = [sys.executable, "-m", "llmserve_env", "gateway", "--upstream", upstream, "--port", port]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().removeprefix("listening on ").strip()
            assert url, "the gateway did not start: its reason is on stderr"
            yield url, process
        finally:
            process.terminate()
            process.communicate(timeout=60)


@pytest.fixture(scope="module")
def upstream() -> Iterator[str]:
    """The URL of an endpoint that answers completions and shows no metrics."""
    with serving_endpoint(CompletionEndpoint()) as url:
        yield url


@pytest.fixture(scope="module")
def steered(upstream: str) -> Iterator[str]:
    """The URL of a gateway with an agent, which some requests went through."""
    with _gateway(upstream, "--no-metrics", *_STEERED) as (url, _):
        for _ in range(5):
            assert httpx.post(f"{url}/v1/completions", json=_BODY, timeout=60).status_code == 200
        assert httpx.post(f"{url}/v1/completions", content=b"[]", timeout=60).status_code == 400
        yield url


@pytest.fixture
def look(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a gateway's dashboard; in the end nobody's console may have an error, nor a request have gone
    to another host.
    """
    contexts: list[Any] = []
    faults: list[str] = []

    def open_page(url: str, *, gone: bool = False, **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        if not gone:
            page.on("console", lambda told: faults.append(told.text) if told.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "request", lambda sent: None if sent.url.startswith((url, "data:")) else faults.append(sent.url)
        )
        page.goto(f"{url}/dashboard")
        page.locator("body[data-windows]").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


def test_requests_windows_and_decisions_come_without_a_reload(look: Callable[..., Any], steered: str) -> None:
    page = look(steered)
    page.locator("#state").get_by_text("live", exact=True).wait_for()
    assert "agent reactive · task static_workload" in page.locator("#about").inner_text()
    seen = int(page.locator("body").get_attribute("data-windows"))
    page.locator(f'body:not([data-windows="{seen}"])').wait_for()

    tenant = page.locator("#tenants tbody tr").first
    completed = int(tenant.locator("td").nth(5).inner_text())
    assert completed >= 5
    assert "1 requests turned away" in page.locator("#foot").inner_text()
    assert httpx.post(f"{steered}/v1/completions", json=_BODY, timeout=60).status_code == 200
    tenant.locator("td").nth(5).get_by_text(str(completed + 1), exact=True).wait_for()
    line = page.locator('[data-chart="Time to first token"] path:not([d="M0 0"]):not([stroke-dasharray])')
    line.first.wait_for(state="attached")

    for _ in range(1000):  # the agent may change it in between
        action = httpx.get(f"{steered}/dashboard/data", timeout=60).json()["action"]
        in_force = page.locator('#settings [data-field="batch_cap"] td').first.inner_text()
        if in_force == str(action["batch_cap"]):
            break
    assert in_force == str(action["batch_cap"])
    assert "not applied" in page.locator('#settings [data-field="prefill_decode_split"]').inner_text()
    assert page.locator("#decisions tbody tr").count() >= 1
    page.get_by_label("interventions only").check()
    assert page.locator('#decisions tr[data-by="agent"]').count() == 0


def test_the_keyboard_reads_single_windows(look: Callable[..., Any], steered: str) -> None:
    page = look(steered)
    page.locator('body:not([data-windows="0"])').wait_for()
    page.get_by_role("button", name="Pause").press("Enter")
    page.locator("#state").get_by_text("paused").wait_for()
    kept = page.locator("body").get_attribute("data-windows")
    chart = page.get_by_role("group", name="Requests, per second")
    chart.focus()
    page.keyboard.press("Home")
    said = page.locator("#said").inner_text()
    assert re.search(r"^Requests, \d\d:\d\d:\d\d: arrived [\d.]+, completed [\d.]+, refused 0,", said)
    page.keyboard.press("End")
    assert page.locator("#said").inner_text() != said or kept == "1"
    assert page.locator("body").get_attribute("data-windows") == kept
    unnamed = page.evaluate(
        "() => [...document.querySelectorAll('button, select, input, [tabindex]')].filter(each => !("
        "each.ariaLabel || each.labels?.length || each.getAttribute('aria-labelledby') || each.innerText"
        ")).length"
    )
    assert unnamed == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out(look: Callable[..., Any], steered: str, scheme: str) -> None:
    for width in (375, 1280):
        page = look(steered, color_scheme=scheme, viewport={"width": width, "height": 800})
        page.locator('body:not([data-windows="0"])').wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") == width
        outside = page.evaluate(
            "width => [...document.querySelectorAll('main *')].filter(each => "
            "!each.closest('.scroll, .hidden') && each.getBoundingClientRect().right > width + 1"
            ").map(each => each.outerHTML)",
            width,
        )
        assert not outside
        ground, ink = page.evaluate(
            "() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        brightness = [sum(map(int, re.findall(r"\d+", each)[:3])) for each in (ground, ink)]
        assert (brightness[0] < brightness[1]) == (scheme == "dark")


def test_a_gateway_that_goes_and_comes_back_is_told(look: Callable[..., Any], upstream: str) -> None:
    with _gateway(upstream, "--window-s", "0.2") as (url, process):
        page = look(url, gone=True)
        page.locator("#notes").get_by_text("No requests yet").wait_for()
        page.locator("#no-decisions").get_by_text("No agent decides here").wait_for()
        page.locator("#state").get_by_text("metrics stale").wait_for()  # it shows none
        page.locator("#notes").get_by_text("expected HTTP 200").wait_for()
        page.locator('body:not([data-windows="0"])').wait_for()
        process.kill()
        page.locator("#state").get_by_text("gateway gone").wait_for()
        page.locator("#notes").get_by_text("What is shown is from before").wait_for()
    with _gateway(upstream, "--no-metrics", "--window-s", "600", port=url.rpartition(":")[2]):
        page.locator("#state").get_by_text("live", exact=True).wait_for()
        page.locator("#notes").get_by_text("The first window is not over; one takes 600 s").wait_for()
        assert page.locator("body").get_attribute("data-windows") == "0"  # those of before are not its own
