"""Additive increase, multiplicative decrease, window by window, on records made by hand."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from llmserve_env.agents import AIMDAgent, AIMDRule, load_agent, play
from llmserve_env.backend import WINDOW
from llmserve_env.controls import to_array
from llmserve_env.errors import InputError
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import load_task

TASK = load_task("static_workload", window_s=1.0)
SLO = TASK.tenants[0]
RULE = AIMDRule(memory_s=1.0, release=0.5, increase_per_s=4.0, decrease=0.5, pause_s=3.0)
BASE = ServeAction(batch_cap=64, speculation_depth=2)


def window(n=1, ttft=0.0, gap=0.0, wait=0.0):
    """WINDOW[n] whose measures are such shares of the promises."""
    windows = np.zeros(n, WINDOW)
    windows["end_s"] = 1.0
    windows["tenant_first_tokens"][:, 0] = 10
    windows["tenant_ttft_s"][:, 0] = 10 * np.asarray(ttft) * SLO.ttft_slo_s
    windows["p50_gap_s"] = np.asarray(gap) * SLO.tpot_slo_s
    windows["oldest_wait_s"] = np.asarray(wait) * SLO.ttft_slo_s
    return windows


def agent(rule=RULE, task=TASK, n=1, base=BASE):
    made = AIMDAgent(rule, base)
    made.reset(task, range(n))
    return made


def acts(playing, windows):
    return playing.act(np.zeros((len(windows), 1), np.float32), windows)


def caps(playing, *windows):
    return [int(acts(playing, each)["batch_cap"][0]) for each in windows]


def test_first_action_is_the_base():
    assert acts(agent(), np.zeros(1, WINDOW))[0] == to_array([BASE])[0]


def test_raises_by_steps_while_all_holds_and_ends_with_the_grid():
    playing = agent()
    assert caps(playing, *[window()] * 3) == [68, 72, 76]
    assert caps(playing, *[window()] * 200)[-1] == 512


def test_slow_tokens_cut_by_a_factor_and_not_again_at_once():
    # the average over 1 s of a step to 3 is 1.9 in the first window
    slow = window(gap=3.0)
    assert caps(agent(), window(), *[slow] * 5) == [68, 34, 34, 34, 17, 17]
    assert caps(agent(), *[slow] * 60)[-1] == 8


def test_a_breach_ends_below_the_release_only():
    playing = agent(RULE.model_copy(update={"pause_s": 60.0}))
    shares = [1.2, *[0.8] * 6, *[0.4] * 6]
    seen = caps(playing, *[window(gap=share) for share in shares])
    assert seen[:7] == [32] * 7  # at 0.8 neither cut again nor raised
    assert seen[-1] > 40


def test_late_first_tokens_cut_the_batch_only_where_the_rule_says_so():
    for values in ({"ttft": 3.0}, {"wait": 3.0}):
        late = [window(**values)] * 2
        assert caps(agent(), *late) == [68, 72]  # tokens come fast: room for more
        cutting = RULE.model_copy(update={"late_cuts_batch": 1})
        assert caps(agent(cutting), *late) == [32, 32]


def test_windows_without_tokens_hold():
    empty = window()
    empty["p99_gap_s"] = empty["p50_gap_s"] = np.nan
    assert caps(agent(), empty, empty) == [68, 72]


def test_controls_that_are_not_granted_stay():
    task = load_task("static_workload", controls={"kv_budget_fraction": [0.5, 1.0]})
    playing = agent(task=task, base=ServeAction(batch_cap=64, kv_budget_fraction=0.5))
    action = acts(playing, window(gap=3.0))[0]
    assert action["batch_cap"] == task.start.batch_cap
    assert action["kv_budget_fraction"] == 0.5


def test_admission_rate_is_cut_while_late_and_given_back_whole():
    task = load_task("static_workload", controls={"admission_rate": [2.0, 10.0, None]})
    rule = RULE.model_copy(update={"admit_decrease": 0.5, "admit_increase_per_s": 1.0})
    playing = agent(rule, task, base=task.start)
    late = [float(acts(playing, window(ttft=3.0))["admission_rate"][0]) for _ in range(8)]
    assert late == [5.0, 5.0, 5.0, 2.5, 2.5, 2.5, 2.0, 2.0]
    calm = [float(acts(playing, window())["admission_rate"][0]) for _ in range(20)]
    assert 2.0 < calm[5] < 10.0
    assert calm[-1] == np.inf


def test_a_rule_for_each_episode_and_many_as_one_by_one():
    rng, n = np.random.default_rng(0), 9
    rules = [RULE, RULE.model_copy(update={"memory_s": 20.0, "late_cuts_batch": 1}), *[RULE] * (n - 2)]
    together, alone = agent(rules, n=n), [agent(rule) for rule in rules]
    for _ in range(50):
        ttft, gap, wait = rng.uniform(0, 2, (3, n))
        windows = window(n, ttft, gap, wait)
        expected = np.concatenate([acts(one, windows[i : i + 1]) for i, one in enumerate(alone)])
        assert (acts(together, windows) == expected).all()
    with pytest.raises(InputError, match="expected 1 or 3 rules, found 2"):
        AIMDAgent(rules[:2]).reset(TASK, range(3))


def test_plays_and_refuses():
    task = load_task("static_workload", horizon_s=20.0)
    assert 0 < play(load_agent("aimd", task), task, [1, 2]).scores.min() < 1
    with pytest.raises(InputError, match="call reset"):
        AIMDAgent(RULE).act(np.zeros((1, 1), np.float32), np.zeros(1, WINDOW))
    with pytest.raises(ValidationError, match="decrease"):
        AIMDRule(decrease=1.5)
