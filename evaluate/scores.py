"""What episodes came to, in a file for each agent and setting."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

import llmserve_env
from evaluate.jobs import Setting
from evaluate.llm import Asked, describe_llm
from llmserve_env.agents.find import policy_folder
from llmserve_env.agents.llm import LLM
from llmserve_env.agents.policy import CONFIG, WEIGHTS
from llmserve_env.errors import InputError, as_input_error
from llmserve_env.files import write_atomic
from llmserve_env.play import Played
from llmserve_env.report.provenance import made_by
from llmserve_env.rewards import COMPONENTS
from llmserve_env.tasks import Task

REQUESTS = ("arrived", "completed", "in_slo", "failed")


class Scores(BaseModel):
    """An agent's episodes in a setting; what is listed has the order of `seeds`.

    Attributes:
        agent: under which it is reported.
        plays: as `find_agent` takes it.
        policy: SHA-256 of a trained policy's two files, None for another agent.
        setting: what it played.
        seeds_of: "evaluation", or "other": such scores are no results to report.
        package_version: that played.
        made_by: command, commit and machine that wrote the file last.
        seeds: ascending.
        scores: the grades.
        components: parts of each score by name.
        requests: of each episode, by what became of them.
        llm: how a language model was asked (`describe_llm`), None for another agent.
        usage: what asking it came to, by seed.
    """

    model_config = ConfigDict(extra="forbid")

    agent: str
    plays: str
    policy: str | None
    setting: Setting
    seeds_of: Literal["evaluation", "other"]
    package_version: str
    made_by: dict[str, str] = {}
    seeds: list[int] = []
    scores: list[float] = []
    components: dict[str, list[float]] = {name: [] for name in COMPONENTS}
    requests: dict[str, list[int]] = {name: [] for name in REQUESTS}
    llm: dict[str, Any] | None = None
    usage: dict[str, dict[str, Any]] = {}

    @model_validator(mode="after")
    def _complete(self) -> Scores:
        columns: list[list[Any]] = [self.scores, *self.components.values(), *self.requests.values()]
        if any(len(column) != len(self.seeds) for column in columns):
            raise ValueError("expected as many entries in every list as seeds")
        return self

    def of(self, seeds: list[int]) -> NDArray[np.float64]:
        """float64[seeds], scores in the order asked for; all must be there."""
        place = {seed: i for i, seed in enumerate(self.seeds)}
        return np.array([self.scores[place[seed]] for seed in seeds])

    def add(self, seeds: tuple[int, ...], played: Played) -> None:
        """Take in episodes, in place of those of the same seeds."""
        rows: dict[int, tuple[Any, ...]] = dict(zip(self.seeds, self._rows(), strict=True))
        found = zip(
            played.scores.tolist(), *played.components.T.tolist(), *played.requests.T.tolist(), strict=True
        )
        rows.update(zip(seeds, found, strict=True))
        self.seeds = sorted(rows)
        columns = [list(column) for column in zip(*(rows[seed] for seed in self.seeds), strict=True)]
        self.scores = columns[0]
        self.components = dict(zip(COMPONENTS, columns[1 : 1 + len(COMPONENTS)], strict=True))
        self.requests = dict(zip(REQUESTS, columns[1 + len(COMPONENTS) :], strict=True))
        if isinstance(played, Asked):
            self.usage |= dict(zip(map(str, seeds), played.usage, strict=True))

    def save(self, path: Path) -> None:
        """Write the file, a line for each field."""
        self.made_by = made_by()
        lines = [
            f"{json.dumps(name)}: {json.dumps(value)}" for name, value in self.model_dump(mode="json").items()
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, "{\n" + ",\n".join(lines) + "\n}\n")

    def _rows(self) -> Any:
        return zip(self.scores, *self.components.values(), *self.requests.values(), strict=True)


def read_scores(path: Path) -> Scores:
    """Read a file of scores.

    Raises:
        InputError: it cannot be read, or is none.
    """
    try:
        return Scores.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=str(path)) from error
    except ValidationError as error:
        raise as_input_error(error, str(path)) from error


def begin_scores(
    path: Path, label: str, plays: str, setting: Setting, task: Task, *, official: bool
) -> Scores:
    """What the file holds already, or nothing yet.

    Raises:
        InputError: the file holds scores of another agent, setting or version.
    """
    new = Scores(
        agent=label,
        plays=plays,
        policy=_digest(plays, task),
        setting=setting,
        seeds_of="evaluation" if official else "other",
        package_version=llmserve_env.__version__,
        llm=describe_llm(plays, task) if plays.startswith(LLM) else None,
    )
    if not path.exists():
        return new
    before = read_scores(path)
    for field in ("agent", "plays", "policy", "setting", "seeds_of", "package_version", "llm"):
        found, expected = getattr(before, field), getattr(new, field)
        if found != expected:
            raise InputError(
                f"was played with {found}, not {expected}: remove it or give another --out",
                file=str(path),
                field=field,
            )
    return before


def setting_name(setting: Setting) -> str:
    """A setting in the names of files: no two have the same."""
    name = Path(setting.task).stem
    if setting.load != 1.0:
        name += f"@load={setting.load:g}"
    if setting.profile is not None:
        name += f"@profile={profile_name(setting.profile)}"
    if setting.workload is not None:
        name += f"@workload={hashlib.sha256(setting.workload.encode()).hexdigest()[:8]}"
    return name


def profile_name(profile: str) -> str:
    """A profile by its name, whether that or a file was given."""
    return Path(profile).name.removesuffix(".toml")


def scores_path(out: Path, label: str, setting: Setting, *, official: bool) -> Path:
    """Where an agent's scores in a setting lie: OUT/SETTING/AGENT.json."""
    name = setting_name(setting) + ("" if official else "@other-seeds")
    return out / name / (label.replace(":", "-").replace("/", "-") + ".json")


def _digest(plays: str, task: Task) -> str | None:
    folder = policy_folder(plays, task)
    return None if folder is None else policy_digest(folder)


def policy_digest(folder: Path) -> str:
    """SHA-256 of a trained policy's two files."""
    return hashlib.sha256((folder / CONFIG).read_bytes() + (folder / WEIGHTS).read_bytes()).hexdigest()
