"""What may change inside a running engine, and how it gets there: JSON files in a folder of the server.

`settings.json` is written by whoever steers, and read by every engine of the server (`vllm_scheduler`);
without it engines run as they were started. `engine-N.json` is engine N's answer: what is in force there.
Both are replaced whole. pydantic is all that this needs: it is imported in vLLM's environment, too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmserve_env.errors import InputError
from llmserve_env.files import write_atomic
from llmserve_env.schema import ServeAction, bounds

SETTINGS_FILE = "settings.json"

SCHEDULER_VERSIONS = ("0.32.0",)
"""Of vLLM, whose scheduler `vllm_scheduler` was tried with."""

CONTROL_KEY = "llmserve_control"
"""Names the folder in vLLM's --additional-config."""


class EngineSettings(BaseModel):
    """The fields of a `ServeAction` that an engine takes while it serves; None for as it was started."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    batch_cap: int | None = Field(None, **bounds("batch_cap"))
    """No admission while as many sequences run; lowering it drains, running ones go on."""
    kv_budget_fraction: float | None = Field(None, **bounds("kv_budget_fraction"))
    """No admission that would take the share of KV blocks held by running requests above it. Running ones
    may outgrow it; one that runs alone may hold all.
    """
    speculation_depth: int | None = Field(None, **bounds("speculation_depth"))
    """Draft tokens a step, at most."""

    @classmethod
    def of(cls, action: ServeAction) -> EngineSettings:
        """Those of an action."""
        return cls(**action.model_dump(include=set(cls.model_fields)))

    def within(
        self, started: AppliedSettings, *, fixed_depth: bool
    ) -> tuple[AppliedSettings, dict[str, str]]:
        """What an engine can do of this, and why not the rest, by field.

        Args:
            started: what the engine was started with, above which it cannot go.
            fixed_depth: whether its speculation depth cannot change.
        """
        applied: dict[str, Any] = {}
        not_applied: dict[str, str] = {}
        for name, most in started:
            value = getattr(self, name)
            fixed = fixed_depth and name == "speculation_depth"
            applied[name] = most if value is None or fixed else min(value, most)
            if value is None or value == applied[name]:
                continue
            not_applied[name] = (
                f"fixed at {most:g} without num_speculative_tokens_per_batch_size, or with data parallelism"
                if fixed
                else f"the engine was started with {most:g}"
            )
        return AppliedSettings(**applied), not_applied


class AppliedSettings(BaseModel):
    """What is in force in an engine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_cap: int
    kv_budget_fraction: float
    speculation_depth: int


class EngineStatus(BaseModel):
    """What an engine has made of its settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    engine: int
    """Its index within the server."""
    pid: int
    """Its process."""
    vllm_version: str
    started: AppliedSettings
    """What it was started with: what holds without settings."""
    fixed_depth: bool
    """Whether its speculation depth cannot change."""
    asked: EngineSettings
    """The last good settings that it read."""
    applied: AppliedSettings
    """What its next iteration keeps to."""
    not_applied: dict[str, str]
    """Fields of `asked` that are not applied as they stand, with the reason."""
    refused: str | None = None
    """Why the settings file, as it is now, cannot be used; the last good settings stay."""


def control_folder(additional_config: Any) -> Path:
    """The folder that a server was started with.

    Args:
        additional_config: additional config of vLLM, as given.

    Raises:
        InputError: none was given, or it is no folder.
    """
    folder = additional_config.get(CONTROL_KEY) if isinstance(additional_config, dict) else None
    if not isinstance(folder, str):
        raise InputError(
            f"""LiveScheduler needs a folder: --additional-config '{{"{CONTROL_KEY}": "FOLDER"}}'""",
            field=CONTROL_KEY,
        )
    if not Path(folder).is_dir():
        raise InputError("expected an existing folder", file=folder, field=CONTROL_KEY)
    return Path(folder)


def write_settings(folder: Path | str, settings: EngineSettings) -> None:
    """Set what the engines of a server shall keep to.

    Raises:
        InputError: the folder cannot be written.
    """
    write_atomic(Path(folder) / SETTINGS_FILE, settings.model_dump_json(exclude_none=True))


def read_settings(folder: Path | str) -> EngineSettings:
    """What is set; nothing where there is no settings file.

    Raises:
        InputError: the file cannot be read, is no JSON, or has an unknown field or a value out of range.
    """
    path = Path(folder) / SETTINGS_FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return EngineSettings()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", file=str(path)) from error
    settings: EngineSettings = _parse(EngineSettings, content, path)
    return settings


def read_statuses(folder: Path | str) -> list[EngineStatus]:
    """What the engines of a server answered, by index; nothing before the first has started.

    Raises:
        InputError: an answer cannot be read.
    """
    try:
        found = [(path, path.read_bytes()) for path in Path(folder).glob("engine-*.json")]
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", file=str(folder)) from error
    return sorted((_parse(EngineStatus, content, path) for path, content in found), key=lambda s: s.engine)


def write_status(folder: Path | str, status: EngineStatus) -> None:
    """Answer, as an engine.

    Raises:
        InputError: the folder cannot be written.
    """
    write_atomic(Path(folder) / f"engine-{status.engine}.json", status.model_dump_json(indent=1))


def _parse(model: type[BaseModel], content: bytes, path: Path) -> Any:
    try:
        return model.model_validate(json.loads(content), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or None
        raise InputError(f"{first['msg']}, found {first['input']!r}", file=str(path), field=field) from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or nested without end
        raise InputError(f"expected a JSON object: {error}", file=str(path)) from error
