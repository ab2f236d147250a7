"""The page, as a visitor has it in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llmserve_env import grading
from llmserve_env.agents import load_agent, play
from llmserve_env.tasks import load_task
from tests.browser.conftest import serving

_PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


def _choose(page: Any, name: str, option: str) -> None:
    page.locator(f"#{name} input").click()
    page.get_by_role("option", name=option).click()


def _shows(page: Any, windows: int) -> Any:
    """The plots, once they show so many windows."""
    plots = page.locator(f'#board [data-windows="{windows}"]')
    plots.wait_for()
    return plots


def _number(page: Any, key: str) -> str:
    return str(page.locator(f'#board [data-key="{key}"]').inner_text())


def _let_play(page: Any, agent: str, windows: int, pace: str = "full speed") -> None:
    _choose(page, "agent", agent)
    _choose(page, "pace", pace)
    page.locator("#let-play").click()
    _shows(page, windows)


def _score(page: Any) -> float:
    page.locator("#grade").click()
    score = page.locator('#result [data-key="score"]')
    score.wait_for()
    return float(score.get_attribute("data-value"))


def _download(page: Any, folder: Path) -> Path:
    with page.expect_download() as started:
        page.locator("#download").click()
    path = folder / started.value.suggested_filename
    started.value.save_as(path)
    return path


def _upload(page: Any, path: Path) -> None:
    with page.expect_file_chooser() as asked:
        page.locator("#upload").click()
    asked.value.set_files(path)


def test_windows_are_played_with_the_form_s_configuration_and_the_plots_follow(visit: Any) -> None:
    page = visit()
    assert page.title() == "LLMServe"
    _choose(page, "task", "bursty_workload")
    not_granted = page.locator("#speculation_depth")
    not_granted.get_by_text("Not granted by this task: stays 0.").wait_for()
    assert not_granted.locator("input[type=number]").is_disabled()
    assert "stays" not in page.locator("#prefill_decode_split").inner_text()
    page.locator("#batch_cap input[type=number]").fill("64")
    page.locator("#batch_cap input[type=number]").press("Tab")
    page.locator("#priority_routing input").check()
    page.locator("#play-one").click()
    first = _shows(page, 1).inner_html()
    assert _number(page, "window") == "1 / 120"
    page.locator("#play-many").click()
    plots = _shows(page, 11)
    assert plots.inner_html() != first
    assert _number(page, "window") == "11 / 120"
    assert _number(page, "time") == "110 s"
    assert plots.locator(".now").all_inner_texts() == ["64", "1", "FP16", "off", "on"]


def test_a_page_below_a_proxy_s_path_plays_and_asks_for_nothing_else(visit: Any, page_url: str) -> None:
    below = page_url.replace("/web/", "/llmserve/web/")
    page = visit(below, extra_http_headers={"X-Forwarded-Prefix": "/llmserve"})
    page.locator("#play-one").click()
    _shows(page, 1)


def test_an_agent_s_grade_is_what_it_scores_here_and_its_log_replays(visit: Any, tmp_path: Path) -> None:
    task, seed = load_task("static_workload"), 2**31 + 5
    expected = play(load_agent("reactive", task), task, [seed]).scores[0]
    page = visit()
    page.get_by_label("Seed", exact=True).fill(str(seed))
    _let_play(page, "reactive", task.windows)
    assert _number(page, "score") == f"{expected:.4f}"
    assert _score(page) == expected
    assert "yes, by replay" in page.locator("#result").inner_text()
    assert f"{seed}, of evaluation" in page.locator("#result").inner_text()

    path = _download(page, tmp_path)
    assert path.name == f"static_workload-{seed}.json"
    log = grading.read_log(path)
    assert grading.grade(log).score == expected

    page.locator("#begin").click()
    _shows(page, 0)
    _upload(page, path)
    plots = _shows(page, task.windows)
    assert plots.locator(".now").first.is_visible()
    page.get_by_text("Uploaded log").wait_for()

    tampered = tmp_path / "tampered.json"
    fields = json.loads(path.read_text())
    fields["actions"][7]["batch_cap"] = 1
    tampered.write_text(json.dumps(fields))
    _upload(page, tampered)
    message = page.locator("#message [role=alert]")
    message.wait_for()
    assert "refused" in message.inner_text()
    assert re.search(r"digests\[\d+\]", message.inner_text())
    tampered.write_text("{")
    _upload(page, tampered)
    page.locator("#message").get_by_text("JSON").wait_for()
    page.locator("#play-one").click()
    _shows(page, 1)


def test_an_agent_takes_over_is_stopped_and_plays_on_as_if_it_had_not_been(visit: Any) -> None:
    page = visit()
    _choose(page, "pace", "10 windows/s")
    _choose(page, "agent", "reactive")
    page.locator("#let-play").click()
    page.locator('#board [data-windows]:not([data-windows="0"])').wait_for()
    page.locator("#grade").click()
    page.locator("#message").get_by_text("is being played on").wait_for()
    page.locator("#stop:enabled").click()
    page.locator("#stop:disabled").wait_for()
    stopped = int(page.locator("#board [data-windows]").get_attribute("data-windows"))
    assert stopped < 300
    page.locator("#grade").click()
    page.locator("#message").get_by_text(f"{stopped} of 300 windows").wait_for()
    task = load_task("static_workload")
    _let_play(page, "reactive", task.windows)
    assert _score(page) == play(load_agent("reactive", task), task, [0]).scores[0]
    page.locator("#play-one").click()
    page.locator("#message").get_by_text("the episode is over").wait_for()


@pytest.mark.parametrize("seed", ["x", "-1", str(2**63)])
def test_a_seed_that_there_is_not_is_refused_in_words(visit: Any, seed: str) -> None:
    page = visit()
    page.get_by_label("Seed", exact=True).fill(seed)
    page.locator("#play-one").click()
    page.locator("#message").get_by_text("seed").wait_for()


def test_visitors_do_not_see_each_other_s_episode_in_either_tab(visit: Any) -> None:
    one, other = visit(), visit()
    one.locator("#play-many").click()
    _shows(one, 10)
    other.locator("#play-one").click()
    _shows(other, 1)
    one.locator("#play-one").click()
    _shows(one, 11)

    for page in (one, other):
        page.get_by_role("tab", name="Playground").click()
        page.get_by_role("heading", name="LLMServe", exact=True).and_(page.locator(":visible")).wait_for()
        code = "from llmserve_env import LLMServeEnv, ServeAction"
        page.locator(".oe-code").filter(has_text=code).wait_for()
        page.get_by_role("button", name="Reset", exact=True).click()
        page.get_by_text("new episode").wait_for()
    for step in (1, 2):
        one.get_by_role("button", name="Run step").click()
        one.locator(".oe-stats").get_by_text(str(step), exact=True).wait_for()
    other.get_by_role("button", name="Run step").click()
    other.locator(".oe-stats").get_by_text("1", exact=True).wait_for()
    for page, steps in ((one, 2), (other, 1)):
        page.get_by_role("button", name="State").click()
        page.locator(".oe-episode ~ * .cm-content, .cm-content").filter(has_text="step_count").wait_for()
        state = json.loads(
            "".join(page.locator(".cm-content").filter(has_text="step_count").all_inner_texts())
        )
        assert state["step_count"] == steps


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_has_nothing_to_scroll_sideways(visit: Any, scheme: str) -> None:
    page = visit(color_scheme=scheme, **_PHONE)
    _choose(page, "task", "adversarial_multitenant")
    _let_play(page, "best-constant", 180)
    _score(page)
    for tab in ("Play", "Playground"):
        page.get_by_role("tab", name=tab, exact=True).click()
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        outside = page.evaluate(
            "() => [...document.querySelectorAll('#board *')].filter("
            "each => each.getBoundingClientRect().right > 391).length"
        )
        assert outside == 0


def test_who_leaves_makes_room_and_a_full_house_is_told_in_words(visit: Any) -> None:
    with serving("--max-sessions", "1") as url:
        page = visit(f"{url}/web/")
        page.locator("#play-one").click()
        _shows(page, 1)
        late = visit(f"{url}/web/")
        late.locator("#play-one").click()
        late.locator("#message").get_by_text("1 sessions are open").wait_for()
        page.close()
        plots = late.locator("#board [data-windows]")
        for _ in range(1000):  # the server notices in its own time that a page has gone
            late.locator("#play-one").click()  # taken once the page has the answer to the last one
            late.wait_for_timeout(100)
            if plots.count():
                break
        plots.wait_for()
        late.close()
