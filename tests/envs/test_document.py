"""The pages on the environments and the class's docstring in step with the code."""

from __future__ import annotations

import inspect

import gymnasium as gym
import pytest

import llmserve_env
from llmserve_env.controls import SPECS
from llmserve_env.envs.serve_env import LLMServeEnv
from llmserve_env.envs.vector_env import LLMServeVectorEnv
from scripts.document_tables import DOCUMENTS, with_tables
from tests.of_every_task import CONTROLS, FEATURES

PAGES = ("environments.md", "environment-forms.md")
DOCUMENT = "".join((DOCUMENTS / page).read_text(encoding="utf-8") for page in PAGES)
DOCSTRING = inspect.getdoc(LLMServeEnv) or ""


@pytest.mark.parametrize("path", sorted(DOCUMENTS.rglob("*.md")), ids=lambda path: path.stem)
def test_the_tables_are_those_of_the_declarations(path):
    text = path.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run scripts/document_tables.py"


def test_the_environments_have_tables_of_controls_and_features():
    for name in ("controls", "features"):
        assert f"<!-- {name}: made by" in DOCUMENT
    assert f"float32[{len(FEATURES)}]" in DOCUMENT


@pytest.mark.parametrize("name", CONTROLS)
def test_every_control_is_in_both(name):
    for text in (DOCUMENT, DOCSTRING):
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {CONTROLS.index(name)} ")][:1]
        assert name in row
        assert SPECS[name].range_text in row


def test_every_argument_is_in_both():
    single = set(inspect.signature(LLMServeEnv.__init__).parameters) - {"self"}
    for name in single:
        assert f"| `{name}` " in DOCSTRING
    vector = set(inspect.signature(LLMServeVectorEnv.__init__).parameters) - {"self", "max_episode_steps"}
    for name in single | vector:
        assert f"| `{name}` " in DOCUMENT


def test_every_id_has_a_section():
    for env_id in llmserve_env._ENVIRONMENTS:
        assert env_id in gym.registry
        assert f"\n## {env_id}\n" in DOCUMENT


def test_every_key_of_info_is_in_both():
    env = LLMServeEnv(horizon_s=3.0)
    for name in env.reset(seed=0)[1]:
        assert f"`{name}`" in DOCSTRING
        assert f"| `{name}` " in DOCUMENT
