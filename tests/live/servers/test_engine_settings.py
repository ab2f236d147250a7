"""Settings of a running engine cross a folder whole, checked, and within what the engine can do."""

from __future__ import annotations

import os

import pytest

from llmserve_env.errors import InputError
from llmserve_env.live.servers.engine_settings import (
    AppliedSettings,
    EngineSettings,
    EngineStatus,
    control_folder,
    read_settings,
    read_statuses,
    write_settings,
    write_status,
)
from llmserve_env.schema import ServeAction

STARTED = AppliedSettings(batch_cap=64, kv_budget_fraction=1.0, speculation_depth=4)


def test_settings_are_read_as_they_were_written(tmp_path):
    assert read_settings(tmp_path) == EngineSettings()
    settings = EngineSettings.of(ServeAction(batch_cap=8, kv_budget_fraction=0.5, speculation_depth=2))
    write_settings(tmp_path, settings)
    assert read_settings(tmp_path) == settings
    assert settings == EngineSettings(batch_cap=8, kv_budget_fraction=0.5, speculation_depth=2)


def test_bounds_are_those_of_an_action():
    ours, theirs = EngineSettings.model_json_schema(), ServeAction.model_json_schema()
    for name, field in ours["properties"].items():
        bounds = {key: theirs["properties"][name][key] for key in ("type", "minimum", "maximum")}
        assert field["anyOf"][0] == bounds


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "expected a JSON object"),
        (b"\xff", "expected a JSON object"),
        ("[8]", "dictionary"),
        ('{"batch_cap": 0}', "field 'batch_cap': .*greater than or equal to 1, found 0"),
        ('{"batch_cap": 513}', "field 'batch_cap'"),
        ('{"batch_cap": 8.5}', "field 'batch_cap'"),
        ('{"batch_cap": "8"}', "field 'batch_cap'"),
        ('{"batch_cap": true}', "field 'batch_cap'"),
        ('{"kv_budget_fraction": 0.05}', "field 'kv_budget_fraction'"),
        ('{"kv_budget_fraction": NaN}', "field 'kv_budget_fraction'"),
        ('{"speculation_depth": -1}', "field 'speculation_depth'"),
        ('{"batch_capp": 8}', "field 'batch_capp'"),
    ],
)
def test_what_cannot_be_used_is_refused_by_field(tmp_path, content, expected):
    path = tmp_path / "settings.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=expected) as caught:
        read_settings(tmp_path)
    assert str(path) in str(caught.value)


def test_an_engine_goes_below_what_it_was_started_with_and_not_above():
    applied, not_applied = EngineSettings(batch_cap=8, speculation_depth=0).within(STARTED, fixed_depth=False)
    assert applied == AppliedSettings(batch_cap=8, kv_budget_fraction=1.0, speculation_depth=0)
    assert not_applied == {}

    applied, not_applied = EngineSettings(batch_cap=65, speculation_depth=8).within(
        STARTED, fixed_depth=False
    )
    assert applied == STARTED
    assert not_applied == {
        "batch_cap": "the engine was started with 64",
        "speculation_depth": "the engine was started with 4",
    }


@pytest.mark.parametrize(("depth", "told"), [(4, False), (None, False), (2, True), (5, True)])
def test_a_fixed_depth_is_told_where_another_is_asked(depth, told):
    applied, not_applied = EngineSettings(speculation_depth=depth).within(STARTED, fixed_depth=True)
    assert applied == STARTED
    assert [reason.startswith("fixed at 4") for reason in not_applied.values()] == [True] * told


def test_statuses_come_by_engine(tmp_path):
    assert read_statuses(tmp_path) == []
    statuses = [
        EngineStatus(
            engine=engine,
            pid=os.getpid(),
            vllm_version="0.32.0",
            started=STARTED,
            fixed_depth=False,
            asked=EngineSettings(batch_cap=8),
            applied=STARTED.model_copy(update={"batch_cap": 8}),
            not_applied={},
        )
        for engine in (0, 1, 10)
    ]
    for status in reversed(statuses):
        write_status(tmp_path, status)
    assert read_statuses(tmp_path) == statuses


def test_an_answer_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "engine-0.json").write_text('{"engine": 0}')
    with pytest.raises(InputError, match="field 'pid'"):
        read_statuses(tmp_path)


@pytest.mark.parametrize("config", [{}, {"llmserve_control": 1}, None, object()])
def test_a_server_without_a_folder_is_refused(config):
    with pytest.raises(InputError, match='"llmserve_control": "FOLDER"'):
        control_folder(config)


def test_a_folder_must_be_there(tmp_path):
    assert control_folder({"llmserve_control": str(tmp_path)}) == tmp_path
    with pytest.raises(InputError, match="expected an existing folder"):
        control_folder({"llmserve_control": str(tmp_path / "none")})
