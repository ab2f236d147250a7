"""The journal: what was open when the service was killed is open again, and what cannot be is set aside."""

from __future__ import annotations

import asyncio
import json
import logging
import signal

import pytest

import llmserve_env
from llmserve_env import grade
from llmserve_env.errors import InputError
from llmserve_env.schema import ServeAction
from server.journal import Entry, Journal
from server.messages.refusals import Unavailable
from server.messages.requests import ResetRequest
from server.service import Service
from server.settings import Settings
from tests.server._playing import ACTIONS, BEGIN, ask, bare, client, local, ok, open_ws
from tests.server.conftest import started

BEGUN = ResetRequest(**BEGIN)
PLAYED = [ServeAction(**action) for action in ACTIONS]


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "journal")


def files(folder, suffix=".jsonl"):
    return sorted(path.stem for path in folder.glob(f"*{suffix}"))


def test_it_gives_back_what_was_recorded(tmp_path, journal):
    journal.begin("one", BEGUN)
    journal.add("one", PLAYED[:1])
    journal.add("one", PLAYED[1:])
    journal.begin("two", BEGUN)
    journal.add("two", PLAYED)
    journal.begin("two", BEGUN)  # begins anew
    journal.begin("three", BEGUN)
    journal.end("three")
    assert list(Journal(tmp_path / "journal").entries()) == [
        Entry("one", BEGUN, PLAYED),
        Entry("two", BEGUN, []),
    ]


def test_a_line_that_a_crash_cut_off_was_not_played(tmp_path, journal):
    journal.begin("cut", BEGUN)
    journal.add("cut", PLAYED[:2])
    path = tmp_path / "journal" / "cut.jsonl"
    path.write_bytes(path.read_bytes()[:-3])
    assert list(journal.entries()) == [Entry("cut", BEGUN, PLAYED[:1])]


FIRST = json.dumps({"version": "VERSION", "begun": BEGUN.model_dump(mode="json")}) + "\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "line 1"),
        (b"\x00\xff" * 100, "line 1"),
        (b"[]\n", ""),
        (b'{"version": "0.0.1", "begun": {}}\n', "0.0.1"),
        (FIRST.encode() + b'{"batch_cap": 0}\n', "line 2"),
        (FIRST.encode() + b"rubbish\n", "line 2"),
        (FIRST.replace('"seed": 5', '"seed": null').encode(), "seed"),
        (FIRST.replace('"seed"', '"sedd"').encode(), "sedd"),
    ],
)
def test_what_cannot_be_read_is_set_aside_with_the_reason(tmp_path, journal, caplog, content, said):
    journal.begin("good", BEGUN)
    bad = tmp_path / "journal" / "bad.jsonl"
    bad.write_bytes(content.replace(b"VERSION", llmserve_env.__version__.encode()))
    with caplog.at_level(logging.ERROR):
        assert list(journal.entries()) == [Entry("good", BEGUN, [])]
    assert said in caplog.text
    assert "bad.jsonl" in caplog.text
    assert files(tmp_path / "journal", ".bad") == ["bad"]
    assert list(journal.entries()) == [Entry("good", BEGUN, [])]


def test_a_folder_that_cannot_be_written_is_said_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        Journal(tmp_path / "file" / "journal")


def test_what_cannot_be_recorded_is_not_played(tmp_path):
    async def play() -> None:
        service = Service(Settings(journal=tmp_path / "journal"))
        session = service.sessions.open()
        await service.reset(session, BEGUN)
        (tmp_path / "journal" / f"{session.id}.jsonl").unlink()
        (tmp_path / "journal").rmdir()
        with pytest.raises(Unavailable):
            await service.step(session, PLAYED[:1])
        assert session.state.step_count == 0

    asyncio.run(play())


def test_more_sessions_than_there_is_room_for_do_not_stop_the_start(tmp_path, caplog):
    journal = Journal(tmp_path)
    for name in ("one", "two"):
        journal.begin(name, BEGUN)

    async def restart() -> int:
        service = Service(Settings(journal=tmp_path, max_sessions=1))
        async with service.running():
            return len(service.sessions)

    assert asyncio.run(restart()) == 1
    assert (files(tmp_path), files(tmp_path, ".bad")) == (["one"], ["two"])


def test_a_killed_server_goes_on_where_it_was(tmp_path):
    options = ("--journal", str(tmp_path / "journal"))
    shaped = {"task_id": "static_workload", "seed": 4, "horizon_s": 5.0, "workload": "poisson://?rate=5"}
    with started(*options) as server:
        with client(server.url) as http, client(server.url) as over, client(server.url) as gone:
            by_http = ok(http.post("/reset", json=BEGIN))["metadata"]["session_id"]
            ok(http.post("/step", json={"action": ACTIONS[0]}))
            ok(http.post("/step_n", json={"actions": ACTIONS[1:3]}))
            finished = ok(over.post("/reset", json={**BEGIN, "episode_id": "mine"}))["metadata"]["session_id"]
            ok(over.post("/step_n", json={"actions": ACTIONS * 2}))
            ok(gone.post("/reset", json=BEGIN))
            closed = ok(gone.get("/state"))["session_id"]
            assert gone.delete("/session").status_code == 204
        with open_ws(server.url) as ws:
            by_ws = ask(ws, "reset", shaped)["data"]["metadata"]["session_id"]
            first = ask(ws, "step", {})["data"]
            server.process.send_signal(signal.SIGKILL)
            server.process.wait(60)
    folder = tmp_path / "journal"
    assert files(folder) == sorted([by_http, finished, by_ws])
    with (folder / f"{by_http}.jsonl").open("ab") as file:
        file.write(b'{"batch_cap": 25')  # as a crash in the middle of a line leaves it
    (folder / "garbage.jsonl").write_bytes(b"\xff\x00garbage\n")
    (folder / "older.jsonl").write_text(FIRST.replace("VERSION", "0.0.1"))

    messages = tmp_path / "messages"
    with started(*options, messages=messages) as server:
        with client(server.url, by_http) as http:
            assert ok(http.get("/state"))["step_count"] == 3
            assert bare(ok(http.post("/step", json={"action": ACTIONS[3]}))) == local()[0][4]
            assert ok(http.get("/log")) == local()[1].model_dump(mode="json")
            assert ok(http.post("/grader")) == grade(local()[1]).model_dump(mode="json")
        with client(server.url, finished) as over:
            assert ok(over.get("/state"))["episode_id"] == "mine"
            assert ok(over.get("/log"))["digests"] == local()[1].digests
            assert over.post("/step", json={"action": {}}).status_code == 409
        with open_ws(server.url, by_ws) as ws:
            assert ask(ws, "state")["data"]["step_count"] == 1
            second = ask(ws, "step", {})["data"]
            ask(ws, "reset", shaped)
            assert [bare(ask(ws, "step", {})["data"]) for _ in range(2)] == [bare(first), bare(second)]
        with client(server.url, closed) as gone:
            assert gone.get("/state").status_code == 404
        assert files(folder, ".bad") == ["garbage", "older"]
    assert "garbage.jsonl" in messages.read_text()
    assert "found 0.0.1" in messages.read_text()
