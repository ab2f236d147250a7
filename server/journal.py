"""A record of the open sessions on disk, from which a restart restores them by replay.

A file a session: what its episode was begun with, then every action before it is played. A reset begins the
file anew, and the end of the session removes it. Files outlive the process, however it ends; after a loss of
power they are as far as the system had written them.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

import llmserve_env
from llmserve_env.disk.append_log import AppendLog, read_lines, write_lines
from llmserve_env.disk.lock import FolderLock
from llmserve_env.errors import InputError
from llmserve_env.net.loops import Failures
from llmserve_env.schema import ServeAction
from server.messages.refusals import Refusal, Unavailable
from server.messages.requests import ResetRequest

_log = logging.getLogger(__name__)
_SUFFIX = ".jsonl"
_TO_JSON = json.JSONEncoder(allow_nan=False, ensure_ascii=False).encode
_LONGEST = 300  # characters of a reason
_NAME = re.compile(r"[A-Za-z0-9_-]{1,255}")
_LEFT = re.compile(r"[A-Za-z0-9_-]{32}\.tmp")
"""A beginning that a killed process did not finish; other files in the folder are somebody's."""


class _Version(BaseModel):
    """What is read first of a file: the rest may be of another version."""

    model_config = ConfigDict(extra="ignore")

    version: str


class _Beginning(BaseModel):
    """The first line of a file."""

    model_config = ConfigDict(extra="forbid")

    version: str
    begun: ResetRequest


@dataclass(frozen=True)
class Entry:
    """A session as it was recorded.

    Attributes:
        session_id: its name.
        begun: what its episode was begun with.
        actions: what was set since.
        size: bytes of its file that hold this.
    """

    session_id: str
    begun: ResetRequest
    actions: list[ServeAction]
    size: int = field(default=0, compare=False)


class Journal:
    """Files of the open sessions in a folder, which is made if it is missing; None keeps no record.

    Args:
        folder: folder of this service alone, for as long as the journal is open.
        max_actions: most actions of a session that are read.
        max_line_bytes: longest line that is written or read.

    Raises:
        InputError: it cannot be written, or another server uses it.
    """

    def __init__(
        self, folder: Path | None, max_actions: int = 100_000, max_line_bytes: int = 16 << 20
    ) -> None:
        self._folder = folder
        self._max_actions = max_actions
        self._max_line_bytes = max_line_bytes
        self._sizes: dict[str, int] = {}  # of files, as far as they count
        self._left: set[Path] = set()  # files of closed sessions that could not be removed
        self._writes, self._removals = Failures("the journal"), Failures("removing closed sessions' files")
        self._lock: FolderLock | None = None
        if folder is not None:
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # names of sessions are secrets
            except OSError as error:
                raise InputError(f"cannot be written: {error.strerror}", file=str(folder)) from error
            self._lock = FolderLock(folder, "another server")
            try:
                (folder / "writable.tmp").touch()
                (folder / "writable.tmp").unlink()
            except OSError as error:
                self.close()
                raise InputError(f"cannot be written: {error.strerror}", file=str(folder)) from error
            for path in folder.glob("*.tmp"):
                if _LEFT.fullmatch(path.name):
                    with suppress(OSError):
                        path.unlink()

    def close(self) -> None:
        """Let another server have the folder."""
        if self._lock is not None:
            self._lock.close()

    def begin(self, session_id: str, begun: ResetRequest) -> None:
        """Record that an episode is begun, before it is.

        Raises:
            InputError: it cannot be written as JSON, or is longer than a line may be.
            Unavailable: it cannot be recorded; the file is as it was.
        """
        if self._folder is None:
            return
        try:
            # As it is: pydantic's JSON makes null of an infinite number.
            first = _line({"version": llmserve_env.__version__, "begun": begun.model_dump()})
        except ValueError as error:  # an infinite number, half of a surrogate pair
            raise InputError(f"cannot be recorded: {error}", field="workload") from error
        if len(first) > self._max_line_bytes:
            most = f"{self._max_line_bytes:,} bytes"
            raise InputError(f"expected at most {most} as the journal has it, found more", field="workload")
        with self._writing():
            # Not `write_atomic`: a restart needs no fsync, which would hold up everybody for long.
            path = self._path(self._folder, session_id)
            self._sizes[session_id] = write_lines(path, first)

    def add(self, session_id: str, actions: list[ServeAction]) -> None:
        """Record actions, before they are played.

        Raises:
            Unavailable: they cannot be recorded; the file is as it was.
        """
        if self._folder is None:
            return
        with self._writing(), self._open(self._folder, session_id) as file:
            file.append(*(_line(action.model_dump(mode="json")) for action in actions))
            self._sizes[session_id] = file.size

    def end(self, session_id: str) -> None:
        """Forget a session. A file that cannot be removed now, is when `sweep` is called."""
        if self._folder is not None:
            self._sizes.pop(session_id, None)
            self._remove(self._path(self._folder, session_id))

    def sweep(self) -> None:
        """Remove the files of closed sessions that could not be removed before."""
        for path in tuple(self._left):
            self._remove(path)

    def count(self) -> int:
        """Files of sessions."""
        return len(self._paths())

    def entries(self) -> Iterator[Entry]:
        """The sessions that were open when the service stopped, one after the other.

        A file that cannot be used is set aside, with the reason in the service's log. One that the system
        does not let be read stays.
        """
        for path in self._paths():
            try:
                entry = _entry(path, self._max_actions, self._max_line_bytes)
            except OSError as error:
                _log.error("%r: cannot be read, and stays as it is: %s", str(path), error.strerror or error)
            except Exception as error:  # whatever it holds, the others are restored
                self.set_aside(path.stem, error)
            else:
                yield entry

    def resume(self, entry: Entry) -> None:
        """Record on what is set in a session that was restored; what a crash cut off is taken out.

        Raises:
            Unavailable: that cannot be done now, and is with the next action.
        """
        if self._folder is None:
            return
        self._sizes[entry.session_id] = entry.size
        with self._writing():
            self._open(self._folder, entry.session_id).close()

    def set_aside(self, session_id: str, error: Exception) -> None:
        """Keep a file that cannot be replayed, for somebody to look at."""
        if self._folder is None:
            return
        path = self._path(self._folder, session_id)
        aside, number = path.with_suffix(".bad"), 1
        while os.path.lexists(aside):
            number += 1
            aside = path.with_suffix(f".{number}.bad")
        _log.error("%r: cannot be restored, and is set aside: %s", str(path), _reason(error))
        try:
            path.rename(aside)
        except OSError as raised:
            _log.error("%r: cannot be set aside, and stays: %s", str(path), raised.strerror or raised)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writes.tell(error)
            raise Unavailable("the journal of the service cannot be written") from error
        self._writes.end()

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._left.add(path)
            self._removals.tell(error)
            return
        self._left.discard(path)
        if not self._left:
            self._removals.end()

    def _paths(self) -> list[Path]:
        return [] if self._folder is None else sorted(self._folder.glob(f"*{_SUFFIX}"))

    def _open(self, folder: Path, session_id: str) -> AppendLog:
        # Not kept open: there may be more sessions than files that a process may open.
        return AppendLog(self._path(folder, session_id), size=self._sizes[session_id], sync=False)

    @staticmethod
    def _path(folder: Path, session_id: str) -> Path:
        return folder / f"{session_id}{_SUFFIX}"  # ids are the service's own, letters, digits, - and _


def _entry(path: Path, max_actions: int, max_line_bytes: int) -> Entry:
    """What a file says; what follows its last newline is a line that a crash cut off.

    Raises:
        InputError: it is no file of a session; says why.
        OSError: it cannot be read.
    """
    if not _NAME.fullmatch(path.stem):
        raise InputError("expected the id of a session as its name")
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
        raise InputError("expected a file")
    lines = (line for line in read_lines(path, max_line_bytes) if line.whole)
    first = next(lines, None)
    if first is None:
        raise InputError("expected what the episode was begun with, found nothing", line=1)
    begun, size = _begun(first.content), first.end
    actions: list[ServeAction] = []
    for line in lines:
        if len(actions) == max_actions:
            raise InputError(f"expected at most {max_actions:,} actions", line=line.number)
        try:
            actions.append(ServeAction.model_validate_json(line.content))
        except ValidationError as error:
            raise _invalid(error, line.number) from error
        size = line.end
    return Entry(path.stem, begun, actions, size)


def _begun(line: bytes) -> ResetRequest:
    try:
        version = _Version.model_validate_json(line).version
        if version != llmserve_env.__version__:
            raise InputError(f"expected version {llmserve_env.__version__}, found {version}", line=1)
        begun = _Beginning.model_validate_json(line).begun
    except ValidationError as error:
        raise _invalid(error, 1) from error
    if begun.seed is None:
        raise InputError("expected a seed", line=1)
    return begun


def _invalid(error: ValidationError, line: int) -> InputError:
    """What is wrong with a line, without what it holds: that may be anything."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return InputError(f"{place}: {first['msg']}" if place else first["msg"], line=line)


def _reason(error: Exception) -> str:
    """What is wrong with a file, in a few words: it may hold anything."""
    if isinstance(error, InputError) and error.line is not None:
        return f"line {error.line}: {error.reason}"[:_LONGEST]
    known = isinstance(error, (InputError, Refusal))
    return (str(error) if known else f"{type(error).__name__}: {error}")[:_LONGEST]


def _line(record: dict[str, Any]) -> bytes:
    return _TO_JSON(record).encode()
