"""The tools of a language model: what trainers read of them, and what they answer."""

from __future__ import annotations

import inspect
import json
import re
import typing

import pytest
from pydantic import TypeAdapter

from llmserve_env import Episode, grade, list_tasks, load_task
from llmserve_env.envs.tool_env import ServeToolEnv
from llmserve_env.errors import InputError
from llmserve_env.schema import ServeAction
from llmserve_env.tasks.catalog import TaskInfo, catalog, task_info

TOOLS = ("grade", "list_tasks", "observe", "set_serving_config")
DEFAULTS = ServeAction().model_dump(mode="json")


def begun(**columns) -> ServeToolEnv:
    env = ServeToolEnv()
    env.reset(**{"task_id": "static_workload", "seed": 1, "horizon_s": 4.0, **columns})
    return env


def set_config(env: ServeToolEnv, **changes) -> dict:
    return json.loads(env.set_serving_config(**{**DEFAULTS, **changes}))


# What trainers read


def test_tools_are_the_public_methods():
    # As TRL lists them: functions of the class without underscore, but reset and get_reward.
    found = [name for name, _ in inspect.getmembers(ServeToolEnv, inspect.isfunction) if name[0] != "_"]
    assert sorted(found) == sorted([*TOOLS, "reset", "get_reward"])


@pytest.mark.parametrize("name", [*TOOLS, "get_reward"])
def test_a_tool_says_what_it_does_and_describes_every_argument(name):
    method = getattr(ServeToolEnv, name)
    hints = typing.get_type_hints(method)
    arguments = list(inspect.signature(method).parameters)[1:]
    assert set(hints) == {*arguments, "return"}
    text = inspect.getdoc(method)
    assert re.match(r"[A-Z].+\.\n", text)
    assert "\nReturns:\n" in text
    described = re.search(r"\nArgs:\n(.*?)\n\n", text, re.DOTALL)
    assert arguments == (re.findall(r"^    (\w+): ", described[1], re.MULTILINE) if described else [])


def test_set_serving_config_has_the_controls_of_the_schema():
    arguments = TypeAdapter(ServeToolEnv.set_serving_config).json_schema(mode="validation")["properties"]
    assert [name for name in arguments if name not in ("self", "windows")] == list(DEFAULTS)
    assert arguments["quantization_tier"]["enum"] == ["FP16", "INT8", "INT4"]
    assert arguments["windows"]["default"] == 1
    assert ServeToolEnv.set_serving_config.__annotations__["batch_cap"] == "int"


def test_the_ranges_that_are_described_are_those_of_the_schema():
    schema = ServeAction.model_json_schema()["properties"]
    text = " ".join(inspect.getdoc(ServeToolEnv.set_serving_config).split())
    assert f"{schema['batch_cap']['minimum']} to {schema['batch_cap']['maximum']}" in text
    assert "0.1 to 1.0" in text
    assert schema["kv_budget_fraction"]["minimum"] == 0.1
    assert schema["speculation_depth"]["maximum"] == 8
    assert "to 8" in text


# Episodes


def test_reset_tells_the_task_and_what_is_seen():
    env = ServeToolEnv()
    told = json.loads(env.reset(task_id="adversarial_multitenant", seed=1, horizon_s=20.0, prompt=[], id=7))
    task = load_task("adversarial_multitenant", horizon_s=20.0)
    assert told["task"]["windows"] == told["windows_left"] == 4
    assert told["task"]["controls"] == task.controls
    assert {each["name"]: each["ttft_slo_ms"] for each in told["task"]["tenants"]} == {
        tenant.name: pytest.approx(1e3 * tenant.ttft_slo_s) for tenant in task.tenants
    }
    assert set(told["last_window"]["tenants"]) == {tenant.name for tenant in task.tenants}
    assert told["config_in_force"] == task.start.model_dump(mode="json", exclude_none=True)
    assert (env.score, env.done, told["done"]) == (0.0, False, False)


def test_columns_that_are_none_are_as_if_not_there():
    told = json.loads(ServeToolEnv().reset(task_id=None, seed=None, horizon_s=None))
    assert told["task"]["id"] == "static_workload"
    assert told["windows_left"] == 300


def test_episodes_without_a_seed_differ():
    answers = set()
    for _ in range(4):
        env = begun(seed=None)
        answers.add(env.set_serving_config(**DEFAULTS, windows=4))
    assert len(answers) > 1


def test_it_plays_the_episode_that_episode_plays():
    env = begun()
    actions = [ServeAction(batch_cap=64), ServeAction(batch_cap=64), ServeAction(speculation_depth=3)]
    first = set_config(env, batch_cap=64, windows=2)
    second = set_config(env, speculation_depth=3)
    episode = Episode(load_task("static_workload", horizon_s=4.0))
    episode.reset(1)
    seen = [episode.step(action) for action in actions]
    assert first["windows_served"] == 2
    assert first["mean_reward"] == pytest.approx((seen[0].reward + seen[1].reward) / 2, rel=1e-3)
    assert second["last_window"]["throughput_tps"] == pytest.approx(seen[2].throughput_tps, rel=1e-3)
    assert second["last_window"]["spec_acceptance_rate"] == pytest.approx(
        seen[2].spec_acceptance_rate, rel=1e-3
    )
    assert second["config_in_force"]["speculation_depth"] == 3
    assert env.score == env.get_reward() == seen[2].metadata["score"]
    assert second["windows_left"] == 1
    assert not env.done


def test_what_is_observed_is_what_the_last_call_told():
    env = begun()
    told = set_config(env)
    observed = json.loads(env.observe())
    assert observed == {name: told[name] for name in observed}
    assert env.observe() == env.observe()


def test_serving_stops_at_the_end_and_then_is_graded():
    env = begun()
    assert "not over" in json.loads(env.grade())["error"]
    told = set_config(env, windows=1000)
    assert told["windows_served"] == 4
    assert (told["done"], told["windows_left"], env.done) == (True, 0, True)
    episode = Episode(load_task("static_workload", horizon_s=4.0))
    episode.reset(1)
    for _ in range(4):
        episode.step(ServeAction())
    assert env.score == grade(episode.log()).score
    graded = json.loads(env.grade())
    assert graded["verified"]
    assert graded["score"] == pytest.approx(env.score, abs=1e-4)
    assert "the episode is over" in set_config(env)["error"]
    assert env.score == grade(episode.log()).score


def test_a_new_episode_forgets_the_last():
    env = begun()
    first = env.set_serving_config(**DEFAULTS, windows=4)
    env.reset(task_id="static_workload", seed=1, horizon_s=4.0)
    assert (env.score, env.done) == (0.0, False)
    assert env.set_serving_config(**DEFAULTS, windows=4) == first


def test_two_instances_do_not_meet():
    one, other = begun(), begun(seed=2)
    alone = set_config(begun(), windows=3)
    set_config(other, batch_cap=8)
    assert set_config(one, windows=3) == alone


# What goes wrong


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"batch_cap": 513}, "batch_cap: expected a whole number from 1 to 512, found 513"),
        ({"batch_cap": 0}, "from 1 to 512"),
        ({"batch_cap": 1.5}, "batch_cap: expected a whole number"),
        ({"batch_cap": None}, "batch_cap: expected a whole number"),
        ({"kv_budget_fraction": float("nan")}, "kv_budget_fraction: expected a number from 0.1 to 1.0"),
        ({"speculation_depth": -1}, "speculation_depth: expected a whole number from 0 to 8, found -1"),
        ({"quantization_tier": "FP8"}, "quantization_tier: expected one of FP16, INT8, INT4, found 'FP8'"),
        ({"priority_routing": "perhaps"}, "priority_routing: expected true or false, found 'perhaps'"),
        ({"windows": 0}, "windows: expected a whole number from 1 to 1000, found 0"),
        ({"windows": 10**9}, "from 1 to 1000"),
        ({"batch_cap": [1], "windows": "x"}, "windows: expected"),
    ],
)
def test_a_bad_value_is_answered_with_what_is_expected_and_plays_nothing(wrong, expected):
    env = begun()
    told = set_config(env, **wrong)
    assert list(told) == ["error"]
    assert any(expected in fault for fault in told["error"])
    assert json.loads(env.observe())["last_window"]["step_index"] == 0


def test_what_has_no_effect_is_said():
    told = set_config(begun(), prefill_decode_split=True)
    assert told["not_applied"] == {"prefill_decode_split": "a cell of one engine cannot be split"}
    assert "not_applied" not in set_config(begun())


@pytest.mark.parametrize("name", ["observe", "grade"])
def test_before_an_episode_tools_say_so(name):
    assert json.loads(getattr(ServeToolEnv(), name)()) == {"error": "no episode has begun"}
    assert set_config(ServeToolEnv()) == {"error": "no episode has begun"}
    assert (ServeToolEnv().score, ServeToolEnv().done) == (0.0, False)


@pytest.mark.parametrize(
    ("column", "value"),
    [("task_id", "no_such_task"), ("task_id", "x.toml"), ("seed", -1), ("horizon_s", 1.5)],
)
def test_a_data_set_that_cannot_be_played_is_an_error(column, value):
    with pytest.raises(InputError, match=column):
        ServeToolEnv().reset(**{column: value})


def test_answers_are_short_and_hold_no_unknowns():
    env = begun()
    for answer in (env.observe(), env.set_serving_config(**DEFAULTS), env.list_tasks()):
        assert "null" not in answer
        assert "NaN" not in answer
    assert len(env.observe()) < 1200


def test_tasks_are_listed():
    listed = {each["id"]: each for each in json.loads(ServeToolEnv().list_tasks())}
    assert listed["bursty_workload"]["windows"] == 120
    assert listed["bursty_workload"]["difficulty"] == "medium"


# What is told of a task


def test_the_catalog_has_the_tasks_as_they_are():
    told = {task.id: task for task in catalog()}
    assert tuple(told) == list_tasks()
    task, info = load_task("adversarial_multitenant"), told["adversarial_multitenant"]
    assert info.engines == 2
    assert info.windows * info.window_s == info.horizon_s == task.horizon_s
    premium = next(tenant for tenant in info.tenants if tenant.name == "premium")
    assert (premium.ttft_slo_ms, premium.tpot_slo_ms, premium.weight) == (500.0, 30.0, 3.0)
    assert "workload" not in info.model_dump()
    assert TaskInfo.model_validate_json(info.model_dump_json()) == info


def test_values_that_a_cell_cannot_apply_are_told():
    controls = {**load_task("static_workload").controls, "prefill_decode_split": [False, True]}
    task = load_task("static_workload", profile="rtx4090-llama-3.1-8b", controls=controls, horizon_s=2.0)
    info = task_info(task)
    missing = [tier for tier in task.grid.values["quantization_tier"] if tier not in task.profile.tier_names]
    assert info.unavailable.pop("prefill_decode_split") == [True]
    assert info.unavailable == ({"quantization_tier": missing} if missing else {})
