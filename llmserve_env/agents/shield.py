"""A shield around an agent: fixed rules that override it where it would do harm, and a log of that."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from llmserve_env.controls import CONTROLS, SPECS, to_action
from llmserve_env.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from llmserve_env.agents.agent import Agent
    from llmserve_env.tasks import Task

PATH = Path(__file__).parent / "data" / "shield.toml"

RULES = ("panic", "rescue", "veto")
"""In the order of precedence."""

_MODEL = ConfigDict(extra="forbid", frozen=True)


def _safe(action: dict[str, Any]) -> dict[str, Any]:
    """Values of controls that restart nothing."""
    for name, value in action.items():
        if name not in SPECS or SPECS[name].declared.restarts:
            raise ValueError(f"{name}: expected a control whose change restarts no engine")
        SPECS[name].checked(value)
    return action


SafeAction = Annotated[dict[str, Any], AfterValidator(_safe)]
"""Values by control. What is left out stays as it is in force, as what restarts engines must."""


class ModeSettings(BaseModel):
    """How a mode begins and ends.

    Attributes:
        windows_enter: windows in a row that its cause must last.
        windows_leave: windows in a row that its end must last.
        most_windows: after which it stands down whether it has helped or not ...
        rest_windows: ... for so many windows.
        action: what it sets.
    """

    model_config = _MODEL

    windows_enter: int = Field(ge=1)
    windows_leave: int = Field(ge=1)
    most_windows: int = Field(ge=1)
    rest_windows: int = Field(ge=0)
    action: SafeAction


class RescueSettings(ModeSettings):
    """RESCUE: queue or memory past a limit. Until both have fallen below the lower ones.

    Attributes:
        waiting_enter: waiting requests (per engine).
        waiting_leave: the lower limit (per engine).
        kv_enter: share of KV blocks held.
        kv_leave: the lower limit.
    """

    waiting_enter: float = Field(gt=0)
    waiting_leave: float = Field(ge=0)
    kv_enter: float = Field(gt=0, le=1)
    kv_leave: float = Field(ge=0, le=1)


class PanicSettings(ModeSettings):
    """PANIC: SLO compliance over a moving window has collapsed. Shed and drain until it is back.

    Attributes:
        windows: length of the moving window (windows).
        least_requests: requests that must have ended in it.
        compliance_enter: share of them within the SLO, below which it begins.
        compliance_leave: share from which on it ends.
        admit_share: admission rate as a share of the completions in the moving window, where it is granted.
    """

    windows: int = Field(ge=1)
    least_requests: int = Field(ge=1)
    compliance_enter: float = Field(ge=0, le=1)
    compliance_leave: float = Field(ge=0, le=1)
    admit_share: float = Field(gt=0)


class VetoSettings(BaseModel):
    """VETO: no cut of capacity and no restart while the load rises.

    Attributes:
        windows: over which a rise is measured.
        rise: growth of the requests in flight that is one, as a share.
        release: share of that growth below which it is over.
        least_in_flight: requests in flight below which nothing is a rise (per engine).
        slow: median token gap, as a share of the tightest TPOT SLO, that excuses a cut of capacity.
        late: age of the oldest waiting request, as a share of the tightest TTFT SLO, that excuses a cut of
            the admission rate.
    """

    model_config = _MODEL

    windows: int = Field(ge=1)
    rise: float = Field(gt=0)
    release: float = Field(ge=0, le=1)
    least_in_flight: float = Field(ge=0)
    slow: float = Field(gt=0)
    late: float = Field(gt=0)


class ShieldSettings(BaseModel):
    """All thresholds; those of the package are in data/shield.toml, each with its reason.

    Attributes:
        rescue: queue or memory past a limit.
        panic: SLO compliance collapsed.
        veto: a cut while the load rises.
    """

    model_config = _MODEL

    rescue: RescueSettings
    panic: PanicSettings
    veto: VetoSettings


@lru_cache(maxsize=1)
def shield_settings() -> ShieldSettings:
    """The thresholds of data/shield.toml."""
    return ShieldSettings.model_validate(tomllib.loads(PATH.read_text(encoding="utf-8")))


class Shield:
    """Plays an agent's actions, but for those that a rule overrides.

    In every window the agent is asked, so that its memory goes on; then PANIC, RESCUE, VETO, the first whose
    cause is there. Rules see WINDOW records only, and each episode by itself.

    Args:
        agent: is shielded.
        settings: thresholds (default: data/shield.toml).
        log_limit: interventions of an episode that are kept, the first ones.
        name: under which results are reported (default: "shielded:" and the agent's).

    Attributes:
        log: for each episode its interventions, JSON-ready: `window` (index of the one that the action is
            for), `seed`, `rule`, `reason`, `proposed` and `applied` (the controls in which the two differ).
        interventions: int64[n, 3], how many by rule, in the order of RULES; those beyond `log_limit`, too.
        windows: int64[n], for how many the agent was asked.
        in_force: ACTION[n], what the last windows were served under; None before the first action, which no
            rule changes. To be set where something else than the last action came into force.
    """

    def __init__(
        self,
        agent: Agent,
        settings: ShieldSettings | None = None,
        *,
        log_limit: int = 1000,
        name: str | None = None,
    ) -> None:
        self.name = name or f"shielded:{agent.name}"
        self.agent = agent
        self._settings = settings or shield_settings()
        self._limit = log_limit
        self._state: _State | None = None
        self.log: list[list[dict[str, Any]]] = []
        self.interventions = np.zeros((0, len(RULES)), np.int64)
        self.windows = np.zeros(0, np.int64)
        self.in_force: NDArray[np.void] | None = None

    @property
    def autonomy_rate(self) -> NDArray[np.float64]:
        """float64[n], share of an episode's windows in which the agent's own action stood (1 before any)."""
        rate: NDArray[np.float64] = 1.0 - self.interventions.sum(axis=1) / np.maximum(self.windows, 1)
        return rate

    def reset(self, task: Task, seeds: Sequence[int]) -> None:
        """Begin episodes, with an empty log."""
        self.agent.reset(task, seeds)
        self._seeds = [int(seed) for seed in seeds]
        self._state = _State(task, self._settings, len(seeds))
        self.in_force = None
        self.log = [[] for _ in seeds]
        self.interventions = np.zeros((len(seeds), len(RULES)), np.int64)
        self.windows = np.zeros(len(seeds), np.int64)

    def act(self, observations: NDArray[np.float32], windows: NDArray[np.void]) -> NDArray[np.void]:
        """ACTION[n], the agent's or a rule's.

        Raises:
            InputError: no episode has begun.
        """
        if self._state is None:
            raise InputError("call reset before act")
        proposed = self.agent.act(observations, windows)
        state = self._state
        applied = proposed.copy()
        going = np.ones(len(windows), bool)
        if self.in_force is not None:
            going = state.see(windows)
            for rule, changed in (
                ("veto", state.vetoed(proposed, self.in_force)),
                ("rescue", state.rescued(self.in_force)),
                ("panic", state.panicked(self.in_force)),
            ):
                rows = going & state.on[rule]
                applied[rows] = changed[rows]
            self._note(proposed, applied, going)
        self.windows += going
        self.in_force = applied.copy()
        return applied

    def _note(self, proposed: NDArray[np.void], applied: NDArray[np.void], going: NDArray[np.bool_]) -> None:
        """Log the episodes in which the agent's action does not stand."""
        assert self._state is not None
        for i in np.flatnonzero((proposed != applied) & going).tolist():
            rule = next(name for name in RULES if self._state.on[name][i])
            self.interventions[i, RULES.index(rule)] += 1
            if len(self.log[i]) >= self._limit:
                continue
            names = [name for name in CONTROLS if proposed[name][i] != applied[name][i]]
            self.log[i].append(
                {
                    "window": int(self.windows[i]),
                    "seed": self._seeds[i],
                    "rule": rule,
                    "reason": self._state.reason(rule, i),
                    "proposed": _values(proposed[i], names),
                    "applied": _values(applied[i], names),
                }
            )


class _State:
    """What the rules remember of n episodes.

    Attributes:
        on: bool[n] by rule, whether it speaks; of the veto, whether the load rises.
    """

    def __init__(self, task: Task, settings: ShieldSettings, episodes: int) -> None:
        self._settings, self._task, self._engines = settings, task, task.cell.engines
        self._granted = task.grid.granted
        self._ends = {name: task.grid.ends(name) for name in self._granted}
        self._ttft_s = min(tenant.ttft_slo_s for tenant in task.tenants)
        self._tpot_s = min(tenant.tpot_slo_s for tenant in task.tenants)
        self._end_s = np.zeros(episodes)
        self._rescue = _Mode(settings.rescue, episodes)
        self._panic = _Mode(settings.panic, episodes)
        span = settings.panic.windows
        self._sums = {name: np.zeros((span, episodes), np.int64) for name in ("ended", "in_slo", "completed")}
        self._in_flight = np.zeros((settings.veto.windows + 1, episodes))
        self._seen = np.zeros(episodes, np.int64)
        self._last: NDArray[np.void] | None = None
        self.on = {name: np.zeros(episodes, bool) for name in RULES}

    def see(self, windows: NDArray[np.void]) -> NDArray[np.bool_]:
        """Update the rules with the last window; returns bool[n], the episodes that are not over."""
        going: NDArray[np.bool_] = windows["end_s"] > self._end_s
        self._end_s = windows["end_s"].copy()
        self._last = windows.copy()
        self._seen += going
        ended = windows["completed"] + windows["failed"] + windows["cancelled"]
        values = {
            "ended": ended,
            "in_slo": windows["tenant_in_slo"].sum(axis=1),
            "completed": windows["completed"],
        }
        for name, value in values.items():
            _push(self._sums[name], value, going)
        _push(self._in_flight, windows["in_flight"] / self._engines, going)
        self._see_rescue(windows, going)
        self._see_panic(going)
        self._see_rise(going)
        return going

    def rescued(self, in_force: NDArray[np.void]) -> NDArray[np.void]:
        """ACTION[n], the safe action."""
        return self._safe(in_force, self._settings.rescue.action)

    def panicked(self, in_force: NDArray[np.void]) -> NDArray[np.void]:
        """ACTION[n], what sheds and drains."""
        actions = self._safe(in_force, self._settings.panic.action)
        if "admission_rate" in self._granted:
            time_s = np.maximum(np.minimum(self._seen, self._settings.panic.windows), 1) * self._task.window_s
            rate = self._settings.panic.admit_share * self._sums["completed"].sum(axis=0) / time_s
            actions["admission_rate"] = np.clip(rate, *self._ends["admission_rate"])
        return actions

    def vetoed(self, proposed: NDArray[np.void], in_force: NDArray[np.void]) -> NDArray[np.void]:
        """ACTION[n], what was proposed without its cuts and restarts."""
        assert self._last is not None
        veto, last, actions = self._settings.veto, self._last, proposed.copy()
        slow = np.nan_to_num(last["p50_gap_s"]) >= veto.slow * self._tpot_s
        late = last["oldest_wait_s"] >= veto.late * self._ttft_s
        for name in self._granted:
            declared = SPECS[name].declared
            if declared.limits_capacity:
                cut = (proposed[name] < in_force[name]) & ~slow
                if name == "admission_rate":
                    cut &= ~late
            elif declared.restarts:
                cut = proposed[name] != in_force[name]
            else:
                continue
            actions[name] = np.where(cut, in_force[name], proposed[name])
        return actions

    def reason(self, rule: str, i: int) -> str:
        """Why a rule speaks in an episode, in numbers."""
        assert self._last is not None
        last = self._last[i]
        if rule == "rescue":
            waiting = last["waiting"] / self._engines
            return f"{waiting:.0f} waiting per engine, {last['kv_occupancy']:.0%} of KV blocks held"
        if rule == "panic":
            ended, in_slo = (int(self._sums[name][:, i].sum()) for name in ("ended", "in_slo"))
            span = self._settings.panic.windows
            return f"{in_slo} of {ended} requests within their SLO in the last {span} windows"
        now, before = self._in_flight[0, i], self._in_flight[-1, i]
        return f"cut while requests in flight per engine rose from {before:.0f} to {now:.0f}"

    def _see_rescue(self, windows: NDArray[np.void], going: NDArray[np.bool_]) -> None:
        limits = self._settings.rescue
        waiting, kv = windows["waiting"] / self._engines, windows["kv_occupancy"]
        enter = (waiting >= limits.waiting_enter) | (kv >= limits.kv_enter)
        leave = (waiting < limits.waiting_leave) & (kv < limits.kv_leave)
        self.on["rescue"] = self._rescue.see(enter, leave, going)

    def _see_panic(self, going: NDArray[np.bool_]) -> None:
        limits = self._settings.panic
        ended, in_slo = self._sums["ended"].sum(axis=0), self._sums["in_slo"].sum(axis=0)
        enter = (in_slo < limits.compliance_enter * ended) & (ended >= limits.least_requests)
        leave = in_slo >= limits.compliance_leave * ended
        self.on["panic"] = self._panic.see(enter, leave, going)

    def _see_rise(self, going: NDArray[np.bool_]) -> None:
        veto = self._settings.veto
        now, before = self._in_flight[0], self._in_flight[-1]
        known = (self._seen > veto.windows) & (now >= veto.least_in_flight)
        begins = known & (now >= (1 + veto.rise) * before) & (now > before)
        goes_on = self.on["veto"] & known & (now >= (1 + veto.rise * veto.release) * before)
        self.on["veto"] = np.where(going, begins | goes_on, self.on["veto"])

    def _safe(self, in_force: NDArray[np.void], action: SafeAction) -> NDArray[np.void]:
        actions = in_force.copy()
        for name, value in action.items():
            if name in self._granted:
                low, high = self._ends[name]
                actions[name] = min(max(SPECS[name].checked(value), low), high)
        return actions


class _Mode:
    """Whether a mode is on in each of n episodes, and for how long its cause and its end have lasted."""

    def __init__(self, settings: ModeSettings, episodes: int) -> None:
        self._settings = settings
        self._on = np.zeros(episodes, bool)
        self._caused, self._calm, self._lasted, self._rest = (np.zeros(episodes, np.int64) for _ in range(4))

    def see(
        self, enter: NDArray[np.bool_], leave: NDArray[np.bool_], going: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """bool[n], whether it is on after a window; episodes that are over stay as they are."""
        settings = self._settings
        caused = np.where(enter, self._caused + 1, 0)
        calm = np.where(leave, self._calm + 1, 0)
        rest = np.maximum(self._rest - 1, 0)
        lasted = np.where(self._on, self._lasted + 1, 0)
        tired = self._on & (lasted >= settings.most_windows)
        ends = tired | (calm >= settings.windows_leave)
        begins = (caused >= settings.windows_enter) & (rest == 0) & ~self._on
        on = begins | (self._on & ~ends)
        rest = np.where(tired, settings.rest_windows, rest)
        for name, value in (
            ("_caused", caused),
            ("_calm", calm),
            ("_rest", rest),
            ("_lasted", lasted),
            ("_on", on),
        ):
            setattr(self, name, np.where(going, value, getattr(self, name)))
        return self._on.copy()


def _push(ring: NDArray[Any], value: NDArray[Any], going: NDArray[np.bool_]) -> None:
    """Put a value in front and let the oldest go, in the episodes that are not over."""
    ring[:, going] = np.roll(ring[:, going], 1, axis=0)
    ring[0, going] = value[going]


def _values(row: NDArray[np.void], names: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = to_action(row).model_dump(mode="json", include=set(names))
    return values
