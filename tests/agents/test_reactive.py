"""The reactive rule, window by window, on records made by hand."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from llmserve_env.agents import ReactiveAgent, ReactiveRule, play
from llmserve_env.backend import WINDOW
from llmserve_env.errors import InputError
from llmserve_env.tasks import load_task

TASK = load_task("adversarial_multitenant")
DOCUMENTS = [tenant.name for tenant in TASK.tenants].index("documents")
RULE = ReactiveRule(memory_s=1.0, release=0.5, priority_wait_s=2.0)


def window(n=1, documents=0, **values):
    """WINDOW[n], all alike: a quiet window but for what is given; per-cell numbers."""
    windows = np.zeros(n, WINDOW)
    windows["end_s"] = TASK.window_s
    windows["output_tokens"] = 1000
    windows["arrived_prompt_tokens"] = 2000
    for name, value in values.items():
        windows[name] = value
    windows["tenant_arrived"][:, DOCUMENTS] = documents
    return windows


def agent(rule=RULE, task=TASK, n=1):
    made = ReactiveAgent(rule)
    made.reset(task, range(n))
    return made


def acts(playing, windows):
    return playing.act(np.zeros((len(windows), 1), np.float32), windows)


def after(values, times=1, rule=RULE):
    """The action after as many windows alike."""
    playing = agent(rule)
    for _ in range(times):
        action = acts(playing, window(**values))
    return action[0]


def test_quiet_windows_leave_ordinary_settings():
    quiet = after({}, times=30)
    assert quiet["batch_cap"] == RULE.batch_cap
    assert quiet["kv_budget_fraction"] == RULE.kv_budget_fraction
    assert quiet["speculation_depth"] == RULE.speculation_depth
    assert quiet["quantization_tier"] == quiet["prefill_decode_split"] == quiet["priority_routing"] == 0


def test_first_action_comes_before_any_window():
    assert acts(agent(), np.zeros(1, WINDOW))[0] == after({})


def test_flood_of_long_prompts_is_throttled_and_urgent_tenants_go_first():
    flood = after({"documents": 40, "in_flight": 40})
    assert flood["kv_budget_fraction"] == RULE.flood_kv_budget_fraction
    assert flood["priority_routing"] == 1
    # the same crowd of conversations is none
    crowd = after({"in_flight": 40})
    assert crowd["kv_budget_fraction"] == RULE.kv_budget_fraction
    assert crowd["priority_routing"] == 0


def test_crowd_opens_batch_and_memory_and_speculates_less():
    crowd = after({"in_flight": 300, "running": 300})
    assert crowd["batch_cap"] == RULE.crowd_batch_cap
    assert crowd["kv_budget_fraction"] == RULE.crowd_kv_budget_fraction
    assert crowd["speculation_depth"] == RULE.crowd_speculation_depth


def test_priority_while_something_waits():
    assert after({"oldest_wait_s": 2.5})["priority_routing"] == 1
    assert after({"oldest_wait_s": 1.5})["priority_routing"] == 0
    always = RULE.model_copy(update={"priority_wait_s": 0.0})
    assert acts(agent(always), np.zeros(1, WINDOW))["priority_routing"][0] == 1


def test_settings_return_below_the_release_only():
    playing, threshold = agent(), RULE.speculation_running * TASK.cell.engines
    seen = []
    for share in (0.9, 1.1, 0.9, 0.6, 0.4, 0.9, 1.1):
        action = acts(playing, window(running=share * threshold))
        seen.append(bool(action["speculation_depth"][0] == RULE.crowd_speculation_depth))
    assert seen == [False, True, True, True, False, False, True]


def test_averages_ride_over_a_single_window():
    patient = agent(RULE.model_copy(update={"memory_s": 60.0}))
    acts(patient, window())
    assert acts(patient, window(documents=10))["kv_budget_fraction"][0] == RULE.kv_budget_fraction
    for _ in range(30):
        action = acts(patient, window(documents=10))
    assert action["kv_budget_fraction"][0] == RULE.flood_kv_budget_fraction


def test_precision_changes_after_lasting_waits_and_returns_after_calm():
    playing, tiers = agent(), []
    slow, calm, busy = (
        {"oldest_wait_s": 9.0, "in_flight": 200},
        {"in_flight": 2},
        {"in_flight": 200},
    )
    for values, times in ((slow, 11), (calm, 1), (slow, 12), (busy, 30), (calm, 11), (busy, 1), (calm, 12)):
        for _ in range(times):
            action = acts(playing, window(**values))
        tiers.append(int(action["quantization_tier"][0]))
    # 60 s of 5 s windows: 11 waits are not enough, nor are they when calm comes between; nor 11 calm ones
    assert tiers == [0, 0, 1, 1, 1, 1, 0]


def test_split_after_lasting_heavy_prompts_and_joined_after_calm():
    heavy = {"arrived_prompt_tokens": 200_000, "output_tokens": 2000}
    assert after(heavy, times=11)["prefill_decode_split"] == 0
    assert after(heavy, times=12)["prefill_decode_split"] == 1
    assert after({**heavy, "documents": 40}, times=30)["prefill_decode_split"] == 0  # throttled instead
    assert after({**heavy, "output_tokens": 50_000}, times=30)["prefill_decode_split"] == 0
    assert after({"arrived_prompt_tokens": 2000, "output_tokens": 20}, times=30)["prefill_decode_split"] == 0
    playing = agent()
    for values, times, split in ((heavy, 12, 1), ({}, 11, 1), (heavy, 1, 1), ({}, 12, 0)):
        for _ in range(times):
            action = acts(playing, window(**values))
        assert action["prefill_decode_split"][0] == split


def test_controls_that_are_not_granted_stay():
    task = load_task("static_workload", controls={"batch_cap": [8, 64]})
    playing = agent(task=task)
    for _ in range(40):
        action = acts(playing, window(documents=40, in_flight=900, running=900, oldest_wait_s=20.0))
    assert action["batch_cap"][0] == RULE.crowd_batch_cap
    for name in ("kv_budget_fraction", "speculation_depth", "priority_routing", "prefill_decode_split"):
        assert action[name][0] == getattr(task.start, name)
    assert action["quantization_tier"][0] == 0


def test_a_rule_for_each_episode():
    rules = [RULE, RULE.model_copy(update={"flood_kv_budget_fraction": 0.3, "memory_s": 40.0})]
    seeds, task = [21, 22], load_task("adversarial_multitenant", horizon_s=200.0)
    together = play(ReactiveAgent(rules), task, seeds)
    alone = [
        play(ReactiveAgent(rule), task, [seed]).scores[0] for rule, seed in zip(rules, seeds, strict=True)
    ]
    assert together.scores.tolist() == alone
    with pytest.raises(InputError, match="expected 1 or 3 rules, found 2"):
        ReactiveAgent(rules).reset(TASK, range(3))


def test_many_episodes_act_as_one_by_one():
    rng, n = np.random.default_rng(0), 17
    names = ("in_flight", "running", "oldest_wait_s", "arrived_prompt_tokens", "output_tokens")
    together, alone = agent(n=n), [agent() for _ in range(n)]
    for _ in range(60):
        windows = window(n, documents=rng.integers(0, 5, n))
        for name, top in zip(names, (200, 200, 12, 200_000, 5000), strict=True):
            windows[name] = rng.uniform(0, top, n)
        expected = np.concatenate([acts(one, windows[i : i + 1]) for i, one in enumerate(alone)])
        assert (acts(together, windows) == expected).all()


def test_rules_out_of_range_are_refused():
    for values in ({"release": 1.5}, {"fast_tier": 3}, {"nonesuch": 1}):
        with pytest.raises(ValidationError, match=next(iter(values))):
            ReactiveRule(**values)
