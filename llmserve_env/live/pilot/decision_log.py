"""The log of a service that an agent steers: what was seen, decided, and what came of it.

JSON, a line each, on the disk before the next thing happens. A log of which any part is left can be read.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from llmserve_env.backend import WINDOW
from llmserve_env.controls import to_array
from llmserve_env.disk.append_log import AppendLog, read_lines
from llmserve_env.disk.append_log import Line as FileLine
from llmserve_env.errors import InputError, as_input_error
from llmserve_env.live.pilot.decisions import Decision
from llmserve_env.observation import FEATURES, Observer, Reader, feature_names, features
from llmserve_env.recording import record_row
from llmserve_env.report.version import __version__
from llmserve_env.schema import GROUPS, ServeAction
from llmserve_env.tasks import Task

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MODEL = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Beginning(BaseModel):
    """What a log is of: the first line of a run, and of each of its files."""

    model_config = _MODEL

    kind: Literal["begin"] = "begin"
    format: Literal[1] = 1
    """Version of this record."""
    run: str = Field(default_factory=lambda: secrets.token_hex(8))
    """Name of the run, one from start to end of an agent's work."""
    part: int = 0
    """Number of the file within the run."""
    time_s: float
    """When the run began (Unix time, s)."""
    package_version: str = __version__
    """Version of llmserve_env."""
    task: dict[str, Any]
    """The whole task."""
    agent: str
    """Its name."""
    shielded: bool
    """Whether a shield stands around it."""
    dry_run: bool
    """Whether its decisions are only told."""
    endless: bool
    """Whether the service has no end; else an episode of the task is played."""
    start: ServeAction
    """In force at the start."""
    safe: ServeAction
    """In force when the agent cannot be relied on."""
    limits: dict[str, Any]
    """On changes, by control."""
    decide_limit_s: float
    """Time that the agent has for a decision (s)."""
    reward: str
    """What the rewards are."""
    features: list[str] = [feature.name for feature in features(GROUPS)]
    """Names of an observation's entries, in order."""
    capabilities: dict[str, str] = {}
    """How each field of an action is applied."""


class Made(BaseModel):
    """A decision, and what it rests on."""

    model_config = _MODEL

    kind: Literal["decision"] = "decision"
    run: str
    observation: list[float] | None
    """What the agent saw; None where telemetry could not be trusted."""
    decision: Decision


class Result(BaseModel):
    """What came of a decision."""

    model_config = _MODEL

    kind: Literal["result"] = "result"
    run: str
    window: int
    """Index of the decision's window."""
    reward: float
    """Of the window."""
    record: dict[str, Any]
    """Of the window, `llmserve_env.backend.WindowRecord`; null for no number."""


Line = Beginning | Made | Result
_LINE: TypeAdapter[Line] = TypeAdapter(Annotated[Line, Field(discriminator="kind")])
_BEGIN = b'{"kind":"begin"'
_NO_LOG = "expected a decision log, whose first line begins a run"


class DecisionLog:
    """Appends to a file; a line that is written is on the disk, and one that cannot be leaves no trace.

    A file that has grown too large becomes FILE.1, and what was FILE.1 becomes FILE.2; each begins with what
    the run is. A line that a killed process left half-written is cut off.

    Args:
        path: path of the file; an existing log is continued.
        max_bytes: size from which on another file is begun.
        keep: files beside it, at most; the oldest goes.

    Raises:
        InputError: it cannot be written, another process writes it, or it is there and no decision log.
    """

    def __init__(self, path: Path | str, *, max_bytes: int = 64_000_000, keep: int = 8) -> None:
        self.path = Path(path)
        self._max_bytes, self._keep = max_bytes, keep
        self._beginning: Beginning | None = None
        try:
            if self.path.is_file():
                _check_log(self.path)
            self._file = AppendLog(self.path)
        except OSError as error:
            reason = error.strerror or str(error)
            if isinstance(error, BlockingIOError):
                reason = "another process writes it"
            raise InputError(f"cannot be written: {reason}", file=str(self.path)) from error

    def begin(self, beginning: Beginning) -> None:
        """Begin a run.

        Raises:
            OSError: it could not be written.
        """
        self.write(beginning)
        self._beginning = beginning

    def write(self, line: Line) -> None:
        """Write a line, to the disk.

        Raises:
            OSError: it could not be written; the files are as they were.
        """
        content = line.model_dump_json().encode()
        size = self._file.size
        if size and size + len(content) >= self._max_bytes and self.path.is_file():
            self._rotate(isinstance(line, Beginning))
        self._file.append(content)

    def close(self) -> None:
        """No more is written."""
        self._file.close()

    def _rotate(self, begins: bool) -> None:
        """Begin another file, with what the run is unless the next line tells it."""
        beginning = None if begins or self._beginning is None else self._beginning
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with suppress(FileNotFoundError):
            temporary.unlink()
        file = AppendLog(temporary)
        try:
            if beginning is not None:
                beginning = beginning.model_copy(update={"part": beginning.part + 1})
                file.append(beginning.model_dump_json().encode())
            names = [self.path, *(Path(f"{self.path}.{number}") for number in range(1, self._keep + 1))]
            for older, newer in zip(names[:0:-1], names[-2::-1], strict=True):
                if newer.exists():
                    newer.replace(older)
            temporary.replace(self.path)
        except BaseException:
            file.close()
            with suppress(OSError):
                temporary.unlink()
            raise
        self._file.close()
        self._file, self._beginning = file, beginning or self._beginning


@dataclass(frozen=True)
class Stretch:
    """Windows of a run in a row, of which everything is known.

    Attributes:
        beginning: beginning of the run.
        decisions: n of them.
        observations: float32[n + 1, features], before each decision and after the last one.
        before: action in force before the first.
        windows: WINDOW[n], what came of them.
        rewards: float64[n].
    """

    beginning: Beginning
    decisions: list[Decision]
    observations: NDArray[np.float32]
    before: ServeAction
    windows: NDArray[np.void]
    rewards: NDArray[np.float64]


def read_decisions(
    paths: Iterable[Path | str], note: Callable[[str], object] = lambda text: None
) -> list[Stretch]:
    """What is known of the runs of some logs.

    A stretch ends where a line is missing, and where telemetry could not be trusted.

    Args:
        paths: the files in any order, those that were rotated away too.
        note: is told of lines that are left out because they were never written to their end.

    Raises:
        InputError: a file is no such log, or of other observations than this package's; names it and the
            line.
    """
    beginnings: dict[str, Beginning] = {}
    made: dict[str, dict[int, Made]] = {}
    results: dict[str, dict[int, Result]] = {}
    for path in paths:
        for line in _lines(Path(path), note):
            if isinstance(line, Beginning):
                beginnings.setdefault(line.run, line)
            elif isinstance(line, Made):
                made.setdefault(line.run, {})[line.decision.window] = line
            else:
                results.setdefault(line.run, {})[line.window] = line
    stretches: list[Stretch] = []
    for run, beginning in beginnings.items():
        try:
            stretches += _stretches(beginning, made.get(run, {}), results.get(run, {}))
        except Exception as error:  # their figures may be anything
            raise InputError(f"run {run} has records of another kind: {error}") from error
    return stretches


def logged_task(beginning: Beginning) -> Task:
    """The task of a run.

    Raises:
        InputError: it is none.
    """
    try:
        return Task.model_validate(beginning.task)
    except ValidationError as error:
        raise as_input_error(error) from error


def one_task(stretches: Sequence[Stretch]) -> Task:
    """The task of all stretches, whatever their services were started with.

    Raises:
        InputError: they are of several.
    """
    tasks = [{**each.beginning.task, "start": None} for each in stretches]
    if any(each != tasks[0] for each in tasks):
        raise InputError("expected logs of one task, found several", field="decisions")
    if any(each.beginning.features != stretches[0].beginning.features for each in stretches):
        raise InputError("expected logs of the same features, found others", field="decisions")
    return logged_task(stretches[0].beginning)


def observed(
    observer: Observer,
    task: Task,
    window: NDArray[np.void],
    action: ServeAction,
    *,
    step: int,
    endless: bool,
) -> NDArray[np.float32]:
    """float32[features], of a service after a window.

    Args:
        observer: observer of the task.
        task: what is served.
        window: WINDOW, the last one.
        action: action in force in the window.
        step: windows so far.
        endless: whether the service has no end: `progress` then rises as in an episode until its half, and
            stays there.
    """
    if endless:
        step = min(step, task.windows // 2)
    observations = observer.of(window.reshape(1), to_array([action]), np.array([step]))
    first: NDArray[np.float32] = observations[0]
    return first


def _stretches(beginning: Beginning, made: dict[int, Made], results: dict[int, Result]) -> list[Stretch]:
    task = logged_task(beginning)
    observer, reader = Observer(task), Reader(beginning.features, feature_names(task))
    found: list[Stretch] = []
    part: list[tuple[Made, Result]] = []

    def end(after: list[float] | None) -> None:
        """Keep what there is; without an observation after the last window, without that window."""
        if after is None:
            after = part.pop()[0].observation
        if part:
            earlier = made.get(part[0][0].decision.window - 1)
            found.append(
                Stretch(
                    beginning,
                    [line.decision for line, _ in part],
                    np.array([*(line.observation for line, _ in part), after], np.float32),
                    earlier.decision.applied if earlier else beginning.start,
                    np.array([record_row(result.record) for _, result in part], WINDOW),
                    np.array([result.reward for _, result in part]),
                )
            )
        part.clear()

    for window in sorted(made):
        line, result = made[window], results.get(window)
        known = window == 0 or window - 1 in made  # what was in force before
        if line.observation is None or result is None or not known:
            continue
        part.append((line, result))
        following = made.get(window + 1)
        if following is None:  # the run's end, or a hole
            row, action = record_row(result.record), line.decision.applied
            after = observed(observer, task, row, action, step=window + 1, endless=beginning.endless)
            end(reader.of(after[None])[0].tolist())
        elif following.observation is None or window + 1 not in results:
            end(following.observation)
    return found


def _check_log(path: Path) -> None:
    """Refuse to append to a file that is none: its end might be cut off.

    Raises:
        InputError: it is no decision log of this version.
        OSError: it cannot be read.
    """
    first = next(read_lines(path), None)
    if first is None:
        return
    if first.whole:
        _first(first.content, path)
    elif not first.content.startswith(_BEGIN) and not _BEGIN.startswith(first.content):
        raise InputError(_NO_LOG, file=str(path), line=1)


def _first(content: bytes, path: Path) -> Beginning:
    """The line that a log begins with."""
    line = _parsed(content, path, 1)
    if not isinstance(line, Beginning):
        raise InputError(_NO_LOG, file=str(path), line=1)
    return line


def _lines(path: Path, note: Callable[[str], object]) -> Iterator[Line]:
    """What a file has; lines that were not written to their end are left out and told."""
    torn: tuple[int, InputError] | None = None  # the last line, where it may be one
    begun = False
    for number, content, _, whole in _readable(path):
        if torn is not None and not content.startswith(_BEGIN):
            raise torn[1]
        if torn is not None:
            note(f"{path}:{torn[0]}: left out, it was not written to its end")
            torn = None
        if not whole:
            note(f"{path}:{number}: left out, it was not written to its end")
            return
        if not begun:
            yield _first(content, path)
            begun = True
            continue
        try:
            yield _parsed(content, path, number)
        except InputError as error:
            if not _is_json_error(error):
                raise
            torn = number, error  # as a process left it that ended it later
    if torn is not None:
        note(f"{path}:{torn[0]}: left out, it was not written to its end")


def _readable(path: Path) -> Iterator[FileLine]:
    try:
        yield from read_lines(path)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", file=str(path)) from error


def _parsed(content: bytes, path: Path, number: int) -> Line:
    try:
        line = _LINE.validate_json(content)
    except ValidationError as error:
        raise InputError(
            f"expected a line of a decision log: {as_input_error(error).reason}",
            file=str(path),
            line=number,
        ) from error
    if isinstance(line, Beginning):
        unknown = sorted(set(line.features) - {feature.name for feature in FEATURES})
        if unknown:
            raise InputError(
                f"this package knows no such features: {', '.join(unknown[:5])}", file=str(path), line=number
            )
    return line


def _is_json_error(error: InputError) -> bool:
    """Whether it is of a line that is no JSON."""
    cause = error.__cause__
    return isinstance(cause, ValidationError) and cause.errors()[0]["type"] == "json_invalid"
