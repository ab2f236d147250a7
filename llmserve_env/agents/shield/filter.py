"""The shield's rules as a pure filter: from what was proposed and seen to what is set, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llmserve_env.controls import SPECS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmserve_env.agents.shield.settings import ModeSettings, SafeAction, ShieldSettings
    from llmserve_env.tasks import Task

RULES = ("panic", "rescue", "veto")
"""In the order of precedence."""


@dataclass(frozen=True)
class ModeState:
    """Whether a mode is on in each of n episodes, and for how long its cause and its end have lasted.

    Attributes:
        on: bool[n].
        caused: int64[n], windows in a row with its cause.
        calm: int64[n], windows in a row with its end.
        lasted: int64[n], windows since it began.
        rest: int64[n], windows for which it stands down.
    """

    on: NDArray[np.bool_]
    caused: NDArray[np.int64]
    calm: NDArray[np.int64]
    lasted: NDArray[np.int64]
    rest: NDArray[np.int64]

    @classmethod
    def begin(cls, episodes: int) -> ModeState:
        """Off in all episodes."""
        counts = (np.zeros(episodes, np.int64) for _ in range(4))
        return cls(np.zeros(episodes, bool), *counts)

    def after(
        self,
        settings: ModeSettings,
        enter: NDArray[np.bool_],
        leave: NDArray[np.bool_],
        going: NDArray[np.bool_],
    ) -> ModeState:
        """After a window.

        Args:
            settings: settings of the mode.
            enter: bool[n], whether its cause is there.
            leave: bool[n], whether its end is.
            going: bool[n], the episodes that are not over; the others stay as they are.
        """
        caused = np.where(enter, self.caused + 1, 0)
        calm = np.where(leave, self.calm + 1, 0)
        rest = np.maximum(self.rest - 1, 0)
        lasted = np.where(self.on, self.lasted + 1, 0)
        tired = self.on & (lasted >= settings.most_windows)
        ends = tired | (calm >= settings.windows_leave)
        begins = (caused >= settings.windows_enter) & (rest == 0) & ~self.on
        on = begins | (self.on & ~ends)
        rest = np.where(tired, settings.rest_windows, rest)
        return ModeState(
            on=np.where(going, on, self.on),
            caused=np.where(going, caused, self.caused),
            calm=np.where(going, calm, self.calm),
            lasted=np.where(going, lasted, self.lasted),
            rest=np.where(going, rest, self.rest),
        )


@dataclass(frozen=True)
class ShieldState:
    """What the rules know of n episodes.

    Attributes:
        begun: whether a first action was set, which no rule changes.
        end_s: float64[n], end of the last window (s).
        seen: int64[n], windows since the first action.
        ended: int64[k, n], requests that ended in the last windows, the newest first.
        in_slo: int64[k, n], of those within their SLO.
        completed: int64[k, n], of those completed.
        in_flight: float64[m, n], requests in flight per engine, the newest first.
        rescue: the mode.
        panic: the mode.
        rising: bool[n], whether the load rises: then the veto speaks.
    """

    begun: bool
    end_s: NDArray[np.float64]
    seen: NDArray[np.int64]
    ended: NDArray[np.int64]
    in_slo: NDArray[np.int64]
    completed: NDArray[np.int64]
    in_flight: NDArray[np.float64]
    rescue: ModeState
    panic: ModeState
    rising: NDArray[np.bool_]


@dataclass(frozen=True)
class Filtered:
    """What comes of proposed actions.

    Attributes:
        state: state for the next window.
        actions: ACTION[n], what is to be set.
        going: bool[n], the episodes that are not over.
        rules: the rule (one of RULES) that changed each episode's action, None where it stands.
        reasons: why, in numbers; None where it stands.
    """

    state: ShieldState
    actions: NDArray[np.void]
    going: NDArray[np.bool_]
    rules: list[str | None]
    reasons: list[str | None]


class ShieldFilter:
    """PANIC, RESCUE, VETO, the first whose cause is there. It remembers nothing: the state is passed on.

    Rules see WINDOW records only, and each episode by itself.

    Args:
        task: says what is granted and promised.
        settings: thresholds.
    """

    def __init__(self, task: Task, settings: ShieldSettings) -> None:
        self._settings, self._engines, self._window_s = settings, task.cell.engines, task.window_s
        self._granted = task.grid.granted
        self._ends = {name: task.grid.ends(name) for name in self._granted}
        self._ttft_s = min(tenant.ttft_slo_s for tenant in task.tenants)
        self._tpot_s = min(tenant.tpot_slo_s for tenant in task.tenants)

    def begin(self, episodes: int) -> ShieldState:
        """The state before the first action of n episodes."""
        span, lookback = self._settings.panic.windows, self._settings.veto.windows + 1
        return ShieldState(
            begun=False,
            end_s=np.zeros(episodes),
            seen=np.zeros(episodes, np.int64),
            ended=np.zeros((span, episodes), np.int64),
            in_slo=np.zeros((span, episodes), np.int64),
            completed=np.zeros((span, episodes), np.int64),
            in_flight=np.zeros((lookback, episodes)),
            rescue=ModeState.begin(episodes),
            panic=ModeState.begin(episodes),
            rising=np.zeros(episodes, bool),
        )

    def filter(
        self,
        state: ShieldState,
        proposed: NDArray[np.void],
        in_force: NDArray[np.void],
        windows: NDArray[np.void],
    ) -> Filtered:
        """What to set in the next window.

        Args:
            state: after the last call; of `begin` at first.
            proposed: ACTION[n].
            in_force: ACTION[n], what the last window was served under.
            windows: WINDOW[n], the last one.
        """
        count = len(windows)
        if not state.begun:
            nobody: list[str | None] = [None] * count
            begun = replace(state, begun=True)
            return Filtered(begun, proposed.copy(), np.ones(count, bool), nobody, nobody)
        state, going = self._seen(state, windows)
        actions = proposed.copy()
        on = {"panic": state.panic.on, "rescue": state.rescue.on, "veto": state.rising}
        for rule, changed in (
            ("veto", self._vetoed(windows, proposed, in_force)),
            ("rescue", self._safe(in_force, self._settings.rescue.action)),
            ("panic", self._panicked(state, in_force)),
        ):
            rows = going & on[rule]
            actions[rows] = changed[rows]
        rules: list[str | None] = [None] * count
        reasons: list[str | None] = [None] * count
        for i in np.flatnonzero((proposed != actions) & going).tolist():
            rule = next(name for name in RULES if on[name][i])
            rules[i], reasons[i] = rule, self._reason(rule, state, windows[i], i)
        return Filtered(state, actions, going, rules, reasons)

    def _seen(self, state: ShieldState, windows: NDArray[np.void]) -> tuple[ShieldState, NDArray[np.bool_]]:
        """The state after a window; bool[n], the episodes that are not over."""
        going: NDArray[np.bool_] = windows["end_s"] > state.end_s
        ended = windows["completed"] + windows["failed"] + windows["cancelled"]
        state = replace(
            state,
            end_s=windows["end_s"].copy(),
            seen=state.seen + going,
            ended=_pushed(state.ended, ended, going),
            in_slo=_pushed(state.in_slo, windows["tenant_in_slo"].sum(axis=1), going),
            completed=_pushed(state.completed, windows["completed"], going),
            in_flight=_pushed(state.in_flight, windows["in_flight"] / self._engines, going),
        )
        return (
            replace(
                state,
                rescue=self._rescue(state, windows, going),
                panic=self._panic(state, going),
                rising=self._rising(state, going),
            ),
            going,
        )

    def _rescue(self, state: ShieldState, windows: NDArray[np.void], going: NDArray[np.bool_]) -> ModeState:
        limits = self._settings.rescue
        waiting, kv = windows["waiting"] / self._engines, windows["kv_occupancy"]
        enter = (waiting >= limits.waiting_enter) | (kv >= limits.kv_enter)
        leave = (waiting < limits.waiting_leave) & (kv < limits.kv_leave)
        return state.rescue.after(limits, enter, leave, going)

    def _panic(self, state: ShieldState, going: NDArray[np.bool_]) -> ModeState:
        limits = self._settings.panic
        ended, in_slo = state.ended.sum(axis=0), state.in_slo.sum(axis=0)
        enter = (in_slo < limits.compliance_enter * ended) & (ended >= limits.least_requests)
        leave = in_slo >= limits.compliance_leave * ended
        return state.panic.after(limits, enter, leave, going)

    def _rising(self, state: ShieldState, going: NDArray[np.bool_]) -> NDArray[np.bool_]:
        veto = self._settings.veto
        now, before = state.in_flight[0], state.in_flight[-1]
        known = (state.seen > veto.windows) & (now >= veto.least_in_flight)
        begins = known & (now >= (1 + veto.rise) * before) & (now > before)
        goes_on = state.rising & known & (now >= (1 + veto.rise * veto.release) * before)
        rising: NDArray[np.bool_] = np.where(going, begins | goes_on, state.rising)
        return rising

    def _safe(self, in_force: NDArray[np.void], action: SafeAction) -> NDArray[np.void]:
        """ACTION[n], what is in force with a mode's values."""
        actions = in_force.copy()
        for name, value in action.items():
            if name in self._granted:
                low, high = self._ends[name]
                actions[name] = min(max(SPECS[name].checked(value), low), high)
        return actions

    def _panicked(self, state: ShieldState, in_force: NDArray[np.void]) -> NDArray[np.void]:
        """ACTION[n], what sheds and drains."""
        actions = self._safe(in_force, self._settings.panic.action)
        if "admission_rate" in self._granted:
            time_s = np.maximum(np.minimum(state.seen, self._settings.panic.windows), 1) * self._window_s
            rate = self._settings.panic.admit_share * state.completed.sum(axis=0) / time_s
            actions["admission_rate"] = np.clip(rate, *self._ends["admission_rate"])
        return actions

    def _vetoed(
        self, windows: NDArray[np.void], proposed: NDArray[np.void], in_force: NDArray[np.void]
    ) -> NDArray[np.void]:
        """ACTION[n], what was proposed without its cuts and restarts."""
        veto, actions = self._settings.veto, proposed.copy()
        slow = np.nan_to_num(windows["p50_gap_s"]) >= veto.slow * self._tpot_s
        late = windows["oldest_wait_s"] >= veto.late * self._ttft_s
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

    def _reason(self, rule: str, state: ShieldState, window: NDArray[np.void], i: int) -> str:
        """Why a rule speaks in an episode, in numbers."""
        if rule == "rescue":
            waiting = window["waiting"] / self._engines
            return f"{waiting:.0f} waiting per engine, {window['kv_occupancy']:.0%} of KV blocks held"
        if rule == "panic":
            ended, in_slo = int(state.ended[:, i].sum()), int(state.in_slo[:, i].sum())
            span = self._settings.panic.windows
            return f"{in_slo} of {ended} requests within their SLO in the last {span} windows"
        now, before = state.in_flight[0, i], state.in_flight[-1, i]
        return f"cut while requests in flight per engine rose from {before:.0f} to {now:.0f}"


def _pushed(ring: NDArray[Any], value: NDArray[Any], going: NDArray[np.bool_]) -> NDArray[Any]:
    """A ring with a value in front and without its oldest, in the episodes that are not over."""
    pushed = np.where(going, np.roll(ring, 1, axis=0), ring)
    pushed[0, going] = value[going]
    return pushed
