"""Stored logs of the shipped tasks still grade; after an intended change see regenerate_goldens."""

from __future__ import annotations

import pytest

from llmserve_env.grading import grade, read_log
from llmserve_env.tasks import list_tasks

from .episodes import GOLDEN_WINDOWS, GOLDENS, golden_episode


@pytest.mark.parametrize("task_id", list_tasks())
def test_a_stored_log_replays(task_id):
    log = read_log(GOLDENS / f"{task_id}.json")
    result = grade(log)
    assert (result.task_id, result.custom, result.verified) == (task_id, False, True)
    assert (result.windows, result.complete) == (GOLDEN_WINDOWS, False)
    assert min(result.score, result.requests["completed"]) > 0
    assert log == golden_episode(task_id).log()


def test_every_task_has_a_stored_log():
    assert sorted(path.stem for path in GOLDENS.glob("*.json")) == sorted(list_tasks())
