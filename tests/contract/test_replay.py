"""What an episode's log says is what its grade says, whatever was played."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from llmserve_env.controls import to_array
from llmserve_env.episode import EpisodeBatch
from llmserve_env.grading import grade
from llmserve_env.rewards import COMPONENTS
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import EVALUATION_SEEDS, list_tasks, load_task

from .episodes import IDLE, anything, constant, played, short, stationary, sticky, uniform

WINDOWS = 12
POLICIES = {
    "uniform": uniform,
    "stationary": stationary,
    "sticky": sticky,
    "anything": lambda task, rng, count: anything(rng, count),
    "least": lambda task, rng, count: constant(count, **IDLE.model_dump()),
    "most": lambda task, rng, count: constant(
        count, batch_cap=512, speculation_depth=8, quantization_tier="INT4", prefill_decode_split=True,
        priority_routing=True,
    ),
    "switching": lambda task, rng, count: to_array(
        [ServeAction(quantization_tier=("FP16", "INT8", "INT4")[k % 3], prefill_decode_split=k % 2 > 0)
         for k in range(count)]
    ),
}  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("task_id", list_tasks())
def test_a_log_grades_to_what_was_played(task_id, policy):
    task, rng = short(task_id, WINDOWS), np.random.default_rng(5)
    episode = played(task, 31, POLICIES[policy](task, rng, WINDOWS))
    log = episode.log()
    result = grade(log)
    assert result.score == log.score
    assert result.score == pytest.approx(sum(log.rewards) / WINDOWS, abs=1e-12)
    assert tuple(result.components) == COMPONENTS
    assert all(0 <= part <= result.score for part in result.components.values())
    assert sum(result.components.values()) == pytest.approx(result.score, abs=1e-12)
    assert (result.windows, result.complete, result.verified) == (WINDOWS, True, True)
    assert (result.task_id, result.seed, result.held_out) == (task_id, 31, False)
    counts = result.requests
    assert min(counts.values()) >= 0
    assert counts["arrived"] == counts["completed"] + counts["failed"] + counts["unfinished"]
    assert counts["arrived"] + counts["to_come"] == len(task.requests(31))
    assert counts["in_slo"] <= counts["completed"]
    assert counts["to_come"] == 0


@pytest.mark.parametrize("task_id", list_tasks())
def test_a_whole_shipped_episode_is_no_custom_one(task_id):
    task, seed = load_task(task_id), EVALUATION_SEEDS[3]
    log = played(task, seed, constant(task.windows, batch_cap=128)).log()
    result = grade(log)
    assert (result.custom, result.complete, result.held_out) == (False, True, True)
    assert result.score == log.score > 0


@pytest.mark.parametrize("task_id", list_tasks())
def test_a_log_cut_short_earns_nothing_for_the_rest(task_id):
    task = short(task_id, WINDOWS)
    actions = uniform(task, np.random.default_rng(1), WINDOWS)
    whole = played(task, 8, actions).log()
    for windows in (0, 1, 5, WINDOWS - 1):
        result = grade(played(task, 8, actions[:windows]).log())
        assert (result.windows, result.complete) == (windows, False)
        assert result.score == pytest.approx(sum(whole.rewards[:windows]) / WINDOWS, abs=1e-12)
        counts = result.requests
        assert counts["arrived"] + counts["to_come"] == len(task.requests(8))
        assert counts["arrived"] == counts["completed"] + counts["failed"] + counts["unfinished"]


def test_an_episode_that_its_task_ends_is_complete():
    task = short("static_workload", 30, max_in_flight=2)
    log = played(task, 4, constant(30, batch_cap=1)).log()
    assert log.terminated
    assert 0 < len(log.actions) < 30
    result = grade(log)
    assert (result.windows, result.complete) == (len(log.actions), True)


def test_all_that_can_be_earned_is_no_more_than_one():
    """Where everything is in its SLO the parts add up to 1 but for rounding, which must not end above."""
    slo = {"ttft_slo_s": 1e5, "tpot_slo_s": 1e5}
    workload = {"tenants": {"a": {**slo, "weight": 0.1}, "b": {**slo, "weight": 0.7, "lengths": "fixed:9,1"}},
                "regimes": [{"name": "only", "dwell_s": [5, 9], "rates": {"a": 0.3, "b": 3.0}}]}  # fmt: skip
    reward = {"goodput": 1.0, "latency": 0, "memory": 0, "cost": 0, "quality": 0, "acceptable_quality": 0.5}
    task = short("static_workload", 40, workload=workload, reward=reward)
    full = 0
    for seed in range(40):
        log = played(task, seed, constant(40)).log()
        result = grade(log)
        assert 0 <= result.score <= 1
        assert result.score == pytest.approx(log.score, abs=1e-12)
        full += result.score > 1 - 1e-9
    assert full > 0


@pytest.mark.parametrize("task_id", list_tasks())
def test_reward_and_score_are_one_measure(task_id):
    """Whoever earns more reward scores more: rank correlation over mixed policies, and the identity."""
    windows, rng = round(100 / load_task(task_id).window_s), np.random.default_rng(77)
    task = short(task_id, windows)
    policies = [(uniform, stationary, sticky)[k % 3](task, rng, windows) for k in range(60)]
    earned, scores = [], []
    for actions in policies:
        log = played(task, 6, actions).log()
        earned.append(sum(log.rewards))
        scores.append(grade(log).score)
    assert spearmanr(earned, scores).statistic >= 0.95
    np.testing.assert_allclose(np.array(earned) / windows, scores, rtol=0, atol=1e-12)
    assert len(set(np.round(scores, 6))) >= 25, "the policies differ"


@pytest.mark.parametrize("task_id", list_tasks())
def test_costs_and_goodput_are_the_weight_of_what_ended(task_id):
    windows, episodes = 15, 6
    task, rng = short(task_id, windows), np.random.default_rng(2)
    batch = EpisodeBatch(task, episodes)
    batch.reset(list(range(episodes)))
    weights = np.array([tenant.weight for tenant in task.tenants])
    demand = np.array(
        [weights @ np.bincount(task.requests(s).tenant, minlength=len(weights)) for s in range(episodes)]
    )
    for _ in range(windows):
        batch.step(uniform(task, rng, episodes))
        w = batch.windows
        ended = (w["tenant_completed"] + w["tenant_failed"])[:, : len(weights)] @ weights
        met = batch.components[:, 0] / task.reward.goodput
        assert (batch.costs >= 0).all()
        np.testing.assert_allclose(met + batch.costs, ended * windows / demand, rtol=1e-12, atol=1e-12)
