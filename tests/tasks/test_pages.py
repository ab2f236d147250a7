"""docs/tasks in step with the tasks: a page for each, with what the command prints now."""

from __future__ import annotations

import inspect
import re

import pytest

from llmserve_env.envs.serve_env import LLMServeEnv
from llmserve_env.tasks import list_tasks

from .regenerate_pages import GENERATED, PAGES, PICTURE, ROOT, regenerated

SECTIONS = (
    "What it is about",
    "What each control costs",
    "In numbers",
    "Reward",
    "Episodes",
    "Arguments",
    "How much control is worth",
    "Version history",
)


def test_every_task_has_a_page_and_a_line_in_the_index():
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    pages = {path.stem for path in PAGES.glob("*.md")} - {"README"}
    assert pages == set(list_tasks())
    assert all(f"]({name}.md)" in index for name in pages)
    assert [found[2] for found in GENERATED.finditer(index)] == ["tasks --markdown"]


@pytest.mark.parametrize("name", list_tasks())
def test_page_describes_its_task(name):
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert [found[2] for found in GENERATED.finditer(text)] == [f"tasks {name} --markdown"]
    assert re.findall(r"^## (.*)$", text, re.MULTILINE)[-len(SECTIONS) :] == list(SECTIONS)
    assert f'gym.make("LLMServe-v0", task_id="{name}"' in text
    ((command, picture),) = PICTURE.findall(text)
    assert command == f"tasks {name} --picture"
    assert picture == f"docs/images/task-{name}.png"
    assert (ROOT / picture).read_bytes().startswith(b"\x89PNG")
    assert f"](../images/task-{name}.png)" in text


@pytest.mark.parametrize("path", sorted(PAGES.glob("*.md")), ids=lambda path: path.stem)
def test_page_says_what_the_command_prints(path):
    text = path.read_text(encoding="utf-8")
    assert text == regenerated(text), "run python -m tests.tasks.regenerate_pages"


@pytest.mark.parametrize("path", sorted(PAGES.glob("*.md")), ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\((?!https?://)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / link).exists(), link


def test_pages_name_arguments_that_there_are():
    known = inspect.signature(LLMServeEnv.__init__).parameters
    for name in list_tasks():
        section = (PAGES / f"{name}.md").read_text(encoding="utf-8").split("## Arguments")[1]
        listed = re.findall(r"^\| `(\w+)` ", section.split("\n## ")[0], re.MULTILINE)
        assert listed
        assert set(listed) <= set(known)
