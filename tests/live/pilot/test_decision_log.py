"""The decision log: on the disk at once, in files that do not grow for ever, read whatever is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from llmserve_env.backend import WINDOW
from llmserve_env.errors import InputError
from llmserve_env.live.pilot.change_limits import ChangeLimits
from llmserve_env.live.pilot.decision_log import Beginning, DecisionLog, Made, read_decisions
from llmserve_env.live.pilot.pilot import Pilot
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import load_task
from tests.full_disk import largest_file

from ..agents import Scripted

TASK = load_task("bursty_workload")
START = ServeAction(batch_cap=64)

WRITER = """
import sys
import numpy as np
from llmserve_env.backend import WINDOW
from tests.live.pilot.test_decision_log import steer
steer(sys.argv[1], 3, close=False)
print("written", flush=True)
sys.stdin.read()
"""


def steer(path, windows, *, stale=(), close=True, **log):
    """A run of so many windows; caps 8, 16, 8, ..."""
    agent = Scripted([ServeAction(batch_cap=8 << (k % 2)) for k in range(windows)])
    pilot = Pilot(agent, TASK, START, limits=ChangeLimits(), log=DecisionLog(path, **log))
    row = np.zeros((), WINDOW)
    for k in range(windows):
        pilot.decide(row, "lost" if k in stale else None)
        row = np.zeros((), WINDOW)
        row["end_s"], row["arrived"] = TASK.window_s * (k + 1), k
        pilot.result(row, float(k))
    if close:
        pilot.close()


def spans(path, *more):
    """First and last window of each stretch that is read."""
    return [
        (each.decisions[0].window, each.decisions[-1].window)
        for each in read_decisions([path, *more], note=lambda text: None)
    ]


def test_it_outlives_its_process(tmp_path):
    path = tmp_path / "log"
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"written\n"
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert spans(path) == [(0, 2)]
    steer(path, 2)  # and the next process goes on
    assert spans(path) == [(0, 2), (0, 1)]


@pytest.mark.parametrize("cut", [2, 40])
def test_a_torn_last_line_is_left_out_and_told(tmp_path, cut):
    path = tmp_path / "log"
    steer(path, 3)
    path.write_bytes(path.read_bytes()[:-cut])
    notes = []
    (run,) = read_decisions([path], notes.append)
    assert [each.window for each in run.decisions] == [0, 1]
    np.testing.assert_array_equal(run.windows["arrived"], [0, 1])
    assert len(run.observations) == 3  # the last decision's, whose outcome is lost
    assert notes == [f"{path}:7: left out, it was not written to its end"]
    steer(path, 1)
    assert spans(path) == [(0, 1), (0, 0)]


def test_files_are_rotated_and_each_can_be_read_alone(tmp_path):
    path = tmp_path / "log"
    steer(path, 20, max_bytes=15_000, keep=2)
    files = sorted(each.name for each in tmp_path.iterdir())
    assert files == ["log", "log.1", "log.2"]
    assert all((tmp_path / name).stat().st_size <= 15_000 for name in files)
    whole = spans(path, tmp_path / "log.1", tmp_path / "log.2")
    assert len(whole) == 1
    assert whole[0][1] == 19
    assert whole[0][0] > 0  # the oldest file is gone
    ((first, last),) = spans(tmp_path / "log.1")
    assert whole[0][0] < first <= last < 19
    parts = [json.loads((tmp_path / name).read_text().splitlines()[0])["part"] for name in files]
    assert parts[0] == parts[1] + 1 == parts[2] + 2


def test_a_stretch_ends_where_telemetry_was_stale(tmp_path):
    path = tmp_path / "log"
    steer(path, 6, stale=[3])
    first, second = read_decisions([path])
    # What came of window 2 was not to be trusted; nor was what window 3 was decided on.
    assert [each.window for each in first.decisions] == [0, 1]
    assert [each.window for each in second.decisions] == [4, 5]
    assert len(first.observations) == len(second.observations) == 3
    assert first.before == START
    assert second.before == START  # the safe configuration, of window 3


def test_a_second_writer_is_refused(tmp_path):
    path = tmp_path / "log"
    log = DecisionLog(path)
    with pytest.raises(InputError, match="another process writes it"):
        DecisionLog(path)
    log.close()
    DecisionLog(path).close()
    with pytest.raises(InputError, match="cannot be written"):
        DecisionLog(tmp_path)


@pytest.mark.parametrize("left", [b"", b'{"ki', b'{"kind":"begin","form'])
def test_a_run_that_was_killed_in_its_first_line_is_none(tmp_path, left):
    path = tmp_path / "log"
    path.write_bytes(left)
    assert spans(path) == []
    steer(path, 2)
    assert spans(path) == [(0, 1)]


@pytest.mark.parametrize(
    "content",
    [b"notes without an end", b'{"kind": "other"}\n', b'{"kind":"begin","format":2}\n', b"\xff\x00\n"],
)
def test_a_file_that_is_no_decision_log_is_not_appended_to(tmp_path, content):
    path = tmp_path / "log"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path}:1: expected"):
        DecisionLog(path)
    assert path.read_bytes() == content


def test_a_full_disk_costs_what_it_kept_from_the_log(tmp_path):
    path = tmp_path / "log"
    steer(path, 2)
    before = path.read_bytes()
    log = DecisionLog(path, max_bytes=len(before), keep=2)
    begin, decision = Beginning(**json.loads(before.splitlines()[0])), before.splitlines()[1]
    line = Made(**json.loads(decision))
    log._beginning = begin  # of the run that is under way
    for size in (10, len(before.splitlines()[0]) - 10):  # no room for the file that takes its place
        with largest_file(size), pytest.raises(OSError, match="File too large"):
            log.write(line)
        assert (path.read_bytes(), sorted(os.listdir(tmp_path))) == (before, ["log"])
    log.write(line)  # there is room again
    assert (tmp_path / "log.1").read_bytes() == before
    assert [json.loads(each)["kind"] for each in path.read_bytes().splitlines()] == ["begin", "decision"]
    with pytest.raises(InputError, match="another process writes it"):
        DecisionLog(path)
    log.close()
    with pytest.raises(OSError, match="closed"):
        log.write(line)


def test_what_follows_a_full_disk_begins_with_what_the_run_is(tmp_path):
    path = tmp_path / "log"
    agent = Scripted([ServeAction(batch_cap=8)] * 4)
    pilot = Pilot(agent, TASK, START, limits=ChangeLimits(), log=DecisionLog(path))
    row = np.zeros((), WINDOW)
    with largest_file(10), pytest.raises(OSError, match="File too large") as full:
        pilot.decide(row)
    pilot.fall_back(full.value)
    for k in range(3):
        pilot.result(row, float(k))
        pilot.decide(row)
    pilot.close()
    (run,) = read_decisions([path])
    assert [(each.window, each.by) for each in run.decisions] == [(1, "agent"), (2, "agent")]


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda lines: lines[1:], "1: expected a decision log, whose first line begins a run"),
        (lambda lines: [lines[0], "nonsense", *lines[1:]], "2: expected a line of a decision log"),
        (
            lambda lines: [lines[0].replace('"progress"', '"other"')],
            "1: this package knows no such features",
        ),
        (
            lambda lines: [lines[0], lines[1].replace('"batch_cap":8', '"batch_cap":0', 1)],
            "2: expected a line",
        ),
        (
            lambda lines: [*lines[:2], lines[2].replace('"arrived":0', f'"arrived":{"9" * 400}', 1)],
            "another kind",
        ),
        (lambda lines: [*lines[:2], lines[2].replace('"arrived":0', '"arrived":[]', 1)], "another kind"),
        (lambda lines: [*lines[:2], "[" * 5000, *lines[2:]], "3: expected a line of a decision log"),
        (lambda lines: [*lines[:2], "\0" * 500, *lines[2:]], "3: expected a line of a decision log"),
        (lambda lines: [*lines[:2], lines[2].replace('"arrived":0', '"arrived":"x"', 1)], "another kind"),
    ],
)
def test_what_is_no_decision_log_is_refused(tmp_path, edit, told):
    path = tmp_path / "log"
    steer(path, 2)
    path.write_text("\n".join(edit(path.read_text().splitlines())) + "\n")
    with pytest.raises(InputError, match=told):
        read_decisions([path])


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="nonesuch"):
        read_decisions([tmp_path / "nonesuch"])
