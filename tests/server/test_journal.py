"""The journal: what was open when the service was killed is open again, and what cannot be is set aside."""

from __future__ import annotations

import asyncio
import json
import os
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
from tests.full_disk import largest_file
from tests.server._playing import ACTIONS, BEGIN, ask, bare, client, local, ok, open_ws
from tests.server.conftest import started

BEGUN = ResetRequest(**BEGIN)
PLAYED = [ServeAction(**action) for action in ACTIONS]


class Clock:
    now_s = 1000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "journal")
    yield journal
    journal.close()


def restored(**settings):
    """Sessions and windows that a service has after its start."""

    async def start():
        service = Service(Settings(**settings))
        async with service.running():
            return {name: each.state.step_count for name, each in service.sessions._open.items()}

    return asyncio.run(start())


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
    assert list(journal.entries()) == [Entry("one", BEGUN, PLAYED), Entry("two", BEGUN, [])]


def test_any_number_of_crashes_costs_only_what_was_not_played(tmp_path, journal):
    path = tmp_path / "journal" / "cut.jsonl"
    journal.begin("cut", BEGUN)
    journal.add("cut", PLAYED[:2])
    expected = PLAYED[:2]
    for action in (PLAYED[2], PLAYED[3], PLAYED[2]):
        journal.close()
        path.write_bytes(path.read_bytes()[:-3])  # in the middle of the last line
        expected.pop()
        journal = Journal(path.parent)
        (entry,) = journal.entries()
        assert entry == Entry("cut", BEGUN, expected)
        journal.resume(entry)
        assert path.read_bytes().endswith(b"}\n")
        journal.add("cut", [action, action])
        expected += [action, action]
    assert list(journal.entries()) == [Entry("cut", BEGUN, expected)]
    journal.close()


def test_only_what_a_killed_server_left_is_removed(tmp_path):
    mine, other = tmp_path / ("A" * 32 + ".tmp"), tmp_path / "notes.tmp"
    for path in (mine, other):
        path.write_bytes(b"{")
    Journal(tmp_path).close()
    assert list(tmp_path.iterdir()) == [other]


def test_a_folder_is_of_one_server(tmp_path, journal):
    journal.begin("one", BEGUN)
    with pytest.raises(InputError, match=f"{tmp_path}/journal: another server uses this folder"):
        Service(Settings(journal=tmp_path / "journal"))
    journal.close()
    assert restored(journal=tmp_path / "journal") == {"one": 0}
    assert restored(journal=tmp_path / "journal") == {"one": 0}  # it ended, and with it its lock


FIRST = json.dumps({"version": "VERSION", "begun": BEGUN.model_dump(mode="json")}) + "\n"


GOOD = json.dumps(PLAYED[0].model_dump(mode="json")).encode() + b"\n"


def lines(content):
    return lambda path: path.write_bytes(content.replace(b"VERSION", llmserve_env.__version__.encode()))


def sparse(path):
    with path.open("wb") as file:
        file.truncate(1 << 40)  # zeros, which take no room on the disk


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lines(b""), "line 1: expected what the episode was begun with"),
        (lines(FIRST.encode()[:-2]), "line 1: expected what the episode was begun with"),
        (lines(b"\x00\xff" * 100 + b"\n"), "line 1: Invalid JSON"),
        (lines(b'{"version": "\xff"}\n'), "line 1: Invalid JSON"),
        (lines(b"\x00" * 5000 + b"\n" + FIRST.encode()), "line 1: Invalid JSON"),
        (lines(b"[" * 5000 + b"]" * 5000 + b"\n"), "line 1: Invalid JSON: recursion limit"),
        (lines(FIRST.encode() + b'{"batch_cap": ' + b"[" * 10_000 + b"\n"), "line 2: Invalid JSON"),
        (lines(b"[]\n"), "line 1"),
        (lines(b'{"version": "0.0.1", "begun": {}}\n'), "0.0.1"),
        (lines(b'{"version": 7}\n'), "line 1: version"),
        (lines(FIRST.encode() + b'{"batch_cap": 0}\n'), "line 2: batch_cap"),
        (lines(FIRST.encode() + GOOD + b"rubbish\n" + GOOD), "line 3: Invalid JSON"),
        (lines(FIRST.encode() + b"\n"), "line 2"),
        (lines(FIRST.encode() + GOOD * 12), "line 12: expected at most 10 actions"),
        (lines(FIRST.replace('"seed": 5', '"seed": null').encode()), "seed"),
        (lines(FIRST.replace('"seed"', '"sedd"').encode()), "sedd"),
        (sparse, "line 1: expected a line of at most 20,000 bytes"),
        (os.mkdir, "expected a file"),
        (os.mkfifo, "expected a file"),
    ],
)
def test_what_cannot_be_read_is_set_aside_with_the_reason(tmp_path, caplog, make, said):
    journal = Journal(tmp_path / "journal", max_actions=10, max_line_bytes=20_000)
    journal.begin("good", BEGUN)
    make(tmp_path / "journal" / "bad.jsonl")
    assert list(journal.entries()) == [Entry("good", BEGUN, [])]
    assert said in caplog.text
    assert "bad.jsonl" in caplog.text
    assert len(caplog.text) < 1000
    assert files(tmp_path / "journal", ".bad") == ["bad"]
    assert list(journal.entries()) == [Entry("good", BEGUN, [])]
    make(tmp_path / "journal" / "bad.jsonl")  # again, beside the first
    assert list(journal.entries()) == [Entry("good", BEGUN, [])]
    assert files(tmp_path / "journal", ".bad") == ["bad", "bad.2"]


@pytest.mark.parametrize("name", ["a b", "ä", "x\n", ".hidden", b"\xff", "a" * 249])
def test_a_name_that_is_no_session_is_set_aside_or_restored(tmp_path, journal, caplog, name):
    path = os.path.join(os.fsencode(tmp_path / "journal"), os.fsencode(name) + b".jsonl")
    with open(path, "wb") as file:
        file.write(FIRST.encode().replace(b"VERSION", llmserve_env.__version__.encode()))
    found = [entry.session_id for entry in journal.entries()]
    assert found == ([name] if name == "a" * 249 else [])
    assert all(record.getMessage().isprintable() for record in caplog.records)


def test_what_is_recorded_can_be_read(tmp_path, journal):
    wide = BEGUN.model_copy(update={"workload": {"a": ["é\U0001f600", 1e15, 10**300, -0.0, "\x7f"] * 100}})
    for never in (float("inf"), "\ud800"):
        with pytest.raises(InputError, match="cannot be recorded"):
            journal.begin("never", BEGUN.model_copy(update={"workload": {"a": never}}))
    journal.begin("wide", wide)
    assert list(journal.entries()) == [Entry("wide", wide, [])]
    journal.close()
    tight = Journal(tmp_path / "journal", max_line_bytes=1000)
    with pytest.raises(InputError, match="at most 1,000 bytes"):
        tight.begin("wider", wide)
    tight.close()


def test_a_folder_that_cannot_be_written_is_said_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        Journal(tmp_path / "file" / "journal")


def test_what_cannot_be_recorded_is_not_played(tmp_path):
    async def play() -> None:
        service = Service(Settings(journal=tmp_path / "journal"))
        session = service.sessions.open()
        await service.reset(session, BEGUN)
        path = tmp_path / "journal" / f"{session.id}.jsonl"
        begun = path.read_bytes()
        # A disk with room for a part: of the first action, of the second, of the many of a step_n.
        for room, actions in (
            (20, PLAYED[:1]),
            (len(GOOD) + 20, PLAYED[:2]),
            (len(GOOD) * 9 + 1, PLAYED * 5),
        ):
            with largest_file(len(begun) + room), pytest.raises(Unavailable):
                await service.step(session, actions)
            assert (session.state.step_count, path.read_bytes()) == (0, begun)
        with largest_file(20), pytest.raises(Unavailable):
            await service.reset(session, BEGUN.model_copy(update={"seed": 6}))
        assert (session.state.seed, path.read_bytes(), files(path.parent, ".tmp")) == (5, begun, [])
        await service.step(session, PLAYED[:1])  # there is room again
        path.write_bytes(begun)  # somebody else's doing: what was recorded is gone
        with pytest.raises(Unavailable):
            await service.step(session, PLAYED[:1])
        path.unlink()
        with pytest.raises(Unavailable):
            await service.step(session, PLAYED[:1])
        assert (session.state.step_count, path.exists()) == (1, False)
        path.parent.rmdir()
        with pytest.raises(Unavailable):
            await service.step(session, PLAYED[:1])
        assert session.state.step_count == 1

    asyncio.run(play())


def test_sessions_for_which_there_is_no_room_stay_as_they_are(tmp_path, journal, caplog):
    folder = tmp_path / "journal"
    for name in ("one", "three", "two"):
        journal.begin(name, BEGUN)
    journal.add("three", PLAYED[:2])
    journal.close()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    # However soon an idle session gives its place to a new one.
    assert restored(journal=folder, max_sessions=1, reclaim_after_s=0.0) == {"one": 0}
    assert "2 sessions stay in the journal" in caplog.text
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert restored(journal=folder) == {"one": 0, "three": 2, "two": 0}


def test_a_restored_session_keeps_to_the_bounds_of_a_new_one(tmp_path, journal, caplog):
    many = {"workload": "poisson://?rate=200", "horizon_s": 10.0}
    asked = {
        "few": {"workload": "poisson://?rate=4", "horizon_s": 10.0},
        "file": {"workload": f"trace://{tmp_path}/trace.csv" + "x" * 100_000},
        "long": {"horizon_s": 5000.0},
        "many": many,
        "unknown": {"task_id": "nonesuch"},
    }
    for name, request in asked.items():
        journal.begin(name, ResetRequest(**{"task_id": "static_workload", "seed": 3, **request}))
        journal.add(name, PLAYED[:2])
    journal.close()
    settings = {"max_requests": 1000, "max_windows": 400, "guard_timeout_s": 60.0}
    assert restored(journal=tmp_path / "journal", **settings) == {"few": 2}
    assert files(tmp_path / "journal", ".bad") == ["file", "long", "many", "unknown"]
    for said in ("at most 1,000 requests", "expected at most 400", "no task 'nonesuch'", "workload"):
        assert said in caplog.text
    assert len(caplog.text) < 5000  # whatever they hold


def test_a_file_that_cannot_be_removed_now_holds_up_no_session(tmp_path, caplog):
    clock = Clock()

    async def play() -> None:
        service = Service(Settings(journal=tmp_path, session_timeout_s=10.0))
        service.sessions._clock = clock
        sessions = [service.sessions.open() for _ in range(3)]
        for session in sessions:
            await service.reset(session, BEGUN)
        stuck = tmp_path / f"{sorted(each.id for each in sessions)[0]}.jsonl"
        stuck.unlink()
        (stuck / "full").mkdir(parents=True)  # nobody can remove a folder as a file
        clock.now_s += 11
        for _ in range(2):
            await service._sweep()
            assert (len(service.sessions), files(tmp_path)) == (0, [stuck.stem])
        assert caplog.text.count("removing closed sessions' files failed") == 1
        (stuck / "full").rmdir()
        stuck.rmdir()
        stuck.write_bytes(b"")
        await service._sweep()
        assert files(tmp_path) == []

    asyncio.run(play())


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
    (folder / "deep.jsonl").write_bytes(b"[" * 5000 + b"\n")

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
        assert files(folder, ".bad") == ["deep", "garbage", "older"]
        recorded = (folder / f"{by_http}.jsonl").read_bytes().splitlines()
        assert [json.loads(line) for line in recorded[4:]] == [PLAYED[3].model_dump(mode="json")]
    assert "garbage.jsonl" in messages.read_text()
    assert "found 0.0.1" in messages.read_text()
