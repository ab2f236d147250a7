"""The folder of a server's engines while somebody steers them, and the settings that were in it before."""

from __future__ import annotations

import logging
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from llmserve_env.disk.lock import FolderLock
from llmserve_env.errors import InputError
from llmserve_env.files import write_atomic
from llmserve_env.live.servers.engine_settings import SETTINGS_FILE, EngineSettings, write_settings

FOUND_FILE = "settings.found.json"
"""Keeps what was in the settings file, from before it is first written until it is back."""

_log = logging.getLogger(__name__)


class _Found(BaseModel):
    """What was found."""

    model_config = ConfigDict(extra="forbid")

    settings: str | None
    """The settings file's bytes as Latin-1, whatever they were; None where there was none."""


class ControlFolder:
    """A control folder that is steered by this process alone, until it is closed.

    What is found in its settings file comes back with `restore`. Until then it is also in a file beside it:
    what a process that was killed did not bring back, the next one does at once.

    Args:
        path: existing folder.

    Attributes:
        path: as given.
        written: settings that were written last; None where those are in force that were found.

    Raises:
        InputError: it is no folder, somebody else steers it, or its settings cannot be read or brought back.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written: EngineSettings | None = None
        self._changed = False
        if not path.is_dir():
            raise InputError("expected an existing folder", file=str(path), field="control")
        self._lock = FolderLock(path, "another process that steers engines")
        try:
            kept = _kept(path)
            if kept is not None:
                _bring_back(path, kept)
                _log.warning("%s: brought back the settings that a process had found which was killed", path)
            there = _content(path / SETTINGS_FILE)
            self._found = _Found(settings=None if there is None else there.decode("latin-1"))
        except BaseException:
            self.close()
            raise

    def write(self, settings: EngineSettings) -> None:
        """Set what the engines shall keep to; nothing is done where they do.

        Raises:
            InputError: the folder cannot be written.
        """
        if settings == self.written:
            return
        kept = self.path / FOUND_FILE
        if not self._changed or not kept.exists():  # somebody may have made the folder anew
            write_atomic(kept, self._found.model_dump_json())
            self._changed = True
        write_settings(self.path, settings)
        self.written = settings

    def restore(self) -> None:
        """Bring back the settings that were found.

        Raises:
            InputError: the folder cannot be written.
        """
        if self._changed:
            _bring_back(self.path, self._found)
            self.written, self._changed = None, False

    def close(self) -> None:
        """Let others steer."""
        self._lock.close()


def _kept(path: Path) -> _Found | None:
    """What a process that was killed had found; None where there was none."""
    content = _content(path / FOUND_FILE)
    try:
        return None if content is None else _Found.model_validate_json(content)
    except ValidationError as error:
        raise InputError(
            "expected the settings that were found; once settings.json is as it shall be, remove this file",
            file=str(path / FOUND_FILE),
        ) from error


def _bring_back(path: Path, found: _Found) -> None:
    settings, kept = path / SETTINGS_FILE, path / FOUND_FILE
    try:
        if found.settings is None:
            settings.unlink(missing_ok=True)
        else:
            write_atomic(settings, found.settings.encode("latin-1"))
        kept.unlink(missing_ok=True)  # only now
    except OSError as error:
        raise InputError(f"cannot be restored: {error.strerror or error}", file=str(settings)) from error


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", file=str(path)) from error
