"""A log that is not what the simulator did is refused, with the place that differs."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmserve_env
from llmserve_env.controls import to_array
from llmserve_env.errors import InputError
from llmserve_env.grading import grade
from llmserve_env.hardware import list_profiles
from llmserve_env.schema import EpisodeLog, ServeAction
from llmserve_env.tasks import list_tasks, load_task

from .episodes import constant, played, short, sticky

WINDOWS = 20
TASK = short("static_workload", WINDOWS)
LOG = played(
    TASK,
    17,
    to_array(
        [ServeAction(batch_cap=(16, 256, 64)[k // 3 % 3], speculation_depth=k % 2) for k in range(WINDOWS)]
    ),
).log()
SHIPPED = played(load_task("trace_replay"), 17, constant(6)).log()
HASH = "0" * 64


def forged(log=LOG, **changes):
    return log.model_copy(update=changes)


def at(values, index, value):
    return [*values[:index], value, *values[index + 1 :]]


def with_task(log, *path, value):
    table = copy.deepcopy(log.task)
    place = table
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return forged(log, task=table)


TAMPERED = {
    "another seed": (forged(seed=18), r"digests\[\d+\]': expected [0-9a-f]{64}, found"),
    "a seed below 0": (forged(seed=-1), "'seed': expected 0"),
    "a seed too large": (forged(seed=2**63), "'seed': expected 0"),
    "a reward raised": (
        forged(rewards=at(LOG.rewards, 7, LOG.rewards[7] + 1e-9)), r"'rewards\[7\]': expected"),
    "a reward of nan": (
        forged(rewards=at(LOG.rewards, 7, math.nan)), r"'rewards\[7\]': expected .* found nan"),
    "all rewards at most": (forged(rewards=[1.0] * WINDOWS), r"'rewards\[0\]': expected"),
    "a better score": (forged(score=0.99), f"'score': expected {LOG.score}, found 0.99"),
    "a slightly better score": (forged(score=math.nextafter(LOG.score, 1)), "'score': expected"),
    "a score of nan": (forged(score=math.nan), "'score': expected"),
    "an infinite score": (forged(score=math.inf), "'score': expected"),
    "a digest": (
        forged(digests=at(LOG.digests, 17, HASH)), rf"'digests\[17\]': expected {LOG.digests[17]}, "),
    "two digests exchanged": (
        forged(digests=at(at(LOG.digests, 3, LOG.digests[4]), 4, LOG.digests[3])), r"'digests\[3\]'"),
    "an empty digest": (forged(digests=at(LOG.digests, 2, "")), r"'digests\[2\]'"),
    "digests cut": (
        forged(digests=LOG.digests[:-1]), "'digests': expected 20, one for each action, found 19"),
    "no digests": (forged(digests=[]), "'digests': expected 20, .* found 0"),
    "too many digests": (forged(digests=[*LOG.digests, HASH]), "'digests': expected 20, .* found 21"),
    "rewards cut": (forged(rewards=LOG.rewards[:-2]), "'rewards': expected 20, .* found 18"),
    "an action too many": (
        forged(
            actions=[*LOG.actions, ServeAction()], rewards=[*LOG.rewards, 0], digests=[*LOG.digests, HASH]),
        "'actions': expected at most 20, found 21"),
    "an action left out": (
        forged(actions=LOG.actions[1:], rewards=LOG.rewards[1:], digests=LOG.digests[1:]), r"'digests\[0\]'"),
    "a bad end left out": (
        forged(actions=LOG.actions[:9], rewards=LOG.rewards[:9], digests=LOG.digests[:9]), "'score': "),
    "an end that was none": (forged(terminated=True), "'terminated': expected False, found True"),
    "another version": (
        forged(package_version="0.0.1"), "'package_version': expected .*, found 0.0.1, whose"),
    "another horizon": (with_task(LOG, "horizon_s", value=40.0), r"'rewards\[\d+\]': expected"),
    "another window": (with_task(LOG, "window_s", value=0.5), r"'digests\[0\]'"),
    "more engines": (with_task(LOG, "cell", "engines", value=2), r"'digests\[\d+\]'"),
    "a faster GPU": (with_task(LOG, "cell", "profile", value="h100-llama-3.1-8b"), r"'digests\[\d+\]'"),
    "lighter traffic": (
        with_task(LOG, "workload", "tenants", "chat", "lengths", value="fixed:9,9"), r"'digests\[0\]'"),
    "an easier promise": (
        with_task(LOG, "workload", "tenants", "chat", "slo", value="mooncake"), r"'digests\[\d+\]'"),
    "another worth": (
        with_task(LOG, "reward", value={**LOG.task["reward"], "goodput": 0.7, "latency": 0.05}),
        r"'rewards\[\d+\]'"),
    "another start": (with_task(LOG, "start", "batch_cap", value=0), "'task.start.batch_cap'"),
    "a task that is none": (forged(task={"id": "mine"}), r"'task\.\w+': Field required"),
    "an unknown task field": (with_task(LOG, "bonus", value=1), "'task.bonus'"),
    "a task of no shape": (with_task(LOG, "workload", value={"tenants": 3, "regimes": []}), "'task.tenants"),
    "a control that is none": (with_task(LOG, "controls", "batch_cap", value=[0]), "'task.batch_cap'"),
    "weights that are no shares": (with_task(LOG, "reward", "goodput", value=0.9), "'task.reward'.*sum to 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERED)
def test_a_changed_log_is_refused(name):
    log, message = TAMPERED[name]
    with pytest.raises(InputError, match=message):
        grade(log)


def test_the_honest_logs_are_not_refused():
    assert grade(LOG).verified
    assert not grade(SHIPPED).custom


@pytest.mark.parametrize("task_id", list_tasks())
def test_a_changed_action_is_refused_or_changes_nothing(task_id):
    """An action that makes no difference gives an equally true log: the one that playing it would leave."""
    task, rng = short(task_id, 10), np.random.default_rng(9)
    log = played(task, 3, sticky(task, rng, 10)).log()
    refused = 0
    for index in range(10):
        for values in ({"batch_cap": 1}, {"quantization_tier": "INT8"}, {"priority_routing": True}):
            action = ServeAction(**{**log.actions[index].model_dump(), **values})
            if action == log.actions[index]:
                continue
            changed = forged(log, actions=at(log.actions, index, action))
            (name,) = values
            if name not in task.grid.granted:
                with pytest.raises(InputError, match=rf"'actions\[{index}\].{name}': expected .* not grant"):
                    grade(changed)
                continue
            honest = played(task, 3, to_array(changed.actions)).log()
            if honest == changed:
                assert grade(changed) == grade(log)
                continue
            refused += 1
            first = [a == b for a, b in zip(honest.digests, log.digests, strict=True)].index(False)
            assert first >= index
            with pytest.raises(InputError, match=rf"digests\[{first}\]"):
                grade(changed)
    assert refused >= 4


def test_two_logs_cannot_be_joined():
    other = played(TASK, 17, constant(WINDOWS)).log()
    half = WINDOWS // 2
    joined = {
        name: [*getattr(LOG, name)[:half], *getattr(other, name)[half:]]
        for name in ("actions", "rewards", "digests")
    }
    with pytest.raises(InputError, match=rf"digests\[{half}\]"):
        grade(forged(**joined))


def test_windows_after_the_end_are_refused():
    task = short("static_workload", 30, max_in_flight=2)
    log = played(task, 4, constant(30, batch_cap=1)).log()
    end = len(log.actions)
    longer = {
        "actions": [*log.actions, ServeAction()],
        "rewards": [*log.rewards, 0.0],
        "digests": [*log.digests, HASH],
    }
    with pytest.raises(InputError, match=rf"'actions': expected {end}: the episode is over by then, found"):
        grade(forged(log, **longer))
    with pytest.raises(InputError, match="'terminated': expected True, found False"):
        grade(forged(log, terminated=False))


@settings(max_examples=60)
@given(st.data())
def test_no_number_of_a_log_can_be_moved(data):
    """Whatever bit of a number is changed, the log is refused."""
    name = data.draw(st.sampled_from(["rewards", "digests", "score", "seed"]))
    if name == "seed":
        changed = forged(seed=data.draw(st.integers(0, 2**63 - 1).filter(lambda seed: seed != LOG.seed)))
    elif name == "score":
        changed = forged(score=data.draw(st.floats().filter(lambda score: score != LOG.score)))
    else:
        index = data.draw(st.integers(0, WINDOWS - 1))
        values = st.floats() if name == "rewards" else st.text("0123456789abcdef", min_size=64, max_size=64)
        value = data.draw(values.filter(lambda value: value != getattr(LOG, name)[index]))
        changed = forged(**{name: at(getattr(LOG, name), index, value)})
    with pytest.raises(InputError):
        grade(changed)


# Which task it is


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("description",), "the very same"),
        (("difficulty",), "hard"),
        (("horizon_s",), 60.0),
        (("max_in_flight",), 100_000),
        (("cell", "engines"), 2),
        (("controls", "batch_cap"), [256]),
        (("workload",), "mmpp://?preset=azure-conv&rate=1&tenants=premium-standard"),
        (("reward", "acceptable_quality"), 0.1),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_another_task_under_a_shipped_name_is_custom(path, value):
    """An easier task gets its grade, but never that of the shipped task."""
    table = copy.deepcopy(load_task("trace_replay").model_dump(mode="json"))
    place = table
    for key in path[:-1]:
        place = place[key]
    assert place[path[-1]] != value
    place[path[-1]] = value
    task = type(TASK).model_validate(table)
    result = grade(played(task, 1, constant(3)).log())
    assert (result.task_id, result.custom, result.verified) == ("trace_replay", True, True)


def test_a_task_of_another_name_is_custom():
    table = {**load_task("trace_replay").model_dump(mode="json"), "id": "my_own"}
    log = played(type(TASK).model_validate(table), 1, constant(3)).log()
    assert (grade(log).task_id, grade(log).custom) == ("my_own", True)


def test_a_shipped_task_is_replayed_as_shipped_however_its_table_is_ordered():
    """Tenants in another order draw other requests: equal tables must not pass for the shipped task."""
    task = load_task("adversarial_multitenant")
    table = task.model_dump(mode="json")
    tenants = table["workload"]["tenants"]
    table["workload"]["tenants"] = dict(sorted(tenants.items(), reverse=True))
    reordered = type(TASK).model_validate(table)
    assert table == task.model_dump(mode="json")
    assert len(reordered.requests(0)) != len(task.requests(0))
    log = played(reordered, 0, constant(3)).log()
    with pytest.raises(InputError, match=r"digests\[0\]"):
        grade(log)
    honest = played(task, 0, constant(3)).log()
    sorted_by_a_tool = forged(honest, task=table)
    assert grade(sorted_by_a_tool) == grade(honest)
    assert not grade(honest).custom


def test_defaults_that_are_left_out_are_the_shipped_ones():
    table = copy.deepcopy(SHIPPED.task)
    for name in ("max_in_flight", "start"):
        del table[name]
    table["window_s"] = int(table["window_s"])
    assert not grade(forged(SHIPPED, task=table)).custom


# Files


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "secret.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0.5,100,10\n1.25,200,20\n", encoding="utf-8")
    return path


def test_a_log_that_names_files_is_graded_only_where_they_are_allowed(trace):
    task = short("trace_replay", 3, workload=f"trace://{trace}")
    log = played(task, 1, constant(3)).log()
    result = grade(log, allow_files=True)
    assert (result.custom, result.requests["completed"]) == (True, 2)
    with pytest.raises(InputError, match=r"'task\.workload': expected .*may not name files"):
        grade(log)


PROFILE_FILES = ["/etc/passwd", "x.toml", "../" + list_profiles()[0] + ".toml"]
WORKLOAD_FILES = [
    "{path}",
    "trace://{path}",
    "trace://{path}?scale=2",
    "scenario://{path}",
    "servegen://{path}",
    "servegen://{path}?quantiles={path}",
    "TRACE://{path}",
    "poisson://{path}",
    "poisson://?lengths={path}",
    "poisson://?lengths=..%2f..%2fetc%2fpasswd",
    "poisson://?tenants={path}",
    "poisson://?tenants=x.toml",
    "poisson://?%6cengths={path}",
    "sessions://?lengths={path}",
]


@pytest.fixture(scope="module")
def opened():
    """Files that are opened, whoever opens them."""
    files, listening = [], [True]

    def hear(event, arguments):
        if listening and event == "open":
            files.append(arguments[0])

    sys.addaudithook(hear)  # stays as long as the process does
    Path(__file__).read_bytes()
    assert files == [__file__]
    yield files
    listening.clear()


def _refused_unread(log, opened):
    """Refused before anything but what is shipped was opened."""
    opened.clear()
    with pytest.raises(InputError, match="task"):
        grade(log)
    package = Path(llmserve_env.__file__).parent
    assert all(package in Path(path).resolve().parents for path in opened)


@pytest.mark.parametrize("profile", PROFILE_FILES)
def test_a_profile_file_is_not_read(profile, opened):
    log = with_task(SHIPPED, "cell", "profile", value=profile)
    _refused_unread(log, opened)
    with pytest.raises(InputError, match=r"task\.cell\.profile"):
        grade(log)


@pytest.mark.parametrize("workload", WORKLOAD_FILES)
def test_files_of_a_workload_address_are_not_read(workload, trace, opened):
    log = with_task(SHIPPED, "workload", value=workload.format(path=trace))
    _refused_unread(log, opened)
    with pytest.raises(InputError, match=r"task\.workload"):
        grade(log)


@pytest.mark.parametrize("live", [False, True])
def test_files_of_a_scenario_are_not_read(trace, live, opened):
    log = with_task(LOG, "workload", "tenants", "chat", "lengths", value=str(trace))
    _refused_unread(forged(log, live=live), opened)
    with pytest.raises(InputError, match=r"task\.workload\.tenants\.chat\.lengths"):
        grade(log)


# Live


def test_a_live_log_is_graded_unverified():
    rewards = [0.5, 1.5, 0.0]
    task = load_task("trace_replay")
    live = EpisodeLog(
        package_version=LOG.package_version, task=task.model_dump(mode="json"), seed=0, live=True,
        actions=[ServeAction()] * 3, rewards=rewards, digests=[HASH] * 3, terminated=False,
        score=2 / task.windows,
    )  # fmt: skip
    result = grade(live)
    assert (result.verified, result.complete, result.custom) == (False, False, False)
    assert result.score == pytest.approx(2 / task.windows)
    assert (result.components, result.requests) == ({}, {})
    for changes, message in (
        ({"score": 0.9}, "'score': expected the sum of the rewards over"),
        ({"score": math.nan}, "'score'"),
        ({"rewards": [0.5, -1.0, 0.0]}, r"'rewards\[1\]': expected 0..120"),
        ({"rewards": [0.5, math.nan, 0.0]}, r"'rewards\[1\]'"),
        ({"rewards": [120.0, 120.0, 0.0], "score": 2.0}, "'score'.*at most 1"),
        ({"digests": []}, "'digests'"),
    ):
        with pytest.raises(InputError, match=message):
            grade(forged(live, **changes))


def test_a_simulated_log_that_is_called_live_is_not_verified():
    assert not grade(forged(live=True)).verified
