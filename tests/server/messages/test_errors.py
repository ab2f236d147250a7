"""What is refused names its place, what was expected and what was found."""

from __future__ import annotations

import json

import pytest

from llmserve_env import list_tasks
from tests.server._playing import ACTIONS, BEGIN, client, local, ok

JSON = {"Content-Type": "application/json"}


@pytest.fixture
def http(server_url):
    with client(server_url) as http:
        yield http
        http.delete("/session")


FAULTS = [
    ("/step", {"action": {"batch_cap": 0}}, "action.batch_cap", "greater than or equal to 1", 0),
    ("/step", {"action": {"batch_cap": 513}}, "action.batch_cap", "less than or equal to 512", 513),
    ("/step", {"action": {"batch_cap": 1.5}}, "action.batch_cap", "integer", 1.5),
    ("/step", {"action": {"kv_budget_fraction": 0.05}}, "action.kv_budget_fraction", "equal to 0.1", 0.05),
    ("/step", {"action": {"speculation_depth": 9}}, "action.speculation_depth", "less than or equal to 8", 9),
    ("/step", {"action": {"quantization_tier": "FP8"}}, "action.quantization_tier", "'INT4'", "FP8"),
    ("/step", {"action": {"fan_speed": 1}}, "action.fan_speed", "Extra inputs", 1),
    ("/step", {"action": 5}, "action", "valid dictionary", 5),
    ("/step", {}, "action", "required", None),
    ("/step_n", {"actions": []}, "actions", "at least 1 item", None),
    ("/step_n", {"actions": [{}] * 1001}, "actions", "at most 1000, found 1001", None),
    ("/step_n", {"actions": [{}, {"batch_cap": 0}]}, "actions.1.batch_cap", "greater than", 0),
    ("/reset", {"seed": -1}, "seed", "greater than or equal to 0", -1),
    ("/reset", {"seed": 2**63}, "seed", "less than", 2**63),
    ("/reset", {"horizon_s": 0}, "horizon_s", "greater than 0", 0),
    ("/reset", {"horizon_s": "long"}, "horizon_s", "valid number", "long"),
    ("/reset", {"sedd": 1}, "sedd", "Extra inputs", 1),
    ("/reset", {"episode_id": "e" * 256}, "episode_id", "at most 255", "e" * 200),
    ("/reset", {"workload": "poisson://?rate=-1"}, "rate", "expected a number > 0, found -1.0", None),
    ("/grader", {"episode_log": {"seed": "x"}}, "episode_log.seed", "valid integer", "x"),
]


@pytest.mark.parametrize(("path", "body", "place", "said", "found"), FAULTS)
def test_a_fault_names_the_field_and_what_was_expected(http, path, body, place, said, found):
    ok(http.post("/reset", json=BEGIN))
    answer = http.post(path, json=body)
    assert answer.status_code == 422
    faults = {".".join(str(part) for part in each["loc"]): each for each in answer.json()["detail"]}
    fault = faults[f"body.{place}"]
    assert said in fault["msg"]
    assert fault.get("input") == found


BROKEN = {
    "half": b'{"seed": ',
    "not a number": b'{"horizon_s": NaN}',
    "infinite": b'{"horizon_s": 1e999}',
    "half of a pair": b'{"episode_id": "\\ud800"}',
    "half of a pair as a name": b'{"\\ud800": 1}',
    "not UTF-8": b'{"episode_id": "\xff"}',
    "digits without end": b'{"seed": ' + b"9" * 5000 + b"}",
    "levels without end": b'{"workload": ' + b'{"a":' * 500 + b"1" + b"}" * 501,
    "brackets": b"[" * 100_000,
    "a list": b"[]",
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("path", ["/reset", "/step", "/grader"])
def test_what_is_no_request_is_refused_as_such(http, path, body):
    answer = http.post(path, content=body, headers=JSON)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"][0] == "body"


def test_what_was_found_is_repeated_only_if_it_is_short(http):
    answer = http.post("/reset", json={"seed": "9" * 10_000, "episode_id": 10**1000, "horizon_s": {"a": 1}})
    assert answer.status_code == 422
    assert len(answer.content) < 2000


def test_the_tasks_that_there_are_are_listed(http):
    answer = http.post("/reset", json={"task_id": "static"})
    assert answer.status_code == 404
    assert all(task in answer.json()["detail"] for task in ("'static'", *list_tasks()))


def test_what_the_episode_is_not_ready_for_is_a_conflict(http):
    for path, body in [("/step", {"action": {}}), ("/step_n", {"actions": [{}]}), ("/grader", {})]:
        assert http.post(path, json=body).status_code == 404  # no session at all
    ok(http.post("/reset", json=BEGIN))
    early = http.post("/grader")
    assert early.status_code == 409
    assert "0 of 4 windows" in early.json()["detail"]
    ok(http.post("/step_n", json={"actions": ACTIONS}))
    for path, body in [("/step", {"action": {}}), ("/step_n", {"actions": [{}]})]:
        late = http.post(path, json=body)
        assert late.status_code == 409
        assert "over" in late.json()["detail"]
    ok(http.post("/grader"))


def tampered(**changes):
    return {**local()[1].model_dump(mode="json"), **changes}


@pytest.mark.parametrize(
    ("log", "place", "said"),
    [
        (tampered(seed=6), "digests[0]", "does something else"),
        (tampered(score=1.0), "score", "found 1.0"),
        (tampered(rewards=[1.0] * 4), "rewards[0]", "found 1.0"),
        (tampered(actions=[{}] * 4), "digests", "does something else"),
        (tampered(digests=[]), "digests", "one for each action"),
        (tampered(live=True), "live", "cannot be replayed"),
        (tampered(package_version="0.0.1"), "package_version", "0.0.1"),
        (tampered(task={}), "task", ""),
        (tampered(rewards=[1e999] * 4), "", ""),
    ],
)
def test_a_log_that_is_not_what_happened_gets_no_grade(http, log, place, said):
    content = json.dumps({"episode_log": log}).replace("Infinity", "1e999")
    answer = http.post("/grader", content=content, headers=JSON)
    assert answer.status_code == 422, answer.text
    fault = answer.json()["detail"][0]
    assert place in ".".join(str(part) for part in fault["loc"])
    assert said in fault["msg"]
