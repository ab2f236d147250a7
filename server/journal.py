"""A record of the open sessions on disk, from which a restart restores them by replay.

A file a session: what its episode was begun with, then every action before it is played. A reset begins the
file anew, and the end of the session removes it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import llmserve_env
from llmserve_env.errors import InputError
from llmserve_env.schema import ServeAction
from server.messages.refusals import Unavailable
from server.messages.requests import ResetRequest

_log = logging.getLogger(__name__)
_SUFFIX = ".jsonl"


@dataclass(frozen=True)
class Entry:
    """A session as it was recorded.

    Attributes:
        session_id: its name.
        begun: what its episode was begun with.
        actions: what was set since.
    """

    session_id: str
    begun: ResetRequest
    actions: list[ServeAction]


class Journal:
    """Files of the open sessions in a folder, which is made if it is missing; None keeps no record.

    Args:
        folder: for this service alone.

    Raises:
        InputError: it cannot be written.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # names of sessions are secrets
                (folder / "writable.tmp").touch()
                (folder / "writable.tmp").unlink()
            except OSError as error:
                raise InputError(f"cannot be written: {error.strerror}", file=str(folder)) from error

    def begin(self, session_id: str, begun: ResetRequest) -> None:
        """Record that an episode is begun, before it is."""
        if self._folder is not None:
            first = {"version": llmserve_env.__version__, "begun": begun.model_dump(mode="json")}
            path = self._path(self._folder, session_id)
            with _writing(self._folder):
                # Not `write_atomic`: a restart needs no fsync, which would hold up everybody for long.
                temporary = path.with_suffix(".tmp")
                temporary.write_bytes(_line(first))
                temporary.replace(path)

    def add(self, session_id: str, actions: list[ServeAction]) -> None:
        """Record actions, before they are played."""
        if self._folder is not None:
            lines = b"".join(_line(action.model_dump(mode="json")) for action in actions)
            path = self._path(self._folder, session_id)
            # In one write, which a crash leaves whole or without its end.
            with _writing(self._folder), path.open("ab", buffering=0) as file:
                file.write(lines)

    def end(self, session_id: str) -> None:
        """Forget a session."""
        if self._folder is not None:
            with _writing(self._folder):
                self._path(self._folder, session_id).unlink(missing_ok=True)

    def entries(self) -> Iterator[Entry]:
        """The sessions that were open when the service stopped.

        A file that cannot be used is renamed to *.bad, with the reason in the service's log.
        """
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")) if self._folder is not None else ():
            try:
                yield _entry(path)
            except (OSError, ValueError, KeyError, TypeError) as error:
                reason = error.errors()[0] if isinstance(error, ValidationError) else error
                _log.error("%s: cannot be restored, and is set aside: %s", path, reason)
                self.set_aside(path.stem)

    def set_aside(self, session_id: str) -> None:
        """Keep a file that cannot be replayed, for somebody to look at."""
        if self._folder is not None:
            path = self._path(self._folder, session_id)
            os.replace(path, path.with_suffix(".bad"))

    @staticmethod
    def _path(folder: Path, session_id: str) -> Path:
        return folder / f"{session_id}{_SUFFIX}"  # ids are the service's own, letters, digits, - and _


def _line(data: dict[str, Any]) -> bytes:
    return json.dumps(data, allow_nan=False).encode() + b"\n"


def _entry(path: Path) -> Entry:
    lines = path.read_bytes().split(b"\n")
    complete = lines[:-1]  # what follows the last newline is a line that a crash cut off
    if not complete:
        raise ValueError("line 1: expected what the episode was begun with, found nothing")
    first = json.loads(complete[0])
    version = llmserve_env.__version__
    if first["version"] != version:
        raise ValueError(f"line 1: expected version {version}, found {first['version']}")
    begun = ResetRequest.model_validate(first["begun"])
    if begun.seed is None:
        raise ValueError("line 1: expected a seed")
    actions = []
    for number, line in enumerate(complete[1:], start=2):
        try:
            actions.append(ServeAction.model_validate_json(line))
        except ValidationError as error:
            raise ValueError(f"line {number}: {error.errors()[0]['msg']}") from error
    return Entry(path.stem, begun, actions)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _log.error("%s: %s", folder, error)
        raise Unavailable("the journal of the service cannot be written") from error
