"""The WebSocket: a session for each connection, one answer a message, and who may attach to what."""

from __future__ import annotations

import socket
import threading

import pytest
from pydantic_core import from_json
from websockets.exceptions import ConnectionClosed

from llmserve_env import grade
from tests.server._playing import ACTIONS, BEGIN, ask, bare, client, local, ok, open_ws
from tests.server.conftest import ends


@pytest.fixture
def ws(server_url):
    with open_ws(server_url) as ws:
        yield ws


def refused(ws, kind, data=None) -> dict:
    answer = ask(ws, kind, data)
    assert answer["type"] == "error"
    return answer["data"]


def test_an_episode_is_the_one_that_is_played_here(ws):
    here, log = local()
    answers = [ask(ws, "reset", BEGIN), *(ask(ws, "step", action) for action in ACTIONS)]
    assert {answer["type"] for answer in answers} == {"observation"}
    assert [bare(answer["data"]) for answer in answers] == here
    assert ask(ws, "log") == {"type": "log", "data": log.model_dump(mode="json")}
    assert ask(ws, "grade") == {"type": "grade", "data": grade(log).model_dump(mode="json")}
    other = local(seed=6)[1]
    posted = {"episode_log": other.model_dump(mode="json")}
    assert ask(ws, "grade", posted) == {"type": "grade", "data": grade(other).model_dump(mode="json")}
    assert ask(ws, "state")["data"]["step_count"] == 4
    assert ask(ws, "tasks")["data"]["default"] == "static_workload"


def test_many_windows_in_a_message(ws):
    here, log = local()
    ask(ws, "reset", BEGIN)
    steps = ask(ws, "step_n", {"actions": ACTIONS, "every": False})
    assert steps["type"] == "steps"
    assert (steps["data"]["rewards"], steps["data"]["played"]) == (log.rewards, 4)
    assert [bare(step) for step in steps["data"]["steps"]] == [here[-1]]


def test_it_goes_on_after_every_refusal(ws):
    assert refused(ws, "step", {})["status"] == 409
    assert refused(ws, "grade")["status"] == 409
    assert refused(ws, "log")["status"] == 409
    assert refused(ws, "reset", {"task_id": "no_such"})["status"] == 404
    assert refused(ws, "dance")["code"] == "UNKNOWN_TYPE"
    fault = refused(ws, "reset", {"seed": -1})
    assert (fault["status"], fault["code"], fault["errors"][0]["loc"]) == (422, "VALIDATION_ERROR", ["seed"])
    ask(ws, "reset", BEGIN)
    fault = refused(ws, "step", {"batch_cap": 513})
    assert fault["errors"][0] == {
        "type": "less_than_equal",
        "loc": ["batch_cap"],
        "msg": "Input should be less than or equal to 512",
        "input": 513,
    }
    assert refused(ws, "step_n", {"actions": []})["errors"][0]["loc"] == ["actions"]
    assert ask(ws, "state")["data"]["step_count"] == 0  # nothing of it was played
    ask(ws, "step_n", {"actions": ACTIONS})
    assert refused(ws, "step", {})["status"] == 409
    assert bare(ask(ws, "reset", BEGIN)["data"]) == local()[0][0]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "5", '"a"', "null", '{"type": NaN}', "[" * 5000, '"\\ud800"']
)
def test_what_is_no_message_is_refused(ws, text):
    ws.send(text)
    assert from_json(ws.recv(timeout=60))["data"]["code"] == "INVALID_JSON"
    assert ask(ws, "state")["type"] == "state"


@pytest.mark.parametrize(
    "text", ['{"type": "state", "data": 5}', '{"type": "state", "more": 1}', '{"type": "step", "data": null}']
)
def test_a_message_of_another_form_is_refused(ws, text):
    ws.send(text)
    assert from_json(ws.recv(timeout=60))["data"]["code"] == "VALIDATION_ERROR"


def test_openenv_clients_send_metadata_with_an_action(ws):
    ask(ws, "reset", BEGIN)
    assert ask(ws, "step", {**ACTIONS[0], "metadata": {}})["type"] == "observation"


def test_bytes_are_read_as_text(ws):
    ws.send(b'{"type": "state"}')
    assert from_json(ws.recv(timeout=60))["type"] == "state"
    ws.send(b"\xff\xfe")
    assert from_json(ws.recv(timeout=60))["data"]["code"] == "INVALID_JSON"


def test_close_ends_connection_and_session(server_url, ws):
    session_id = ask(ws, "reset", BEGIN)["data"]["metadata"]["session_id"]
    ws.send('{"type": "close"}')
    with pytest.raises(ConnectionClosed) as closed:
        ws.recv(timeout=60)
    assert closed.value.rcvd.code == 1000
    assert ends(server_url, session_id)


def test_a_connection_that_breaks_frees_its_session(server_url):
    with open_ws(server_url) as ws:
        session_id = ask(ws, "reset", BEGIN)["data"]["metadata"]["session_id"]
        ws.socket.shutdown(socket.SHUT_RDWR)  # without a word, as a killed process
        assert ends(server_url, session_id)


def test_http_plays_on_in_the_session_of_a_connection(server_url, ws):
    session_id = ask(ws, "reset", BEGIN)["data"]["metadata"]["session_id"]
    with client(server_url, session_id) as http:
        assert bare(ok(http.post("/step", json={"action": ACTIONS[0]}))) == local()[0][1]
        assert bare(ask(ws, "step", ACTIONS[1])["data"]) == local()[0][2]
        assert http.post("/reset", json={"task_id": "no_such"}).status_code == 404
        assert ok(http.get("/state"))["step_count"] == 2


def test_a_bad_reset_over_http_leaves_a_connection_its_new_session(server_url, ws):
    session_id = ask(ws, "state")["data"]["session_id"]
    with client(server_url, session_id) as http:
        assert http.post("/reset", json={"task_id": "no_such"}).status_code == 404
    assert ask(ws, "state")["data"]["session_id"] == session_id


def test_a_connection_attaches_to_an_open_session_and_leaves_it_open(server_url):
    with client(server_url) as http:
        session_id = ok(http.post("/reset", json=BEGIN))["metadata"]["session_id"]
        with open_ws(server_url, session_id) as ws:
            assert bare(ask(ws, "step", ACTIONS[0])["data"]) == local()[0][1]
            with open_ws(server_url, session_id) as second:  # one at a time
                fault = from_json(second.recv(timeout=60))["data"]
                assert (fault["status"], fault["code"]) == (409, "EXECUTION_ERROR")
                with pytest.raises(ConnectionClosed):
                    second.recv(timeout=60)
            assert ask(ws, "state")["data"]["step_count"] == 1
        assert bare(ok(http.post("/step", json={"action": ACTIONS[1]}))) == local()[0][2]


def test_nobody_attaches_to_a_session_that_there_is_not(server_url):
    with open_ws(server_url, "guessed") as ws:
        assert from_json(ws.recv(timeout=60))["data"]["status"] == 404
        with pytest.raises(ConnectionClosed):
            ws.recv(timeout=60)


def test_a_session_that_is_closed_hangs_up(server_url, ws):
    session_id = ask(ws, "reset", BEGIN)["data"]["metadata"]["session_id"]
    with client(server_url, session_id) as http:
        assert http.delete("/session").status_code == 204
    with pytest.raises(ConnectionClosed) as closed:
        ws.recv(timeout=60)
    assert closed.value.rcvd.code == 1001


def test_at_capacity_a_connection_is_told_and_closed(single_url):
    with open_ws(single_url) as first:
        session_id = ask(first, "state")["data"]["session_id"]
        with open_ws(single_url) as second:
            fault = from_json(second.recv(timeout=60))["data"]
            assert (fault["code"], fault["status"]) == ("CAPACITY_REACHED", 429)
            assert fault["retry_after_s"] > 0
            with pytest.raises(ConnectionClosed) as closed:
                second.recv(timeout=60)
            assert closed.value.rcvd.code == 1013
        assert ask(first, "reset", BEGIN)["type"] == "observation"
    assert ends(single_url, session_id)


def test_connections_do_not_see_each_other(server_url):
    """Interleaved by their own timing, each plays exactly its own episode."""

    def play(seed: int) -> None:
        with open_ws(server_url) as ws:
            answers = [ask(ws, "reset", {**BEGIN, "seed": seed})]
            answers += [ask(ws, "step", action) for action in ACTIONS]
            found[seed] = [bare(answer["data"]) for answer in answers]

    found: dict[int, list] = {}
    players = [threading.Thread(target=play, args=(seed,)) for seed in range(8)]
    for player in players:
        player.start()
    for player in players:
        player.join()
    assert found == {seed: local(seed)[0] for seed in range(8)}
