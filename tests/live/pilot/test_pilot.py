"""Between an agent and a service: what comes into force, who decided it, and what is said."""

from __future__ import annotations

import logging
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve_env.agents import Shield
from llmserve_env.backend import WINDOW
from llmserve_env.errors import InputError
from llmserve_env.live.pilot.change_limits import ChangeLimits
from llmserve_env.live.pilot.decision_log import DecisionLog, read_decisions
from llmserve_env.live.pilot.pilot import Pilot
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import load_task
from tests.of_every_task import FEATURES

from ..agents import Scripted

TASK = load_task("bursty_workload")
START = ServeAction(batch_cap=64, admission_rate=50.0)
SAFE = ServeAction(batch_cap=100)
SLOW_S = 0.02


def window(end_s, **values):
    row = np.zeros((), WINDOW)
    row["end_s"] = end_s
    for name, value in values.items():
        row[name] = value
    return row


def pilot(*answers, task=TASK, limits=None, **options):
    limits = limits or ChangeLimits()
    return Pilot(Scripted(list(answers)), task, START, safe=SAFE, limits=limits, **options)


def decided(one, *stale, **values):
    """Decisions window by window."""
    return [one.decide(window(TASK.window_s * (i + 1), **values), reason) for i, reason in enumerate(stale)]


def own(**changes):
    return START.model_copy(update=changes)


def test_the_shield_does_not_panic_over_what_a_silence_caused():
    late = {"completed": 60, "failed": 20, "in_flight": 10}
    for excused, by in ((0, "shield"), (80, "agent")):
        one = pilot(*([own(batch_cap=64)] * 4))
        for i in range(3):
            decision = one.decide(window(TASK.window_s * (i + 1), **(late if i == 1 else {})), None, excused)
        assert decision.by == by


def test_the_agent_decides():
    one = pilot(own(batch_cap=128))
    (decision,) = decided(one, None)
    assert (decision.by, decision.rule, decision.reason) == ("agent", None, None)
    assert decision.proposed == decision.decided == decision.applied == own(batch_cap=128) == one.in_force
    assert one.decide(window(20.0)).window == 1


def test_what_the_task_does_not_grant_stays_as_it_is():
    task = load_task("static_workload", controls={"batch_cap": [8, 64]})
    one = pilot(ServeAction(batch_cap=8, speculation_depth=5, priority_routing=True), task=task)
    assert one.decide(window(1.0)).applied == own(batch_cap=8)


def test_it_sees_what_is_in_force_and_no_end():
    one = pilot(own(batch_cap=512), endless=True)
    names = [feature.name for feature in FEATURES]
    for k in range(TASK.windows):
        one.decide(window(TASK.window_s * (k + 1)))
    seen = np.concatenate(one._agent.seen)
    assert seen[:2, names.index("set_batch_cap")].tolist() == pytest.approx([64 / 512, 1.0])
    progress = seen[:, names.index("progress")]
    assert progress[0] == 0
    assert progress[10] == pytest.approx(10 / TASK.windows)
    assert (progress[TASK.windows // 2 :] == 0.5).all()


def test_jumps_are_held_back_and_told():
    one = pilot(own(batch_cap=512), limits=ChangeLimits.model_validate({"batch_cap": {"most_factor": 2}}))
    found = decided(one, None, None, None, None)
    assert [each.applied.batch_cap for each in found] == [128, 256, 512, 512]
    assert [each.by for each in found] == ["limit", "limit", "agent", "agent"]
    assert (found[0].rule, found[0].reason) == ("batch_cap", "batch_cap: 64 to 128, not 512")


def test_the_shield_overrides_and_knows_what_is_in_force():
    one = pilot(own(batch_cap=8))
    found = decided(one, *[None] * 5, waiting=1000)
    assert [each.by for each in found] == ["agent"] * 3 + ["shield"] * 2
    assert found[-1].rule == "rescue"
    assert found[-1].reason.startswith(f"{1000 / TASK.cell.engines:.0f} waiting per engine")
    assert found[-1].applied.batch_cap == 256
    assert found[-1].proposed == own(batch_cap=8)


def test_what_the_limits_hold_back_of_the_shield_says_both():
    one = pilot(own(batch_cap=8), limits=ChangeLimits.model_validate({"batch_cap": {"most_factor": 2}}))
    last = decided(one, *[None] * 7, waiting=1000)[-1]
    assert (last.by, last.rule) == ("limit", "batch_cap")
    assert "after rescue" in last.reason
    assert last.applied.speculation_depth == 0
    assert last.applied.priority_routing


def test_without_shield_the_agent_stands_alone_and_a_shielded_agent_is_shielded_once():
    alone = pilot(own(batch_cap=8), shield=False)
    assert {each.by for each in decided(alone, *[None] * 6, waiting=1000)} == {"agent"}
    agent = Scripted([own(batch_cap=8)])
    one = Pilot(Shield(agent), TASK, START, shield=False, limits=ChangeLimits())
    assert decided(one, *[None] * 6, waiting=1000)[-1].by == "shield"
    assert len(agent.seen) == 6


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (ZeroDivisionError("boom\nand more"), "ZeroDivisionError: boom and more"),
        (SystemExit(3), "SystemExit: 3"),
        (None, "expected ACTION[1], found None"),
        (np.zeros(1), "IndexError"),
    ],
)
def test_an_agent_that_fails_is_replaced_by_the_safe_configuration(caplog, answer, told):
    one = pilot(answer, answer, own(batch_cap=32))
    found = decided(one, None, None, None)
    assert [each.by for each in found] == ["fallback", "fallback", "agent"]
    assert (found[0].rule, found[0].proposed, found[0].applied) == ("exception", None, SAFE)
    assert told in found[0].reason
    errors = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert len(errors) == 1  # of two in a row
    assert [each.message for each in caplog.records if each.levelno == logging.WARNING] == [
        f"window 0: safe configuration: exception: {found[0].reason}",
        "window 2: the agent decides again",
    ]


def test_an_action_out_of_range_is_a_failure():
    bad = np.zeros(1, pilot(START).task.grid.all().dtype)
    assert decided(pilot(bad), None)[0].rule == "exception"


def test_stale_telemetry_asks_nobody():
    one = pilot(own(batch_cap=32))
    found = decided(one, None, "no metrics for 7 s", None)
    assert (found[1].by, found[1].rule, found[1].reason) == ("fallback", "stale", "no metrics for 7 s")
    assert [each.applied.batch_cap for each in found] == [32, 100, 32]
    assert len(one._agent.seen) == 2


def test_a_late_answer_is_dropped_and_the_agent_asked_again_when_it_is_back(caplog):
    late = threading.Event()
    one = pilot(late, own(batch_cap=32), decide_limit_s=SLOW_S)
    first, second = decided(one, None, None)
    assert (first.by, first.rule, first.applied) == ("fallback", "slow", SAFE)
    assert first.decision_s >= SLOW_S
    assert (second.rule, second.applied) == ("slow", SAFE)
    assert "has been thinking" in second.reason
    assert len(one._agent.seen) == 1
    late.set()
    assert one._thought.done.wait(60)
    one._limit_s = 60.0
    found = one.decide(window(100.0))
    assert (found.by, found.applied.batch_cap) == ("agent", 32)  # and never the 1 that came too late
    assert [each.message for each in caplog.records] == [
        f"window 0: safe configuration: slow: no decision within {SLOW_S:g} s",
        "window 2: the agent decides again",
    ]


def test_a_dry_run_changes_nothing():
    one = pilot(own(batch_cap=128), RuntimeError("x"), own(batch_cap=128), dry_run=True)
    found = decided(one, None, None, None)
    assert {each.applied.batch_cap for each in found} == {64}
    assert [each.decided.batch_cap for each in found] == [128, 100, 128]
    assert found[0].proposed == own(batch_cap=128)
    assert all(each.dry_run for each in found)


def test_what_fails_around_the_agent_leads_to_the_safe_configuration_too(caplog):
    one = pilot(own(batch_cap=32))
    decided(one, None)
    found = one.fall_back(OSError("disk full"))
    assert (found.window, found.by, found.rule) == (1, "fallback", "exception")
    assert found.reason == "OSError: disk full"
    assert one.in_force == SAFE
    assert "disk full" in caplog.text


ACTIONS = st.builds(
    ServeAction,
    batch_cap=st.integers(1, 512),
    kv_budget_fraction=st.floats(0.1, 1.0),
    speculation_depth=st.integers(0, 8),
    quantization_tier=st.sampled_from(["FP16", "INT8", "INT4"]),
    priority_routing=st.booleans(),
    prefill_decode_split=st.booleans(),
)
WINDOWS = st.tuples(
    ACTIONS | st.just(None), st.sampled_from([None, None, None, "lost"]), st.integers(0, 2000)
)


@settings(max_examples=50)
@given(st.lists(WINDOWS, min_size=2, max_size=25))
def test_what_is_applied_keeps_to_the_limits_or_is_the_safe_configuration(steps):
    one = Pilot(Scripted([action for action, stale, _ in steps if stale is None]), TASK, START, safe=SAFE)
    logging.disable(logging.CRITICAL)
    before, restarted = START, -6
    try:
        for i, (_, stale, waiting) in enumerate(steps):
            row = window(TASK.window_s * (i + 1), waiting=waiting, in_flight=waiting)
            found = one.decide(row, stale)
            after = found.applied
            if found.by == "fallback":
                assert after == SAFE
            else:
                assert before.batch_cap / 2 <= after.batch_cap <= before.batch_cap * 2
                assert abs(after.kv_budget_fraction - before.kv_budget_fraction) <= 0.2 + 1e-8
                assert abs(after.speculation_depth - before.speculation_depth) <= 2
            if after.quantization_tier != before.quantization_tier:
                assert found.by == "fallback" or i - restarted >= 6
                restarted = i
            before = after
    finally:
        logging.disable(logging.NOTSET)


def test_everything_is_logged_and_read_again(tmp_path):
    path = tmp_path / "decisions.jsonl"
    answers = [own(batch_cap=32), RuntimeError("x"), own(batch_cap=16)]
    one = pilot(*answers, log=DecisionLog(path), endless=True)
    one.capabilities = {"batch_cap": "gateway: so"}
    row = window(0.0)
    made = []
    for k in range(4):
        one.decide(row)
        made.append(one.applied({"speculation_depth": f"no {k}"}))
        row = window(TASK.window_s * (k + 1), arrived=k + 1, tenant_arrived=k, mean_ttft_s=np.nan)
        one.result(row, k / 10)
    one.close()
    (run,) = read_decisions([path], note=pytest.fail)
    assert run.decisions == made
    assert run.before == START
    assert run.beginning.capabilities == {"batch_cap": "gateway: so"}
    assert run.beginning.safe == SAFE
    assert run.rewards.tolist() == [0.0, 0.1, 0.2, 0.3]
    assert run.windows["arrived"].tolist() == [1, 2, 3, 4]
    assert np.isnan(run.windows["mean_ttft_s"]).all()
    assert run.windows["tenant_arrived"][:, 0].tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(run.observations[:4], np.concatenate(one._agent.seen))
    one.decide(row)  # the last one is worked out from the record
    np.testing.assert_array_equal(run.observations[4], one._agent.seen[-1][0])


def test_bad_bounds_are_refused():
    with pytest.raises(InputError, match="decide_limit_s"):
        pilot(START, decide_limit_s=0)
    with pytest.raises(InputError, match="call decide"):
        pilot(START).applied({})
