"""Shielded against bare agents: what is measured, on series made for it and on real episodes."""

from __future__ import annotations

import json

import numpy as np
import pytest

import evaluate.experiments.shielding as module
from evaluate.experiments.shielding import Arguments, Measured, main, measure, recovery_s, report
from llmserve_env.agents import Shield, load_agent, play, shield_settings
from llmserve_env.errors import InputError
from llmserve_env.report.stats import interval, paired_difference
from llmserve_env.tasks import TRAINING_SEEDS, load_task

SEEDS = list(TRAINING_SEEDS[1000:1004])


def series(in_slo, arrived=10, window_s=5.0):
    """Times and counts of windows."""
    end_s = window_s * np.arange(1, len(in_slo) + 1)
    return end_s - window_s, end_s, np.full(len(in_slo), arrived), np.array(in_slo)


def test_recovery_is_the_begin_of_the_first_good_half_minute():
    # Surge to 10 s, then 20 s of nothing, then all in time: 8 of 10 within 30 s from 25 s on.
    bad_then_good = series([10, 10, 0, 0, 0, 0, *[10] * 10])
    assert recovery_s([(0.0, 10.0)], *bad_then_good) == [(15.0, True)]
    assert recovery_s([(0.0, 10.0)], *series([0, 0, *[8] * 8])) == [(0.0, True)]


def test_what_does_not_recover_takes_until_the_next_surge_or_the_end():
    never = series([0] * 40)
    assert recovery_s([(0.0, 10.0), (100.0, 150.0)], *never) == [(90.0, False), (50.0, False)]
    # A good half minute that reaches into the next surge is none.
    late = series([0] * 16 + [10] * 24)
    assert recovery_s([(0.0, 10.0), (100.0, 120.0)], *late) == [(90.0, False), (0.0, True)]


def test_a_surge_with_no_time_after_it_says_nothing():
    assert recovery_s([(0.0, 30.0), (50.0, 190.0)], *series([10] * 40)) == []


def test_measures_are_those_of_the_episodes():
    found, task = measure("shielded:defaults", "death_spiral", SEEDS), load_task("death_spiral")
    shield = Shield(load_agent("defaults", task))
    played = play(shield, task, SEEDS)
    assert found.values["score"].tolist() == played.scores.tolist()
    assert found.values["goodput"] * task.horizon_s == pytest.approx(played.requests[:, 2])
    assert found.arrived.sum(axis=0) * task.window_s == pytest.approx(played.requests[:, 0])
    assert found.autonomy.tolist() == shield.autonomy_rate.tolist()
    assert found.interventions.tolist() == shield.interventions.tolist()
    assert (found.autonomy == 1 - found.interventions.sum(axis=1) / task.windows).all()
    assert found.autonomy.max() < 1


def test_a_shield_that_never_speaks_changes_nothing(monkeypatch):
    calm = shield_settings().model_dump()
    calm["rescue"].update(waiting_enter=1e9, kv_enter=1.0, windows_enter=1000)
    calm["panic"].update(least_requests=10**9)
    calm["veto"].update(least_in_flight=1e9)
    settings = type(shield_settings()).model_validate(calm)
    bare = measure("random", "death_spiral", SEEDS[:2])
    task = load_task("death_spiral")
    monkeypatch.setattr(
        module, "find_agent", lambda plays, task: Shield(load_agent("random", task), settings)
    )
    shielded = measure("shielded:random", "death_spiral", SEEDS[:2])
    assert shielded.autonomy.tolist() == [1, 1]
    text = report({"random": (bare, shielded)}, task, SEEDS[:2], official=True)
    assert "| random | 0.000 [0.000, 0.000] | 0.00 [0.00, 0.00] |" in text
    assert "| random | 1.000 [1.000, 1.000] | 0.0 | 0.0 | 0.0 |" in text


def test_latency_is_spread_over_windows_with_a_first_token():
    windows = np.zeros((4, 1), [("first_tokens", int), ("mean_ttft_s", float)])
    windows["first_tokens"][:, 0] = 1, 0, 2, 5
    windows["mean_ttft_s"][:, 0] = 1.0, 99.0, 3.0, 5.0
    assert module._spread(windows).tolist() == pytest.approx([np.std([1, 3, 5])])


def test_differences_leave_out_episodes_without_such_a_time():
    bare, shielded = (
        Measured(
            {"score": np.array([1.0, 2, 3]), "recovery_s": np.array(times)}, *(None, None), *[np.zeros(1)] * 3
        )
        for times in ([10.0, np.nan, 30], [5.0, np.nan, 5])
    )
    found = module._difference(bare, shielded, "recovery_s")
    assert found == paired_difference([5, 5], [10, 30])
    assert module._level(bare, "recovery_s") == interval([10, 30], np.mean)


def test_the_report_is_written_and_marked(tmp_path, capsys):
    arguments = Arguments(
        "static_workload",
        ("defaults",),
        2,
        jobs=1,
        out=tmp_path,
        picture=tmp_path / "a.png",
        episode=1,
        first_seed=5,
        other_seeds=True,
    )
    main(arguments)
    text = (tmp_path / "shielding-static_workload.md").read_text()
    assert text in capsys.readouterr().out
    assert "not seeds of evaluation" in text
    assert "recover" not in text, "the task has no surges"
    content = json.loads((tmp_path / "shielding-static_workload.json").read_text())
    bare = play(load_agent("defaults", load_task("static_workload")), load_task("static_workload"), [5, 6])
    assert content["agents"]["defaults"]["bare"]["score"] == bare.scores.tolist()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    for wrong in ({"episode": 2}, {"agents": ("shielded:random",)}):
        with pytest.raises(InputError) as caught:
            main(Arguments(**{**vars(arguments), **wrong}))
        assert caught.value.field in {"episode", "agents"}
