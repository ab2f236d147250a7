"""Limits on change: what one decision may do, and that nothing does more."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmserve_env.controls import CONTROLS
from llmserve_env.live.pilot.change_limits import ChangeLimits, shipped_limits
from llmserve_env.schema import QuantizationTier, ServeAction
from tests.strategies import actions

LIMITS = ChangeLimits.model_validate(
    {
        "batch_cap": {"most_factor": 2.0},
        "admission_rate": {"most_factor": 2.0},
        "kv_budget_fraction": {"most_step": 0.25},
        "speculation_depth": {"most_step": 2},
        "quantization_tier": {"least_windows": 3},
    }
)
ACTIONS = actions(least_rate=0.01)


def held(old, age=None, asked_rate=10.0, **wanted):
    action, words = LIMITS.held(ServeAction(**wanted), ServeAction(**old), age or {}, asked_rate)
    assert set(words) == {name for name in CONTROLS if name in wanted and held_back(action, wanted, name)}
    return {name: getattr(action, name) for name in wanted}, words


def held_back(action, wanted, name):
    return getattr(action, name) != wanted[name]


def test_jumps_go_half_way():
    assert held({"batch_cap": 256}, batch_cap=8) == ({"batch_cap": 128}, {"batch_cap": "256 to 128, not 8"})
    assert held({"batch_cap": 8}, batch_cap=512)[0] == {"batch_cap": 16}
    assert held({"kv_budget_fraction": 0.9}, kv_budget_fraction=0.1)[0] == {"kv_budget_fraction": 0.65}
    assert held({}, speculation_depth=8)[0] == {"speculation_depth": 2}


def test_steps_within_the_limits_pass():
    assert held({"batch_cap": 256}, batch_cap=128) == ({"batch_cap": 128}, {})
    assert held({"batch_cap": 3}, batch_cap=2)[1] == {}
    assert held({"batch_cap": 1}, batch_cap=2)[1] == {}  # twice as many, and so on from there
    assert held({}, prefill_decode_split=True, priority_routing=True)[1] == {}


def test_a_change_that_costs_waits_for_its_windows():
    int8 = QuantizationTier.INT8
    assert held({}, quantization_tier=int8)[1] == {}
    assert held({}, {"quantization_tier": 3}, quantization_tier=int8)[1] == {}
    _, words = held({}, {"quantization_tier": 2}, quantization_tier=int8)
    assert words == {"quantization_tier": "INT8 held back: changed 2 windows ago"}


def test_no_admission_rate_is_what_was_asked_for():
    assert held({"admission_rate": None}, admission_rate=1.0)[0] == {"admission_rate": 5.0}
    assert held({"admission_rate": None}, admission_rate=6.0)[1] == {}
    assert held({"admission_rate": None}, asked_rate=0.0, admission_rate=1.0)[1] == {}
    assert held({"admission_rate": 4.0}, admission_rate=None)[0] == {"admission_rate": 8.0}
    assert held({"admission_rate": 5.0}, admission_rate=None)[1] == {}
    assert held({"admission_rate": 4.0}, admission_rate=1.0)[0] == {"admission_rate": 2.0}


@given(st.lists(ACTIONS, min_size=2, max_size=30), st.floats(0, 500))
def test_no_sequence_of_wishes_moves_faster_than_the_limits(wishes, asked_rate):
    in_force, changed = wishes[0], {}
    for window, wish in enumerate(wishes[1:]):
        age = {name: window - last for name, last in changed.items()}
        action, words = LIMITS.held(wish, in_force, age, asked_rate)
        assert ServeAction.model_validate(action.model_dump()) == action
        assert set(words) == {name for name in CONTROLS if getattr(action, name) != getattr(wish, name)}
        assert in_force.batch_cap / 2 <= action.batch_cap <= in_force.batch_cap * 2
        assert abs(action.kv_budget_fraction - in_force.kv_budget_fraction) <= 0.25 + 1e-8
        assert abs(action.speculation_depth - in_force.speculation_depth) <= 2
        before, after = (
            asked_rate if each.admission_rate is None else each.admission_rate for each in (in_force, action)
        )
        if in_force.admission_rate is None:
            assert after >= min(before, 1000) / 2 * (1 - 1e-9)  # it only lets in fewer
        elif action.admission_rate is None:
            assert after <= 2 * before  # what comes now is no more
        else:
            assert before / 2 * (1 - 1e-9) <= after <= 2 * before * (1 + 1e-9)
        if action.quantization_tier != in_force.quantization_tier:
            assert window - changed.get("quantization_tier", -3) >= 3
            changed["quantization_tier"] = window
        in_force = action


def test_shipped_limits_let_every_control_move():
    limits = shipped_limits()
    far = ServeAction(
        batch_cap=1,
        kv_budget_fraction=0.1,
        speculation_depth=8,
        quantization_tier=QuantizationTier.INT4,
        prefill_decode_split=True,
        priority_routing=True,
        admission_rate=0.5,
    )
    at = ServeAction()
    for window in range(12):
        at, _ = limits.held(far, at, {"quantization_tier": window, "prefill_decode_split": window}, 20.0)
    assert at == far
