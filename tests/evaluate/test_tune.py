"""The tuning of the reactive rule."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from evaluate.tune import Found, changed, to_toml, tunable, tune_rule
from llmserve_env.agents import ReactiveAgent, ReactiveRule, play
from llmserve_env.errors import InputError
from llmserve_env.tasks import EVALUATION_SEEDS, load_task

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TASK = load_task("static_workload", horizon_s=40.0)
POOR = ReactiveRule(batch_cap=16, speculation_depth=5)
NAMES = tuple(ReactiveRule.model_fields)


def test_tuning_finds_a_rule_within_its_budget_and_says_what_it_scores():
    counted, best = [], Found(POOR, -np.inf)
    rule, score = tune_rule(TASK, range(4), 240, counted.append, best)
    assert sum(counted) == best.episodes <= 240
    assert (best.rule, best.score) == (rule, score)
    assert play(ReactiveAgent(rule), TASK, range(4)).scores.mean() == pytest.approx(score)
    assert score > play(ReactiveAgent(POOR), TASK, range(4)).scores.mean()
    assert score >= play(ReactiveAgent(ReactiveRule()), TASK, range(4)).scores.mean()
    assert tune_rule(TASK, range(4), 240) == (rule, score)


def test_tuning_refuses_seeds_of_evaluation_and_budgets_too_small():
    with pytest.raises(InputError) as caught:
        tune_rule(TASK, EVALUATION_SEEDS[:4], 240)
    assert caught.value.field == "seeds"
    with pytest.raises(InputError, match=r"expected \d+ or more, found 10"):
        tune_rule(TASK, range(4), 10)


def test_changed_rules_stay_in_range_and_change():
    rng, rule = np.random.default_rng(0), ReactiveRule()
    everything = set()
    for i in range(300):
        child = changed(rule, rng, NAMES, share=0.2, spread=None if i % 2 else 0.1)
        assert ReactiveRule(**child.model_dump()) == child
        everything |= {name for name, value in child.model_dump().items() if value != getattr(rule, name)}
        rule = child
    assert everything == set(ReactiveRule.model_fields)
    assert sum(changed(rule, rng, NAMES, share=0.0) != rule for _ in range(50)) > 40  # one is always redrawn


def test_admission_is_tuned_where_it_is_granted():
    assert tunable(load_task("death_spiral")) == list(NAMES)
    assert tunable(TASK) == [name for name in NAMES if not name.startswith("admission_")]


def test_toml_holds_the_rule():
    found = Found(POOR, 0.5, 240)
    table = tomllib.loads(to_toml("static_workload", found, "a command", range(4)))["static_workload"]
    assert table["reactive"].pop("seeds") == "0..3"
    assert [table["reactive"].pop(name) for name in ("episodes", "score", "source")] == [
        240,
        0.5,
        "a command",
    ]
    assert ReactiveRule(**table["reactive"]) == POOR
