"""Fixed scenarios play as recorded; see regenerate_goldens for an intended change."""

from __future__ import annotations

import json

import pytest

from .scenarios import FOLDER, SCENARIOS, play


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario_plays_as_recorded(name):
    recorded = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert play(name) == recorded


def test_every_record_has_its_scenario():
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == sorted(SCENARIOS)


def test_the_scenarios_exercise_what_they_are_named_for():
    figures = {name: json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")) for name in SCENARIOS}
    assert figures["memory-pressure"]["preemptions"] > 10
    assert figures["sessions"]["cached_tokens"] > 0.2 * figures["sessions"]["prefill_tokens"]
    assert figures["split"]["transfers"] > 100
    assert figures["speculation"]["accepted_tokens"] > 1000
    assert all(
        row["completed"] + row["failed"] + row["cancelled"] == row["arrived"] > 100
        for row in figures.values()
    )
