"""Grades: an episode's log is replayed in the simulator, and a log that does not match is refused.

The score of a log is never read from it: it comes from the replay. docs/grading.md says what it means and
what verification can and cannot tell.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from math import fsum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError
from pydantic_core import from_json

from llmserve_env.controls import to_array, to_values
from llmserve_env.episode import EpisodeBatch
from llmserve_env.errors import InputError, as_input_error
from llmserve_env.files import SETTINGS_BYTES, read_bytes, write_atomic
from llmserve_env.recording import record_bytes
from llmserve_env.report.version import __version__
from llmserve_env.rewards import COMPONENTS
from llmserve_env.schema import EpisodeLog, GradeResult
from llmserve_env.tasks import EVALUATION_SEEDS, Task, list_tasks, load_task
from llmserve_env.tasks.self_contained import refuse_files

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_WINDOWS = 10_000
"""Windows of a log that is read unless more are allowed: as many as the service takes."""
_WINDOW_BYTES = 1024  # of JSON with indents; a live episode's have half of it
_OUTCOMES = ("arrived", "completed", "in_slo", "failed")


def grade(log: EpisodeLog, *, allow_files: bool = False) -> GradeResult:
    """Grade an episode by replaying its log.

    Args:
        log: log of a whole episode, or of its first windows: what is missing earns nothing.
        allow_files: whether the log's task may name files of this machine (a profile, a trace, a table of
            lengths). Leave it off for a log that somebody else wrote.

    Returns:
        The grade. It is `verified` unless the log is of a live episode, which cannot be replayed: then the
        score is the mean of the rewards that the log states.

    Raises:
        InputError: the log is of another version, an action sets what the task does not grant, or the log is
            not what the simulator did under its task, seed and actions; names the field, such as
            "digests[17]", and what was expected.
    """
    _check_form(log)
    task, custom = _task(log.task, allow_files)
    _check_granted(task, log)
    if len(log.actions) > task.windows:
        raise InputError(f"expected at most {task.windows}, found {len(log.actions)}", field="actions")
    score, requests = log.score, dict[str, int]()
    if log.live:
        score = fsum(log.rewards) / task.windows
        parts = _stated(log, task, score)
    else:
        parts, requests = _replay(task, log)
    return GradeResult(
        task_id=task.id,
        custom=custom,
        seed=log.seed,
        held_out=log.seed in EVALUATION_SEEDS,
        score=min(score, 1.0),  # where all of it was earned, rounding can end above
        components=parts,
        windows=len(log.actions),
        complete=log.terminated or len(log.actions) == task.windows,
        requests=requests,
        verified=not log.live,
    )


def read_log(path: str | Path, *, max_windows: int = MAX_WINDOWS) -> EpisodeLog:
    """Read a log that `write_log` wrote.

    Args:
        path: a JSON file, gzip'ed if it ends in .gz.
        max_windows: windows that it may have; of a file that is longer than such a log no more is read.

    Raises:
        InputError: it cannot be read, is no log, or is longer; names the file and the field.
    """
    path = Path(path)
    most = SETTINGS_BYTES + max_windows * _WINDOW_BYTES
    content = read_bytes(path, most, packed=path.suffix == ".gz")
    try:
        table = from_json(content)
    except ValueError as error:
        raise InputError(f"expected JSON: {error}", file=str(path)) from error
    for name in ("actions", "rewards", "components", "digests"):
        entries = table.get(name) if isinstance(table, dict) else None
        if isinstance(entries, list) and len(entries) > max_windows:
            reason = f"expected at most {max_windows:,} windows, found {len(entries):,}"
            raise InputError(reason, file=str(path), field=name)
    try:
        return EpisodeLog.model_validate(table)
    except ValidationError as error:
        refused = _log_error(error)
        raise InputError(refused.reason, file=str(path), field=refused.field) from error


def write_log(path: str | Path, log: EpisodeLog) -> None:
    """Write a log as JSON, gzip'ed if the path ends in .gz, atomically.

    Raises:
        InputError: the file cannot be written, or the log holds a number that is not finite.
    """
    try:
        text = json.dumps(log.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"
    except ValueError as error:
        reason = "cannot be written: the log holds a number that is not finite, and JSON has none"
        raise InputError(reason, file=str(path)) from error
    content = text.encode()
    # Without the time of day the same log gives the same file.
    write_atomic(path, gzip.compress(content, mtime=0) if Path(path).suffix == ".gz" else content)


def _check_form(log: EpisodeLog) -> None:
    """Refuse what no replay is needed for to see."""
    version = __version__
    if log.package_version != version:
        raise InputError(
            f"expected {version}, the version that replays it, found {log.package_version}, whose dynamics "
            f"may differ: grade it with llmserve-env {log.package_version}",
            field="package_version",
        )
    if not 0 <= log.seed < 2**63:
        raise InputError(f"expected 0..2**63 - 1, found {log.seed}", field="seed")
    if log.components and not log.live:
        raise InputError(
            "expected none: those of a simulated episode come from its replay", field="components"
        )
    for name in ("rewards", "digests", *(["components"] if log.components else [])):
        found = len(getattr(log, name))
        if found != len(log.actions):
            raise InputError(f"expected {len(log.actions)}, one for each action, found {found}", field=name)


def _check_granted(task: Task, log: EpisodeLog) -> None:
    """Refuse actions that never were in force: an episode keeps the controls that its task does not grant.

    A log that holds them is of a version that obeyed them, or of no episode at all.
    """
    actions = to_array(log.actions)
    if not len(actions):
        return
    in_force = task.grid.in_force(actions)
    for index in np.flatnonzero(actions != in_force)[:1].tolist():
        for name in task.grid.not_granted(actions[index]):
            kept, asked = (to_values(row[index])[name] for row in (in_force, actions))
            raise InputError(
                f"expected {kept}, as the task does not grant it, found {asked}",
                field=f"actions[{index}].{name}",
            )


def _replay(task: Task, log: EpisodeLog) -> tuple[dict[str, float], dict[str, int]]:
    """Parts of the score and counts of requests, of a replay that gave what the log says."""
    with _of_the_task():
        batch = EpisodeBatch(task)
        batch.reset([log.seed])
    actions = to_array(log.actions)
    digest = hashlib.sha256()
    terminated = False
    for index in range(len(actions)):
        if batch.over[0]:
            raise InputError(
                f"expected {index}: the episode is over by then, found {len(actions)}", field="actions"
            )
        result = batch.step(actions[index : index + 1])
        terminated = bool(result.terminated[0])
        digest.update(record_bytes(batch.windows[0], task))
        if log.digests[index] != digest.hexdigest():
            raise InputError(
                f"expected {digest.hexdigest()}, found {log.digests[index]}: under the log's task, seed and "
                "actions the simulator does something else in this window",
                field=f"digests[{index}]",
            )
        _expect(float(result.rewards[0]), log.rewards[index], f"rewards[{index}]")
    _expect(terminated, log.terminated, "terminated")
    _expect(float(batch.scores[0]), log.score, "score")
    parts = dict(zip(COMPONENTS, batch.totals[0].tolist(), strict=True))
    return parts, _requests(batch.requests[0], batch.windows[0], len(task.requests(log.seed)))


def _expect(expected: object, found: object, field: str) -> None:
    if found != expected:
        raise InputError(f"expected {expected}, found {found}", field=field)


def _requests(counts: NDArray[np.int64], window: NDArray[np.void], total: int) -> dict[str, int]:
    """What became of an episode's requests, by the names of `GradeResult.requests`."""
    found = dict(zip(_OUTCOMES, counts.tolist(), strict=True))
    return {**found, "unfinished": int(window["in_flight"]), "to_come": total - found["arrived"]}


def _stated(log: EpisodeLog, task: Task, score: float) -> dict[str, float]:
    """Parts of the score as a live log states them; refuses what it cannot have earned."""
    for index, reward in enumerate(log.rewards):
        if not 0 <= reward <= task.windows:
            raise InputError(f"expected 0..{task.windows}, found {reward}", field=f"rewards[{index}]")
    if not (abs(log.score - score) <= 1e-9 and score <= 1 + 1e-9):
        expected = f"the sum of the rewards over {task.windows} windows, {score:g}, at most 1"
        raise InputError(f"expected {expected}, found {log.score}", field="score")
    for index, (parts, reward) in enumerate(zip(log.components, log.rewards, strict=False)):
        field = f"components[{index}]"
        if set(parts) != set(COMPONENTS) or not all(part >= 0 for part in parts.values()):
            raise InputError(f"expected {', '.join(COMPONENTS)}, each 0 or more, found {parts}", field=field)
        if not abs(fsum(parts.values()) - reward) <= 1e-9 * max(reward, 1.0):
            raise InputError(f"expected parts of {reward:g}, found {fsum(parts.values()):g}", field=field)
    if not log.components:
        return {}
    return {name: fsum(parts[name] for parts in log.components) / task.windows for name in COMPONENTS}


def _task(table: dict[str, Any], allow_files: bool) -> tuple[Task, bool]:
    """The task of a log, and whether it is another than the shipped one of its id."""
    with _of_the_task():
        task = Task.model_validate(table)
        if task.id in list_tasks():
            shipped = load_task(task.id)
            # Equal tables can list tenants in another order, which is another task: what is called the
            # shipped one is replayed as shipped.
            if task.model_dump(mode="json") == shipped.model_dump(mode="json"):
                return shipped, False
        if not allow_files:
            refuse_files(task)
        task.grid, task.profile, task.tenants, task.quality  # noqa: B018 - what they refuse is refused here
    return task, True


@contextmanager
def _of_the_task() -> Iterator[None]:
    """Name a fault in the log's task by its place in the log."""
    try:
        yield
    except ValidationError as error:
        refused = _log_error(error)
        raise InputError(
            refused.reason, field=f"task.{refused.field}" if refused.field else "task"
        ) from error
    except InputError as error:
        field = f"task.{error.field}" if error.field else "task"
        raise InputError(error.reason, file=error.file, line=error.line, field=field) from error


def _log_error(error: ValidationError) -> InputError:
    """The first fault, with indices as the log's readers write them: actions[3].batch_cap."""
    refused = as_input_error(error)
    field = re.sub(r"\.(\d+)", r"[\1]", refused.field) if refused.field else None
    return InputError(refused.reason, field=field)
