"""A task: what is served, for whom, what an agent may set, and what counts."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property, lru_cache
from os import PathLike
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from llmserve_env.controls import CONTROLS, SPECS, ActionGrid
from llmserve_env.errors import InputError, as_input_error
from llmserve_env.files import read_toml
from llmserve_env.hardware import load_profile
from llmserve_env.hardware.profile import TIERS, Profile
from llmserve_env.schema import EXTRA_GROUPS, ServeAction
from llmserve_env.workloads import open_workload
from llmserve_env.workloads.generators.servegen import table_end_s
from llmserve_env.workloads.overlay import overlaid
from llmserve_env.workloads.scenario import Scenario, parse_scenario
from llmserve_env.workloads.sources import trace_options
from llmserve_env.workloads.uri import WorkloadURI, parse_uri
from llmserve_env.workloads.workload import Tenant, Workload

_FOLDER = Path(__file__).parent
_MODEL = ConfigDict(extra="forbid", frozen=True)
_Share = Annotated[float, Field(ge=0, le=1)]
_MOST_WINDOWS = 1_000_000
_OFFSETS = 2**31 + 2  # spawn key of the draw of where in a trace an episode begins


class Cell(BaseModel):
    """The engines that serve.

    Attributes:
        profile: hardware and model of every engine: a shipped profile or the path of a .toml file.
        engines: like engines behind one router.
        prefill_engines: of those, how many prefill when prefill and decode are split (default: half).
        max_num_batched_tokens: token budget of an iteration (default: the profile's).
        prefix_cache: whether freed KV blocks can be found again.
    """

    model_config = _MODEL

    profile: str
    engines: int = Field(1, ge=1, le=64)
    prefill_engines: int | None = Field(None, ge=1, le=63)
    max_num_batched_tokens: int | None = Field(None, ge=1)
    prefix_cache: bool = True

    @model_validator(mode="after")
    def _pools(self) -> Cell:
        if self.prefill_engines is not None and self.prefill_engines >= self.engines:
            raise ValueError(f"prefill_engines must leave one of {self.engines} engines to decode")
        return self


class RewardWeights(BaseModel):
    """What a request that met its SLO is worth, in parts that sum to 1; see `llmserve_env.rewards`.

    Attributes:
        goodput: weight of having met it.
        latency: times the headroom that it had under its SLO.
        memory: times the KV headroom of the cell.
        cost: times the share of GPU time left idle.
        quality: times the quality of the weights' precision, from 0 at `acceptable_quality` to 1 at bf16's.
        acceptable_quality: benchmark score relative to bf16 that earns nothing for quality.
    """

    model_config = _MODEL

    goodput: _Share
    latency: _Share
    memory: _Share
    cost: _Share
    quality: _Share
    acceptable_quality: float = Field(ge=0, lt=1)

    @model_validator(mode="after")
    def _sum(self) -> RewardWeights:
        total = self.goodput + self.latency + self.memory + self.cost + self.quality
        if abs(total - 1) > 1e-9:
            raise ValueError(f"the weights must sum to 1, they sum to {total:g}")
        return self


class Task(BaseModel):
    """A task, as its TOML file has it.

    Attributes:
        id: name of the task and of its file.
        title: a line.
        difficulty: easy, medium or hard.
        description: what makes it a task.
        cell: the engines.
        window_s: time between two actions (s).
        horizon_s: length of an episode (s), a whole number of windows.
        start: configuration that the cell starts in, vLLM's defaults.
        controls: for each control that the agent has, the ascending values of its grid. The last one of
            a control that may be None may be inf, as TOML has no None.
        workload: a scenario's table, or a workload URI. A generator's URI is opened with the episode's seed;
            in a trace, and in a table of ServeGen's clients, the seed draws where the episode begins, unless
            the URI has a `start`.
        reward: what counts.
        max_in_flight: an episode terminates when more requests are in flight at a window's end (default:
            never).
        extra_groups: groups of figures and features that it has beyond those of every task
            (`schema.GROUPS`) and those of its controls.
    """

    model_config = _MODEL

    id: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    title: str
    difficulty: str = Field(pattern="^(easy|medium|hard)$")
    description: str
    cell: Cell
    window_s: float = Field(ge=1e-3, le=1e5)
    horizon_s: float = Field(gt=0, le=1e6)
    start: ServeAction = ServeAction()
    controls: dict[str, list[Any]]
    workload: str | dict[str, Any]
    reward: RewardWeights
    max_in_flight: int | None = Field(None, ge=1)
    extra_groups: tuple[str, ...] = ()

    @field_validator("controls")
    @classmethod
    def _without_inf(cls, controls: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """None for inf: inf is no JSON, and a log holds its task."""
        optional = {name for name, spec in SPECS.items() if spec.optional}
        return {
            name: [None if value == math.inf else value for value in values] if name in optional else values
            for name, values in controls.items()
        }

    @field_validator("extra_groups")
    @classmethod
    def _known(cls, groups: tuple[str, ...]) -> tuple[str, ...]:
        for group in groups:
            if group not in EXTRA_GROUPS:
                raise ValueError(f"expected some of {', '.join(EXTRA_GROUPS) or 'no groups'}, found {group}")
        return groups

    @model_serializer(mode="wrap")
    def _without_extras(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As before there were further groups, where it has none: its logs and hashes stay as they are."""
        written: dict[str, Any] = write(self)
        if not self.extra_groups:
            written.pop("extra_groups", None)
        for name, spec in SPECS.items():
            if spec.declared.group in EXTRA_GROUPS and getattr(self.start, name) == spec.default:
                written.get("start", {}).pop(name, None)
        return written

    @model_validator(mode="after")
    def _fits(self) -> Task:
        count = self.horizon_s / self.window_s
        if abs(count - round(count)) > 1e-9 or not 1 <= count <= _MOST_WINDOWS:
            raise ValueError(
                f"horizon_s must be a whole number of windows, 1 to {_MOST_WINDOWS:,}, it is {count:g}"
            )
        for name, tenant in _tenants_of(self.workload):
            for key in ("patience_s", "deadline_s"):
                if tenant.get(key) == math.inf:
                    raise ValueError(f"workload.tenants.{name}.{key}: leave it out for clients who never go")
        for name in self.controls:
            if name not in CONTROLS:
                raise ValueError(f"controls: expected some of {', '.join(CONTROLS)}, found {name}")
        return self

    @property
    def windows(self) -> int:
        """Windows in an episode."""
        return round(self.horizon_s / self.window_s)

    @cached_property
    def groups(self) -> frozenset[str]:
        """Groups of figures and features that an agent sees and a log's digests hold."""
        return self.grid.groups.union(self.extra_groups)

    @cached_property
    def grid(self) -> ActionGrid:
        """The values from which the agent chooses; a control that it does not have stays as it starts."""
        start = self.start.model_dump()
        return ActionGrid({name: self.controls.get(name, [start[name]]) for name in CONTROLS})

    @cached_property
    def profile(self) -> Profile:
        """Hardware and model."""
        return load_profile(self.cell.profile)

    @cached_property
    def scenario(self) -> Scenario | None:
        """The scenario, if that is what the workload is."""
        return None if isinstance(self.workload, str) else parse_scenario(self.workload)

    @cached_property
    def tenants(self) -> tuple[Tenant, ...]:
        """Who sends requests."""
        if self.scenario is not None:
            return self.scenario.tenants
        return self.requests(0).tenants

    @cached_property
    def quality(self) -> tuple[float, ...]:
        """What each precision earns for quality, 0..1, in the order of `profile.TIERS`."""
        floor = self.reward.acceptable_quality
        tiers = [self.profile.tier(name) for name in TIERS]
        return tuple(max((tier.quality - floor) / (1 - floor), 0.0) if tier else 0.0 for tier in tiers)

    def requests(self, seed: int) -> Workload:
        """The workload of the episode with a seed: what arrives before the horizon, which may be nothing."""
        if self.scenario is not None:
            return self.scenario.sample(seed, self.horizon_s)
        assert isinstance(self.workload, str)
        uri = parse_uri(self.workload)
        if uri.scheme == "trace":
            return self._stretch(uri, seed)
        if "duration" not in uri.query and "requests" not in uri.query:
            uri = replace(uri, query={**uri.query, "duration": str(self.horizon_s)})
        if uri.scheme == "servegen" and "start" not in uri.query:
            start_s = _draw_start(seed, table_end_s(uri.path) - self.horizon_s)
            uri = replace(uri, query={**uri.query, "start": repr(start_s)})
        return _before(open_workload(str(uri), seed=seed, silent=True), self.horizon_s)

    def _stretch(self, uri: WorkloadURI, seed: int) -> Workload:
        """An episode's part of a trace."""
        path = Path(uri.path)
        changed_ns = path.stat().st_mtime_ns if path.is_file() else 0
        options = trace_options(uri)
        if options.overlay is not None:
            query = {name: value for name, value in uri.query.items() if name != "overlay"}
            trace = _trace(str(replace(uri, query=query)), changed_ns)
            return overlaid(trace, options.overlay, seed=seed, duration_s=self.horizon_s)
        trace = _trace(str(uri), changed_ns)
        start_s = _draw_start(seed, trace.duration_s - self.horizon_s)
        index = np.flatnonzero((trace.arrival_s >= start_s) & (trace.arrival_s < start_s + self.horizon_s))
        part = trace.take(index)
        return replace(part, arrival_s=part.arrival_s - start_s)


def list_tasks() -> tuple[str, ...]:
    """Ids of the shipped tasks."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


def load_task(source: str | Path, **changes: Any) -> Task:
    """A shipped task by its id, or a task file by its path.

    Args:
        source: id, or path of a .toml file.
        changes: fields of the task to replace: `workload`, `window_s`, `horizon_s`, ...; `profile` and
            `engines` are those of its cell.

    Raises:
        InputError: names the file and field, and what was expected.
    """
    if not isinstance(source, str | PathLike):
        raise InputError(f"expected the id or the file of a task, found {source!r}", field="task_id")
    path = Path(source)
    if path.suffix != ".toml":
        path = _FOLDER / f"{source}.toml"
        if str(source) not in list_tasks():
            raise InputError(f"expected one of {', '.join(list_tasks())}, found '{source}'", field="task_id")
    table = read_toml(path)
    cell = {name: changes.pop(name) for name in ("profile", "engines") if name in changes}
    table = {**table, **changes}
    if cell:
        table["cell"] = {**table.get("cell", {}), **cell}
    try:
        task = Task.model_validate(table)
        task.grid, task.profile, task.tenants, task.quality  # noqa: B018 - what they refuse is refused here
    except ValidationError as error:
        refused = as_input_error(error)
        raise InputError(refused.reason, file=str(path), field=refused.field) from error
    except InputError as error:
        raise InputError(error.reason, file=error.file or str(path), field=error.field) from error
    return task


def _tenants_of(workload: str | dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Tables of a scenario's tenants by name; what is not a table is for the scenario to refuse."""
    tenants = {} if isinstance(workload, str) else workload.get("tenants")
    if not isinstance(tenants, dict):
        return []
    return [(name, table) for name, table in tenants.items() if isinstance(table, dict)]


@lru_cache(maxsize=8)
def _trace(uri: str, changed_ns: int) -> Workload:
    """The trace, read once as long as its file (and with it `changed_ns`) stays the same."""
    return open_workload(uri)


def _draw_start(seed: int, latest_s: float) -> float:
    """Where an episode begins in what lasts longer than it (s)."""
    root = np.random.SeedSequence(seed, spawn_key=(_OFFSETS,))
    return float(np.random.default_rng(root).uniform(0, latest_s)) if latest_s > 0 else 0.0


def _before(workload: Workload, end_s: float) -> Workload:
    if workload.duration_s < end_s:
        return workload
    return workload.take(np.flatnonzero(workload.arrival_s < end_s))
