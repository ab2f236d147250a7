"""Nothing but serving within the SLO earns: not dropping, not delaying, not idling."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve_env.agents.tuned import tuned_constant
from llmserve_env.controls import to_array
from llmserve_env.episode import EpisodeBatch
from llmserve_env.rewards import COMPONENTS
from llmserve_env.schema import ServeAction
from llmserve_env.sim.state import STATUS_NAMES
from llmserve_env.tasks import list_tasks, load_task

from .episodes import IDLE, anything, short

# What an action of a window may be instead of serving, by the window and their number.
SLACKING = {
    "idles": lambda k, windows: True,
    "serves every other window": lambda k, windows: k % 2 > 0,
    "throttles the first half": lambda k, windows: k < windows // 2,
    "throttles the second half": lambda k, windows: k >= windows // 2,
    "serves one window of five": lambda k, windows: k % 5 > 0,
}
QUEUEING = {"one at a time": ServeAction(batch_cap=1), "two at a time": ServeAction(batch_cap=2)}


def totals(task, seeds, columns):
    """float64[seed, column, 5] parts of the scores, int64[seed, column] failed requests.

    Args:
        columns: for each episode of a seed, the action of each window.
    """
    batch = EpisodeBatch(task, len(seeds) * len(columns))
    batch.reset([seed for seed in seeds for _ in columns])
    for k in range(task.windows):
        batch.step(np.tile(to_array([column[k] for column in columns]), len(seeds)))
    shape = (len(seeds), len(columns))
    return batch.totals.reshape(*shape, len(COMPONENTS)), batch.requests[:, 3].reshape(shape)


@pytest.mark.parametrize("task_id", list_tasks())
def test_who_serves_scores_more_than_who_does_not(task_id):
    task, seeds = load_task(task_id), (0, 1, 2)
    steady = [task.start, *(ServeAction(batch_cap=cap) for cap in (32, 64, 128)), tuned_constant(task_id)]
    found, _ = totals(task, seeds, [[action] * task.windows for action in steady])
    serve = steady[found.sum(axis=2).mean(axis=0).argmax()]
    slack = [
        [IDLE if idles(k, task.windows) else serve for k in range(task.windows)]
        for idles in SLACKING.values()
    ]
    queue = [[action] * task.windows for action in QUEUEING.values()]
    parts, failed = totals(task, seeds, [[serve] * task.windows, *slack, *queue])
    for seed, row in zip(seeds, parts.sum(axis=2), strict=True):
        others = dict(zip([*SLACKING, *QUEUEING], row[1:].tolist(), strict=True))
        assert max(others.values()) < row[0], (seed, others)
    idle = [1, -2, -1]
    assert (parts[:, idle] <= 0.1 * parts[:, :1]).all(), "every part of the score is earned by serving"
    assert (failed[:, idle] > 1.5 * failed[:, :1]).all(), "patience ran out in the queues"


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), task_id=st.sampled_from(list_tasks()), data=st.data())
def test_rewards_are_bounded_under_any_actions(seed, task_id, data):
    windows, episodes = 6, 3
    task = short(task_id, windows)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    batch = EpisodeBatch(task, episodes)
    batch.reset([seed, seed + 1, 0])
    total = np.zeros(episodes)
    for _ in range(windows):
        result = batch.step(anything(rng, episodes))
        assert np.isfinite(result.rewards).all()
        assert ((result.rewards >= 0) & (result.rewards <= windows)).all()
        assert (np.isfinite(batch.costs) & (batch.costs >= 0)).all()
        assert (batch.components >= 0).all()
        assert np.isfinite(result.observations).all()
        assert ((result.observations >= 0) & (result.observations <= 1)).all()
        total += result.rewards
    assert (total / windows <= 1 + 1e-12).all()
    np.testing.assert_allclose(total / windows, batch.scores, rtol=0, atol=1e-12)


# Single requests of tenants with wide promises, with one that cannot be met, and with little patience.

TENANTS = """
[patient]
ttft_slo_s = 5.0
tpot_slo_s = 0.5
weight = 2.0
[late]
ttft_slo_s = 1e-4
tpot_slo_s = 0.5
[slow]
ttft_slo_s = 5.0
tpot_slo_s = 1e-4
[hasty]
ttft_slo_s = 5.0
tpot_slo_s = 0.5
patience_s = 0.01
"""
WEIGHTS = {"patient": 2.0, "late": 1.0, "slow": 1.0, "hasty": 1.0}
HEADER = "arrival_s,prompt_tokens,output_tokens,tenant\n"


@pytest.fixture
def hand_made(tmp_path):
    """Makes a task of the requests of one tenant: rows of arrival (s), prompt and output tokens."""

    def task(tenant, *rows, windows=8):
        mix = tmp_path / "tenants.toml"
        table = TENANTS.partition(f"[{tenant}]")[2].partition("\n[")[0]
        mix.write_text(f"[{tenant}]{table}", encoding="utf-8")
        trace = tmp_path / f"trace-{len(list(tmp_path.iterdir()))}.csv"  # a file that was read is remembered
        lines = [f"{arrival},{prompt},{output},{tenant}\n" for arrival, prompt, output in rows]
        trace.write_text(HEADER + "".join(lines), encoding="utf-8")
        return short("static_workload", windows, workload=f"trace://{trace}?tenants={mix}")

    return task


def earned(task, action=None, windows=None):
    """float64[windows, 5] parts of the rewards, the costs, and the batch."""
    batch = EpisodeBatch(task)
    batch.reset([0])
    parts, costs = [], []
    for _ in range(windows or task.windows):
        batch.step(to_array([action or ServeAction()]))
        parts.append(batch.components[0].copy())
        costs.append(float(batch.costs[0]))
    return np.array(parts), np.array(costs), batch


def status(batch):
    return [STATUS_NAMES[code] for code in batch.backend.outcomes_of(0).status_code]


def test_a_request_within_its_slo_earns_each_part_once(hand_made):
    task = hand_made("patient", (1.5, 200, 20))
    parts, costs, batch = earned(task)
    assert status(batch) == ["completed"]
    outcome, weights = batch.backend.outcomes_of(0), task.reward
    used = max(outcome.ttft_s[0] / 5.0, outcome.tpot_s[0] / 0.5)
    (window,) = np.flatnonzero(parts.any(axis=1))
    assert window == int(outcome.finish_s[0] // task.window_s)
    assert costs.tolist() == [0.0] * 8
    share = task.windows * parts[window] / task.windows**2  # of the one request that there is
    assert share[0] == pytest.approx(weights.goodput)
    assert share[1] == pytest.approx(weights.latency * (1 - used), rel=1e-6)
    assert share[2] == pytest.approx(weights.memory)
    assert 0 < share[3] < weights.cost
    assert share[4] == pytest.approx(weights.quality)


def test_idle_time_is_worth_its_share_of_what_was_served(hand_made):
    task = hand_made("patient", (1.5, 200, 20))
    batch = EpisodeBatch(task)
    batch.reset([0])
    for _ in range(task.windows):
        batch.step(to_array([ServeAction()]))
        if batch.components[0].any():
            idle = 1 - batch.windows["busy_s"][0] / task.window_s
            assert batch.components[0, 3] == pytest.approx(task.windows * task.reward.cost * idle)


def test_lower_precision_earns_less_quality_and_none_below_what_is_acceptable(hand_made):
    task = hand_made("patient", (1.5, 200, 20))
    found = {}
    for index, tier in enumerate(("FP16", "INT8", "INT4")):
        started = type(task).model_validate({**task.model_dump(), "start": {"quantization_tier": tier}})
        parts, _, _ = earned(started, ServeAction(quantization_tier=tier))
        found[tier] = parts[:, 4].sum() / task.windows
        assert found[tier] == pytest.approx(task.reward.quality * task.quality[index])
    assert found["FP16"] == pytest.approx(task.reward.quality)
    assert found["FP16"] > found["INT8"] > found["INT4"] >= 0


def test_a_request_that_misses_its_slo_earns_exactly_nothing(hand_made):
    for tenant, row in (("late", (1.5, 200, 20)), ("slow", (1.5, 200, 20))):
        task = hand_made(tenant, row)
        parts, costs, batch = earned(task)
        assert status(batch) == ["completed"]
        assert not parts.any()
        assert costs.sum() == pytest.approx(task.windows)


def test_a_request_that_is_refused_or_unfinished_earns_exactly_nothing(hand_made):
    parts, costs, batch = earned(hand_made("patient", (1.5, 10_000_000, 20)))
    assert status(batch) == ["cancelled"]
    assert not parts.any()
    assert costs.tolist() == [0, 8, 0, 0, 0, 0, 0, 0]
    parts, costs, batch = earned(hand_made("patient", (1.5, 200, 5_000)))
    assert status(batch) == ["running"]
    assert not parts.any()
    assert not costs.any(), "it costs when it ends"


def test_a_request_whose_client_gives_up_earns_exactly_nothing(hand_made):
    """The second one waits behind the first, and leaves; it had half of what there was to earn."""
    task = hand_made("hasty", (1.5, 200, 200), (1.6, 200, 20))
    parts, costs, batch = earned(task, ServeAction(batch_cap=1))
    assert status(batch) == ["completed", "failed"]
    assert parts[:, 0].sum() / task.windows == pytest.approx(task.reward.goodput / 2)
    assert costs.sum() / task.windows == pytest.approx(1 / 2)
    parts, costs, batch = earned(task)
    assert status(batch) == ["completed", "completed"]
    assert parts[:, 0].sum() / task.windows == pytest.approx(task.reward.goodput)


def test_what_is_still_to_come_counts_as_not_served(hand_made):
    task = hand_made("patient", (1.5, 200, 20), (6.5, 200, 20))
    _, _, batch = earned(task, windows=4)
    assert batch.totals[0, 0] == pytest.approx(task.reward.goodput / 2)


def test_an_episode_without_requests_is_worth_nothing(hand_made):
    task = hand_made("patient", (1.5, 200, 20), windows=1)
    parts, costs, _ = earned(task)
    assert not parts.any()
    assert not costs.any()
