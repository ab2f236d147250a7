"""Whatever stands in a posted log, it is graded or refused: nothing else happens."""

from __future__ import annotations

import copy
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from llmserve_env.errors import InputError
from llmserve_env.grading import grade
from llmserve_env.schema import EpisodeLog
from llmserve_env.tasks import list_tasks

from .episodes import constant, played, short

LOGS = [played(short(task_id, 3), 3, constant(3)).log().model_dump(mode="json") for task_id in list_tasks()]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.floats(-1.0, 20.0),
    st.text(max_size=5),
    st.sampled_from(["/etc/passwd", "trace://x", "fixed:1,1", "gamma://?rate=3", "INT8", "nan"]),
    st.sampled_from([[], {}, [1], [[]], {"a": 1}, [None]]),
)


def places(value, path=()):
    """Paths to everything that a nested value holds."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield (*path, key)
        yield from places(part, (*path, key))


@settings(max_examples=300)
@given(data=st.data())
def test_a_log_with_anything_anywhere_is_graded_or_refused(data):
    table = copy.deepcopy(data.draw(st.sampled_from(LOGS)))
    *path, last = data.draw(st.sampled_from(list(places(table))))
    place = table
    for key in path:
        place = place[key]
    if data.draw(st.integers(0, 5)) or isinstance(place, list):
        place[last] = data.draw(VALUES)
    else:
        del place[last]
    with suppress(ValidationError, InputError):
        result = grade(EpisodeLog.model_validate(table))
        assert 0 <= result.score <= 1
        assert result.custom


@pytest.mark.parametrize("value", [None, 3, "x", [], {}, {"id": "static_workload"}, {"id": []}])
def test_a_task_that_is_none_is_refused(value):
    with pytest.raises((ValidationError, InputError), match="task"):
        grade(EpisodeLog.model_validate({**LOGS[0], "task": value}))
