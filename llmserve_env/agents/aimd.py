"""Additive increase, multiplicative decrease, as in TCP: here of the batch cap and the admission rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from llmserve_env.controls import to_array
from llmserve_env.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmserve_env.schema import ServeAction
    from llmserve_env.tasks import Task

Measures = dict[str, "NDArray[np.float64]"]


class AIMDRule(BaseModel):
    """Parameters of the controller; the ranges are those in which a search may look.

    Every measure is a share of what was promised. *Late*: for the worst tenant the mean time to first token
    over its SLO, or the age of the oldest waiting request over the tightest TTFT SLO. *Slow*: the median time
    between tokens over the tightest SLO per token. That SLO is of a request's mean; a 99th percentile, with a
    whole prefill in it, breaks it in an idle cell, too.

    Attributes:
        memory_s: time over which the measures are averaged, exponentially (s).
        late: share of the promise from which on first tokens are late.
        slow: share of the promise from which on tokens are slow.
        release: what was broken holds again when the measure has fallen below this share of its threshold; in
            between, nothing is raised and nothing cut.
        late_cuts_batch: 1 if late first tokens cut the batch cap, as slow tokens always do; 0 if they cut the
            admission rate alone. What waits, waits longer behind a smaller batch.
        increase_per_s: added to the batch cap while all holds (sequences/s) ...
        decrease: ... and its factor when something breaks.
        admit_increase_per_s: added to the admission rate while all holds (requests/s, each second) ...
        admit_decrease: ... and its factor when first tokens are late.
        pause_s: between two cuts: the first one has to show what it did (s).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    memory_s: float = Field(10.0, ge=1, le=60)
    late: float = Field(1.0, ge=0.1, le=5)
    slow: float = Field(1.0, ge=0.2, le=5)
    release: float = Field(0.7, ge=0.2, le=0.95)
    late_cuts_batch: Literal[0, 1] = 0
    increase_per_s: float = Field(2.0, ge=0.1, le=20)
    decrease: float = Field(0.7, ge=0.2, le=0.95)
    admit_increase_per_s: float = Field(0.1, ge=0.01, le=1)
    admit_decrease: float = Field(0.8, ge=0.2, le=0.95)
    pause_s: float = Field(15.0, ge=1, le=60)


class AIMDAgent:
    """Plays the rule, or beside each other as many rules as episodes.

    The batch cap begins where the base action has it, the admission rate at the highest of the task's grid.
    Both stay between the ends of the grid and may lie between its points. An admission rate at its upper end
    is not set at all: everything is let in where the grid says so.

    Args:
        rules: one for all episodes, or one for each.
        base: what the other controls are set to, and where the batch cap begins (default: the task's start).
        name: under which results are reported.
    """

    def __init__(
        self,
        rules: AIMDRule | Sequence[AIMDRule],
        base: ServeAction | None = None,
        name: str = "aimd",
    ) -> None:
        self.name = name
        self._rules = [rules] if isinstance(rules, AIMDRule) else list(rules)
        self._base = base
        self._state: _State | None = None

    def reset(self, task: Task, seeds: Sequence[int]) -> None:
        """Begin episodes.

        Raises:
            InputError: there are neither one rule nor as many as episodes.
        """
        if len(self._rules) not in (1, len(seeds)):
            raise InputError(f"expected 1 or {len(seeds)} rules, found {len(self._rules)}", field="rules")
        self._state = _State(task, self._rules, self._base, len(seeds))

    def act(self, observations: NDArray[np.float32], windows: NDArray[np.void]) -> NDArray[np.void]:
        """ACTION[n], by the rules.

        Raises:
            InputError: no episode has begun.
        """
        if self._state is None:
            raise InputError("call reset before act")
        if windows["end_s"].any():
            self._state.see(windows)
        return self._state.actions.copy()


class _State:
    """What the rule remembers of n episodes: averages, what is broken, and how long ago it last cut."""

    def __init__(
        self, task: Task, rules: Sequence[AIMDRule], base: ServeAction | None, episodes: int
    ) -> None:
        self._window_s = task.window_s
        self._ttft_s = np.array([tenant.ttft_slo_s for tenant in task.tenants])
        self._tpot_s = min(tenant.tpot_slo_s for tenant in task.tenants)
        self._p = {
            name: np.broadcast_to([getattr(rule, name) for rule in rules], episodes)
            for name in AIMDRule.model_fields
        }
        # Python's exp, as NumPy's may round otherwise in arrays of another length.
        gains = [1.0 - math.exp(-task.window_s / rule.memory_s) for rule in rules]
        self._gain = np.broadcast_to(gains, episodes)
        self._averages: Measures = {}
        self._broken = {name: np.zeros(episodes, bool) for name in ("late", "slow")}
        self._since_cut_s = {name: np.full(episodes, np.inf) for name in ("batch", "admit")}
        self._granted = task.grid.granted
        start = to_array([task.start])
        for name in self._granted:
            start[name] = to_array([base or task.start])[name]
        self.actions = np.repeat(start, episodes)
        self._cap = self.actions["batch_cap"].astype(float)
        self._caps = task.grid.ends("batch_cap")
        self._admits = "admission_rate" in self._granted
        if self._admits:
            self._rates = task.grid.ends("admission_rate")
            self._rate = np.full(episodes, self._rates[1])
            self._unlimited = np.inf in task.grid.codes("admission_rate")

    def see(self, windows: NDArray[np.void]) -> None:
        """Update what is broken with the last window, and raise or cut."""
        late, slow = self._measures(windows)
        self._note("late", late)
        self._note("slow", slow)
        late_now, slow_now = self._broken["late"], self._broken["slow"]
        p = self._p
        fast = slow < p["release"] * p["slow"]
        holds = fast & (late < p["release"] * p["late"])
        if "batch_cap" in self._granted:
            late_cuts = p["late_cuts_batch"] == 1
            # what waits while tokens come fast enough has room for a larger batch
            raises = np.where(late_cuts, holds, fast)
            step = raises * p["increase_per_s"] * self._window_s
            cuts = self._cuts("batch", slow_now | (late_now & late_cuts))
            self._cap = np.clip(np.where(cuts, self._cap * p["decrease"], self._cap + step), *self._caps)
            self.actions["batch_cap"] = np.rint(self._cap)
        if self._admits:
            step = holds * p["admit_increase_per_s"] * self._window_s
            cuts = self._cuts("admit", late_now)
            rate = np.where(cuts, self._rate * p["admit_decrease"], self._rate + step)
            self._rate = np.clip(rate, *self._rates)
            top = np.inf if self._unlimited else self._rates[1]
            self.actions["admission_rate"] = np.where(self._rate >= self._rates[1], top, self._rate)

    def _measures(self, windows: NDArray[np.void]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Averages of how late first tokens and how slow the others are, as shares of the promises."""
        tenants = len(self._ttft_s)
        count = windows["tenant_first_tokens"][:, :tenants]
        mean_s = windows["tenant_ttft_s"][:, :tenants] / np.maximum(count, 1)
        late = np.maximum((mean_s / self._ttft_s).max(axis=1), windows["oldest_wait_s"] / self._ttft_s.min())
        slow = np.nan_to_num(windows["p50_gap_s"]) / self._tpot_s
        return self._average("late", late), self._average("slow", slow)

    def _average(self, name: str, value: NDArray[np.float64]) -> NDArray[np.float64]:
        before = self._averages.get(name, value)
        self._averages[name] = before + self._gain * (value - before)
        return self._averages[name]

    def _note(self, name: str, value: NDArray[np.float64]) -> None:
        kept = self._broken[name] & (value >= self._p["release"] * self._p[name])
        self._broken[name] = (value >= self._p[name]) | kept

    def _cuts(self, name: str, wanted: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Where a cut that is wanted comes now: the last one must be long enough ago."""
        self._since_cut_s[name] += self._window_s
        cuts: NDArray[np.bool_] = wanted & (self._since_cut_s[name] >= self._p["pause_s"])
        self._since_cut_s[name] = np.where(cuts, 0.0, self._since_cut_s[name])
        return cuts
