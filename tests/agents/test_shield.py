"""The shield's rules, window by window, on records made by hand; and around agents that play."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pydantic import ValidationError

from llmserve_env.agents import AGENTS, Shield, ShieldSettings, load_agent, play, shield_settings
from llmserve_env.agents.shield import RULES
from llmserve_env.backend import WINDOW
from llmserve_env.controls import to_array
from llmserve_env.errors import InputError
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import load_task

TASK = load_task("adversarial_multitenant")
ENGINES = TASK.cell.engines
TPOT_S = min(tenant.tpot_slo_s for tenant in TASK.tenants)
SETTINGS = ShieldSettings.model_validate(
    {
        "rescue": {
            **{"waiting_enter": 50, "waiting_leave": 20, "kv_enter": 0.9, "kv_leave": 0.5},
            **{"windows_enter": 2, "windows_leave": 2, "most_windows": 10, "rest_windows": 3},
            "action": {
                **{"batch_cap": 256, "kv_budget_fraction": 0.5},
                **{"speculation_depth": 0, "priority_routing": True},
            },
        },
        "panic": {
            **{"windows": 3, "least_requests": 10, "compliance_enter": 0.3, "compliance_leave": 0.6},
            **{"windows_enter": 1, "windows_leave": 1, "most_windows": 10, "rest_windows": 3},
            "admit_share": 0.5,
            "action": {
                **{"batch_cap": 16, "kv_budget_fraction": 0.2},
                **{"speculation_depth": 0, "priority_routing": True},
            },
        },
        "veto": {"windows": 2, "rise": 0.2, "release": 0.5, "least_in_flight": 5, "slow": 1.0, "late": 1.0},
    }
)
OWN = ServeAction(batch_cap=128, kv_budget_fraction=0.8, speculation_depth=3)


def own(**changes):
    return ServeAction(**{**OWN.model_dump(), **changes})


class Scripted:
    """Proposes what it is told to, the last of it from then on; counts how often it was asked."""

    name = "scripted"

    def __init__(self, *actions):
        self.actions, self.asked = actions or (OWN,), 0

    def reset(self, task, seeds):
        self.asked = 0

    def act(self, observations, windows):
        action = self.actions[min(self.asked, len(self.actions) - 1)]
        self.asked += 1
        return np.repeat(to_array([action]), len(windows))


class Played:
    """A shield on a script, window by window."""

    def __init__(self, *actions, n=1, task=TASK, **options):
        self.shield = Shield(Scripted(*actions), options.pop("settings", SETTINGS), **options)
        self.task, self.time_s = task, 0.0
        self.shield.reset(task, range(7, 7 + n))
        self.first = self.shield.act(np.zeros((n, 1), np.float32), np.zeros(n, WINDOW))
        self.n = n

    def after(self, waiting=0, kv=0.0, ended=0, in_slo=0, in_flight=0, gap=0.0, wait=0.0, end_s=None):
        """ACTION[n] after a window; numbers of requests per engine but for those that ended."""
        self.time_s += self.task.window_s
        windows = np.zeros(self.n, WINDOW)
        windows["end_s"] = self.time_s if end_s is None else end_s
        windows["waiting"] = np.asarray(waiting) * ENGINES
        windows["in_flight"] = np.asarray(in_flight) * ENGINES
        windows["kv_occupancy"] = kv
        windows["completed"] = ended
        windows["tenant_in_slo"][:, 0] = in_slo
        windows["p50_gap_s"] = np.asarray(gap) * TPOT_S
        windows["oldest_wait_s"] = wait
        return self.shield.act(np.zeros((self.n, 1), np.float32), windows)

    def rules(self, *windows):
        """Which rule spoke after each window, "" for none."""
        spoke = []
        for values in windows:
            before = len(self.shield.log[0])
            self.after(**values)
            log = self.shield.log[0][before:]
            spoke.append(log[0]["rule"] if log else "")
        return spoke


def test_calm_leaves_the_agent_alone():
    played = Played()
    assert played.first[0] == to_array([OWN])[0]
    assert (
        played.rules(*[{"waiting": 5, "kv": 0.4, "ended": 20, "in_slo": 19, "in_flight": 30}] * 10)
        == [""] * 10
    )
    assert played.shield.autonomy_rate.tolist() == [1.0]


@pytest.mark.parametrize(
    ("name", "high", "between", "low"), [("waiting", 60, 30, 10), ("kv", 0.95, 0.7, 0.3)]
)
def test_rescue_begins_and_ends_with_hysteresis(name, high, between, low):
    played = Played()
    values = [high, between, high, high, between, between, low, between, low, low, between]
    spoke = played.rules(*[{name: value} for value in values])
    # not for one window, nor for two with one between; on through the band, and until two low ones in a row
    assert spoke == ["", "", "", *["rescue"] * 6, "", ""]


def test_rescue_sets_the_safe_action_and_leaves_precision_and_roles():
    agent = ServeAction(batch_cap=8, quantization_tier="INT8", prefill_decode_split=True)
    played = Played(agent)
    for _ in range(2):
        action = played.after(waiting=60)[0]
    safe = SETTINGS.rescue.action
    assert (action["batch_cap"], action["kv_budget_fraction"]) == (
        safe["batch_cap"],
        safe["kv_budget_fraction"],
    )
    assert (action["speculation_depth"], action["priority_routing"]) == (0, 1)
    assert (action["quantization_tier"], action["prefill_decode_split"]) == (1, 1)


def test_rescue_stands_down_when_it_does_not_help_and_rests():
    spoke = Played().rules(*[{"waiting": 60}] * 30)
    assert spoke[:1] == [""]
    assert spoke[1:11] == ["rescue"] * 10
    assert spoke[11:14] == [""] * 3
    assert spoke[14] == "rescue"


def test_panic_by_compliance_over_a_moving_window():
    played = Played()
    good, bad = {"ended": 10, "in_slo": 10}, {"ended": 10, "in_slo": 0}
    spoke = played.rules(good, good, good, bad, bad, bad, good, good, good)
    # of 30: 30, 20, 10 and 0 in time; back to 10 is between, 20 is enough
    assert spoke == ["", "", "", "", "", "panic", "panic", "", ""]
    assert "0 of 30 requests" in played.shield.log[0][0]["reason"]


def test_panic_needs_requests_to_judge_by():
    assert Played().rules(*[{"ended": 3}] * 6) == [""] * 6
    assert Played().rules(*[{"ended": 4}] * 6)[2:] == ["panic"] * 4


def test_panic_goes_before_rescue_and_sheds():
    played = Played()
    for _ in range(3):
        action = played.after(waiting=60, ended=10)[0]
    assert played.shield.log[0][-1]["rule"] == "panic"
    assert (action["batch_cap"], action["kv_budget_fraction"]) == (16, 0.2)


def test_panic_lets_in_a_share_of_what_is_completed():
    task = load_task(TASK.id, controls={**TASK.controls, "admission_rate": [1.0, 100.0, None]})
    played = Played(task=task)
    for _ in range(3):
        action = played.after(ended=40)[0]
    assert action["admission_rate"] == 0.5 * 40 / task.window_s


RISE = [{"in_flight": count} for count in (10, 10, 20)]


CUTS = [{"batch_cap": 64}, {"kv_budget_fraction": 0.3}, {"quantization_tier": "INT8"}]


@pytest.mark.parametrize("cut", [*CUTS, {"prefill_decode_split": True}])
def test_veto_of_a_cut_while_the_load_rises(cut):
    less = own(**cut)
    played = Played(OWN, OWN, OWN, less)
    assert played.rules(*RISE) == ["", "", "veto"]
    entry = played.shield.log[0][0]
    name = next(iter(cut))
    assert entry["proposed"] == {name: cut[name]}
    assert entry["applied"] == {name: OWN.model_dump(mode="json")[name]}
    # the same cut while the load is steady is the agent's to make
    assert Played(OWN, OWN, OWN, less).rules(*[{"in_flight": 10}] * 3) == [""] * 3


def test_veto_leaves_what_is_no_cut_and_keeps_the_rest_of_the_action():
    more = own(batch_cap=512, kv_budget_fraction=0.4, priority_routing=True)
    played = Played(OWN, OWN, OWN, more)
    for values in RISE:
        action = played.after(**values)[0]
    assert (action["batch_cap"], action["kv_budget_fraction"], action["priority_routing"]) == (512, 0.8, 1)


def test_veto_is_over_when_the_rise_is():
    less = own(batch_cap=64)
    played = Played(OWN, OWN, OWN, less)
    counts = (10, 10, 20, 20, 22, 22, 22)
    # against two windows before: +100%, +100%, +10% (above the release), +10%, none
    assert played.rules(*[{"in_flight": count} for count in counts]) == [
        "",
        "",
        "veto",
        "veto",
        "veto",
        "veto",
        "",
    ]
    few = [{"in_flight": count} for count in (1, 1, 4)]
    assert Played(OWN, OWN, OWN, less).rules(*few) == [""] * 3


def test_slow_tokens_excuse_a_smaller_batch_but_no_restart():
    rise = [*RISE[:2], {"in_flight": 20, "gap": 1.5}]
    less = own(batch_cap=64)
    assert Played(OWN, OWN, OWN, less).rules(*rise) == [""] * 3
    other = own(quantization_tier="INT4")
    assert Played(OWN, OWN, OWN, other).rules(*rise)[-1] == "veto"


def test_agent_is_always_asked_and_every_intervention_is_logged():
    played = Played()
    for _ in range(6):
        played.after(waiting=60)
    shield = played.shield
    assert shield.agent.asked == 7
    assert shield.windows.tolist() == [7]
    assert shield.interventions.tolist() == [[0, 5, 0]]
    assert shield.autonomy_rate[0] == pytest.approx(2 / 7)
    assert [entry["window"] for entry in shield.log[0]] == [2, 3, 4, 5, 6]
    entry = json.loads(json.dumps(shield.log[0]))[0]
    assert entry == {
        "window": 2,
        "seed": 7,
        "rule": "rescue",
        "reason": "60 waiting per engine, 0% of KV blocks held",
        "proposed": {
            **{"batch_cap": 128, "kv_budget_fraction": 0.8},
            **{"speculation_depth": 3, "priority_routing": False},
        },
        "applied": {
            **{"batch_cap": 256, "kv_budget_fraction": 0.5},
            **{"speculation_depth": 0, "priority_routing": True},
        },
    }


def test_agent_that_does_the_same_as_the_rule_is_not_overridden():
    safe = own(**SETTINGS.rescue.action)
    played = Played(safe)
    assert played.rules(*[{"waiting": 60}] * 5) == [""] * 5
    assert played.shield.autonomy_rate[0] == 1.0


def test_log_is_bounded_and_the_count_is_not():
    played = Played(log_limit=3)
    for _ in range(8):
        played.after(waiting=60)
    assert len(played.shield.log[0]) == 3
    assert played.shield.interventions[0].sum() == 7


def test_controls_that_are_not_granted_stay_and_values_keep_to_the_grid():
    task = load_task("static_workload", controls={"batch_cap": [8, 64]})
    start = to_array([task.start])[0]
    shield = Shield(Scripted(task.start.model_copy(update={"batch_cap": 8})), SETTINGS)
    shield.reset(task, [1])
    for end_s in (0.0, 1.0, 2.0):
        windows = np.zeros(1, WINDOW)
        windows["end_s"], windows["waiting"] = end_s, 60
        action = shield.act(np.zeros((1, 1), np.float32), windows)[0]
    assert action["batch_cap"] == 64
    for name in ("kv_budget_fraction", "speculation_depth", "priority_routing"):
        assert action[name] == start[name]


def test_episodes_that_are_over_count_no_more():
    played = Played(n=2)
    for window in range(1, 7):
        played.after(waiting=60, end_s=[window * TASK.window_s, min(window, 3) * TASK.window_s])
    assert played.shield.windows.tolist() == [7, 4]
    assert played.shield.interventions.sum(axis=1).tolist() == [5, 2]


def test_an_episode_does_not_depend_on_its_neighbours():
    rng, n = np.random.default_rng(0), 11
    script = [
        ServeAction(batch_cap=int(cap), kv_budget_fraction=float(share))
        for cap, share in zip(rng.integers(1, 512, 80), rng.uniform(0.1, 1, 80), strict=True)
    ]
    together, alone = Played(*script, n=n), [Played(*script) for _ in range(n)]
    for _ in range(80):
        values = {
            "waiting": rng.integers(0, 90, n),
            "kv": rng.uniform(0, 1, n),
            "ended": 20,
            "in_slo": rng.integers(0, 21, n),
            "in_flight": rng.integers(0, 60, n),
            "gap": rng.uniform(0, 1.3, n),
        }
        rows = together.after(**values)
        for i, one in enumerate(alone):
            row = one.after(**{name: np.broadcast_to(value, n)[i] for name, value in values.items()})
            assert rows[i] == row[0]
    assert (together.shield.interventions.sum(axis=0) > 10).all()
    logs = [[{**entry, "seed": 0} for entry in one.shield.log[0]] for one in alone]
    assert [[{**entry, "seed": 0} for entry in log] for log in together.shield.log] == logs


@pytest.mark.parametrize("name", ["best-constant", "reactive"])
def test_good_agents_on_a_calm_task_are_left_alone(name):
    task = load_task("static_workload")
    shield = load_agent(f"shielded:{name}", task)
    assert shield.name == f"shielded:{name}"
    scores = play(shield, task, range(4)).scores
    assert shield.autonomy_rate.min() > 0.99
    assert scores == pytest.approx(play(load_agent(name, task), task, range(4)).scores, abs=0.002)


def test_shield_helps_an_agent_that_knows_nothing():
    task = load_task("trace_replay")
    shield = load_agent("shielded:random", task)
    bare = play(load_agent("random", task), task, range(6)).scores.mean()
    assert play(shield, task, range(6)).scores.mean() > bare
    assert shield.autonomy_rate.max() < 0.9


def test_shipped_thresholds_leave_room_between_entry_and_exit():
    settings = shield_settings()
    assert settings.rescue.waiting_leave < settings.rescue.waiting_enter
    assert settings.rescue.kv_leave < settings.rescue.kv_enter
    assert settings.panic.compliance_enter < settings.panic.compliance_leave
    assert RULES == ("panic", "rescue", "veto")


def test_refusals():
    with pytest.raises(InputError, match="call reset"):
        Shield(Scripted()).act(np.zeros((1, 1), np.float32), np.zeros(1, WINDOW))
    with pytest.raises(InputError, match="shielded:NAME"):
        load_agent("shielded:nobody", TASK)
    with pytest.raises(ValidationError, match="kv_enter"):
        ShieldSettings.model_validate(
            {**SETTINGS.model_dump(), "rescue": {**SETTINGS.rescue.model_dump(), "kv_enter": 1.5}}
        )
    assert not any(name.startswith("shielded") for name in AGENTS)
