"""docs/environments.md and the class's docstring in step with the code."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import gymnasium as gym
import pytest

import llmserve_env
from llmserve_env.controls import CONTROLS
from llmserve_env.envs.serve_env import LLMServeEnv
from llmserve_env.envs.spaces import PARTS
from llmserve_env.envs.vector_env import LLMServeVectorEnv
from llmserve_env.observation import FEATURES, TENANT_SLOTS
from llmserve_env.schema import ServeAction

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "environments.md").read_text(encoding="utf-8")
DOCSTRING = inspect.getdoc(LLMServeEnv) or ""


def observation_rows() -> list[str]:
    """The rows of the document's table of features; those of tenants once for all slots."""
    slot = len(FEATURES[PARTS["tenants"]]) // TENANT_SLOTS
    first = PARTS["tenants"].start
    rows = []
    for number, feature in enumerate(FEATURES[: first + slot]):
        scaling = f"x / (x + {feature.half:g})" if feature.half else "as it is"
        place, name, meaning = str(number), feature.name, feature.meaning
        if number >= first:
            place, name = f"{number} + {slot} k", name.replace("tenant_0_", "tenant_k_")
            meaning = meaning.replace("tenant 0: ", "")
        rows.append(f"| {place} | `{name}` | {meaning} | {scaling} |")
    return rows


def test_every_feature_is_in_the_document():
    listed = [line for line in DOCUMENT.splitlines() if re.search(r"\| (as it is|x / .*) \|$", line)]
    assert listed == observation_rows()
    assert f"float32[{len(FEATURES)}]" in DOCUMENT


@pytest.mark.parametrize("name", CONTROLS)
def test_every_control_is_in_both(name):
    schema = ServeAction.model_json_schema()["properties"][name]
    for text in (DOCUMENT, DOCSTRING):
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {CONTROLS.index(name)} ")][:1]
        assert name in row
        if "minimum" in schema:
            assert f"{schema['minimum']}..{schema['maximum']}" in row


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
