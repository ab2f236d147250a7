"""Bounds on what is read: who goes past one is told which, and others do not notice."""

from __future__ import annotations

import contextlib
import json

import httpx
import pytest
from pydantic import ValidationError
from pydantic_core import from_json
from websockets.exceptions import ConnectionClosed

from server.messages.requests import GradeData, StepsData
from server.wire.bodies import read_json
from tests.server._playing import ACTIONS, BEGIN, ask, bare, client, local, ok, open_ws

MOST = 20_000


@pytest.fixture
def http(tight_url):
    with client(tight_url) as http:
        yield http
        http.delete("/session")


def padded(size: int) -> bytes:
    """A reset of so many bytes."""
    body = json.dumps(BEGIN).encode()
    return body + b" " * (size - len(body))


def test_a_body_may_have_so_many_bytes_and_no_more(http):
    headers = {"Content-Type": "application/json"}
    ok(http.post("/reset", content=padded(MOST), headers=headers))
    refused = http.post("/reset", content=padded(MOST + 1), headers=headers)
    assert refused.status_code == 413
    assert "20,000 bytes" in refused.json()["detail"]
    assert http.post("/mcp", content=padded(MOST + 1), headers=headers).status_code == 413


def test_a_body_that_does_not_say_its_length_is_read_no_further(http):
    sent = 0

    def endless():
        nonlocal sent
        for _ in range(10_000):
            sent += 1000
            yield b" " * 1000

    with contextlib.suppress(httpx.TransportError):  # the server may hang up while the client writes
        assert http.post("/reset", content=endless()).status_code == 413
    assert sent < 10_000_000
    assert ok(http.get("/health"))


def test_a_message_that_is_too_large_ends_its_connection_alone(tight_url):
    with open_ws(tight_url) as ws, open_ws(tight_url) as other:
        ask(other, "reset", BEGIN)
        ws.send("x" * (MOST + 1))
        with pytest.raises(ConnectionClosed) as closed:
            ws.recv(timeout=60)
        assert closed.value.rcvd.code == 1009
        assert bare(ask(other, "step", ACTIONS[0])["data"]) == local()[0][1]


def test_so_many_actions_are_played_at_once_and_no_more(http, tight_url):
    ok(http.post("/reset", json={"task_id": "static_workload", "seed": 1}))
    assert ok(http.post("/step_n", json={"actions": [{}] * 8}))["played"] == 8
    refused = http.post("/step_n", json={"actions": [{}] * 9})
    assert refused.json()["detail"][0] == {
        "type": "value_error",
        "loc": ["body", "actions"],
        "msg": "expected at most 8, found 9",
    }
    assert ok(http.get("/state"))["step_count"] == 8
    with open_ws(tight_url) as ws:
        ask(ws, "reset", BEGIN)
        assert ask(ws, "step_n", {"actions": [{}] * 9})["data"]["errors"][0]["loc"] == ["body", "actions"]


@pytest.mark.parametrize(
    "text", ["NaN", "[Infinity]", '"\\ud800"', '{"\\udfff": 1}', "[" * 300 + "]" * 300, "", "{}x"]
)
def test_json_is_read_by_the_letter(text):
    with pytest.raises(ValueError, match="line 1 column"):
        read_json(text)


def test_json_is_read_as_pythons(server_url):
    for text in ('{"a": [1, -0.5, 1e3, "\\ud83d\\ude00", null, true]}', "[" * 100 + "]" * 100, str(2**63)):
        assert read_json(text) == read_json(text.encode()) == json.loads(text) == from_json(text)


@pytest.mark.parametrize(
    ("model", "body", "place"),
    [
        (StepsData, {"actions": [{}] * 10_001}, ("actions",)),
        (StepsData, {"actions": [{"batch_cap": 0}] * 9}, ("actions", 0, "batch_cap")),
        (GradeData, {"episode_log": {"actions": [{}] * 10_001}}, ("episode_log",)),
        (GradeData, {"episode_log": {"digests": [5] * 10_001}}, ("episode_log",)),
    ],
)
def test_a_long_list_is_not_read_to_its_end(model, body, place):
    with pytest.raises(ValidationError) as refused:
        model.model_validate(body)
    assert [fault["loc"] for fault in refused.value.errors()] == [place]  # one: the others are not looked for


@pytest.mark.parametrize(
    "wrap", [lambda names: names, lambda names: {"action": names}, lambda names: [[names]]]
)
def test_an_object_may_have_so_many_names(wrap):
    assert read_json(json.dumps(wrap({f"name {i:0100}": 0 for i in range(1000)})))
    with pytest.raises(ValueError, match="at most 1,000 names"):
        read_json(json.dumps(wrap({f"name {i:0100}": 0 for i in range(1001)})))
    assert read_json(json.dumps([0] * 100_000)) == [0] * 100_000
