"""Whatever comes over a WebSocket: one answer each, and others play on."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic_core import from_json

from tests.server._playing import ACTIONS, BEGIN, ask, bare, local, open_ws

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
NEAR = st.sampled_from(
    [0, 1, -1, 8, 9, 512, 513, 0.1, 1.0, 2**63, 1e999, "", "FP16", "INT8", True, None, [], {}]
)
VALUE = NEAR | JSON
CONTROLS = (
    *("batch_cap", "kv_budget_fraction", "speculation_depth", "quantization_tier"),
    *("prefill_decode_split", "priority_routing", "metadata", "fan_speed"),
)
ACTION = st.fixed_dictionaries({}, optional=dict.fromkeys(CONTROLS, VALUE))
GOOD = st.sampled_from(ACTIONS)
RESET = st.fixed_dictionaries(
    {},
    optional={
        "task_id": st.sampled_from(["static_workload", "trace_replay"]) | VALUE,
        "seed": st.integers(0, 9) | VALUE,
        "episode_id": VALUE,
        "horizon_s": st.sampled_from([1.0, 5.0, 20.0, 1e6]) | VALUE,
        "workload": st.sampled_from(["poisson://?rate=1", "trace://x", {"tenants": {}}]) | VALUE,
        "features": VALUE,
        "records": VALUE,
        "session_id": VALUE,
    },
)
STEPS = st.fixed_dictionaries(
    {}, optional={"actions": st.lists(GOOD | ACTION, max_size=3) | VALUE, "every": VALUE}
)
MESSAGE = st.one_of(
    st.fixed_dictionaries({"type": st.just("reset"), "data": st.just(BEGIN) | RESET}),
    st.fixed_dictionaries({"type": st.just("step"), "data": GOOD | ACTION}),
    st.fixed_dictionaries({"type": st.just("step_n"), "data": STEPS}),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["state", "log", "tasks", "grade", "mcp", "dance"])},
        optional={"data": st.just({}) | st.fixed_dictionaries({"episode_log": VALUE}) | JSON, "more": JSON},
    ),
    st.dictionaries(st.sampled_from(["type", "data", ""]), VALUE),
    JSON,
)
SENT = st.one_of(
    MESSAGE.map(json.dumps),
    MESSAGE.map(lambda message: json.dumps(message).encode()),
    st.text(),
    st.binary(max_size=200),
    MESSAGE.map(lambda message: json.dumps(message)[:-1]),
)
KINDS = {
    "reset": "observation",
    "step": "observation",
    "step_n": "steps",
    "state": "state",
    "log": "log",
    "tasks": "tasks",
    "grade": "grade",
    "mcp": "mcp",
}


@pytest.fixture(scope="module")
def witness(tight_url):
    """Somebody else, in the middle of an episode."""
    with open_ws(tight_url) as ws:
        ask(ws, "reset", BEGIN)
        answers = [ask(ws, "step", ACTIONS[0])]
        yield ws
        answers += [ask(ws, "step", action) for action in ACTIONS[1:]]
        assert [bare(answer["data"]) for answer in answers] == local()[0][1:]


@settings(max_examples=60, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(sent=st.lists(SENT, min_size=1, max_size=12))
def test_every_message_has_one_answer_and_harms_nobody(tight_url, witness, sent):
    with open_ws(tight_url) as ws:
        for message in sent:
            if is_close(message):
                continue
            ws.send(message)
            text = ws.recv(timeout=60, decode=False)
            answer = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
            assert answer.keys() == {"type", "data"}
            if answer["type"] == "error":
                assert answer["data"]["status"] in (404, 409, 422)
                assert answer["data"]["message"]
            else:
                assert answer["type"] == KINDS[json.loads(message)["type"]]
        # Exactly one each: the next answer is that of the next message.
        state = ask(ws, "state")
        assert state["type"] == "state"
    assert ask(witness, "state")["data"]["step_count"] == 1


def is_close(message: str | bytes) -> bool:
    try:
        found = from_json(message)
    except ValueError:
        return False
    return isinstance(found, dict) and found.get("type") == "close"
