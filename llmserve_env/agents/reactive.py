"""A rule such as an engineer would write: thresholds on what the last windows showed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from llmserve_env.controls import SPECS, to_array
from llmserve_env.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmserve_env.tasks import Task

BULK_TTFT_S = 10.0
"""Tenants who were promised their first token in this time or later send bulk work, others converse (s)."""


LEAST_ADMISSION_RPS = 1.0
"""Requests per second and engine that the rule always lets in."""
_MOST_ADMISSION_RPS = SPECS["admission_rate"].high
_MOST_SEQUENCES = int(SPECS["batch_cap"].high)
_LEAST_BUDGET, _MOST_BUDGET = SPECS["kv_budget_fraction"].low, SPECS["kv_budget_fraction"].high


class ReactiveRule(BaseModel):
    """Parameters of the rule, per engine where a measure grows with the cell.

    A setting is taken back when what triggered it has fallen below `release` times its threshold. The ranges
    are those in which `evaluate.tune` searches.

    Attributes:
        memory_s: time over which what is measured is averaged, exponentially (s).
        release: see above.
        batch_cap: batch cap in ordinary times (sequences).
        kv_budget_fraction: KV budget fraction in ordinary times.
        flood_rate: arrivals from bulk tenants that make a flood (requests/s/engine). Arrivals rather than
            requests in flight: what a flood left behind would keep the throttle on for those who come next.
        flood_kv_budget_fraction: in a flood: throttles long prompts, whose prefill delays everybody's tokens.
        crowd_in_flight: requests in flight that make a crowd, outside a flood (requests/engine).
        crowd_batch_cap: batch cap in a crowd (sequences).
        crowd_kv_budget_fraction: KV budget fraction in a crowd.
        speculation_depth: while few requests run (tokens).
        speculation_running: running requests from which on drafts cost more than they bring
            (requests/engine).
        crowd_speculation_depth: from there on (tokens).
        priority_wait_s: age of the oldest waiting request from which on urgent tenants go first; 0 for always
            (s). They do in a flood, too.
        fast_tier: precision to change to when waiting does not end: 1 INT8, 2 INT4.
        fast_wait_s: age of the oldest waiting request (s) ...
        fast_after_s: ... that has to last this long before precision is lowered (s) ...
        fast_calm_in_flight: ... and requests in flight below which it is calm (requests/engine).
        split_ratio: prompt tokens that arrive for each output token ...
        split_prompt_rate: ... while as many prompt tokens arrive (tokens/s/engine) ...
        split_after_s: ... that have to last this long before prefill and decode are split (s).
        calm_s: calm that has to last before precision is raised or engines are joined again (s): engines
            restart for it one after the other.
        admission_wait_s: age of the oldest waiting attempt from which on fewer are let in (s).
        admission_cut: what is let in then, of what was let in or sent in the window.
        admission_growth: by what more are let in, window by window, once nobody waits so long; when it is
            half as much again as what is sent, everybody is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    memory_s: float = Field(15.0, ge=1, le=60)
    release: float = Field(0.7, ge=0.2, le=0.95)
    batch_cap: int = Field(256, ge=16, le=_MOST_SEQUENCES)
    kv_budget_fraction: float = Field(0.8, ge=_LEAST_BUDGET, le=_MOST_BUDGET)
    flood_rate: float = Field(0.15, ge=0.02, le=1)
    flood_kv_budget_fraction: float = Field(0.1, ge=_LEAST_BUDGET, le=_MOST_BUDGET)
    crowd_in_flight: float = Field(64.0, ge=4, le=400)
    crowd_batch_cap: int = Field(512, ge=16, le=_MOST_SEQUENCES)
    crowd_kv_budget_fraction: float = Field(1.0, ge=_LEAST_BUDGET, le=_MOST_BUDGET)
    speculation_depth: int = Field(2, ge=0, le=5)
    speculation_running: float = Field(48.0, ge=4, le=400)
    crowd_speculation_depth: int = Field(1, ge=0, le=3)
    priority_wait_s: float = Field(0.5, ge=0, le=10)
    fast_tier: Literal[1, 2] = 1
    fast_wait_s: float = Field(5.0, ge=0.1, le=30)
    fast_after_s: float = Field(60.0, ge=5, le=1000)
    fast_calm_in_flight: float = Field(16.0, ge=1, le=100)
    split_ratio: float = Field(30.0, ge=2, le=100)
    split_prompt_rate: float = Field(8000.0, ge=500, le=50000)
    split_after_s: float = Field(60.0, ge=5, le=1000)
    calm_s: float = Field(60.0, ge=5, le=1000)
    admission_wait_s: float = Field(0.5, ge=0.1, le=10)
    admission_cut: float = Field(0.5, ge=0.2, le=0.95)
    admission_growth: float = Field(1.15, ge=1.01, le=2)


class ReactiveAgent:
    """Plays a rule, or beside each other as many rules as episodes.

    Args:
        rules: one for all episodes, or one for each.
        name: under which results are reported.
    """

    def __init__(self, rules: ReactiveRule | Sequence[ReactiveRule], name: str = "reactive") -> None:
        self.name = name
        self._rules = [rules] if isinstance(rules, ReactiveRule) else list(rules)
        self._state: _State | None = None

    def reset(self, task: Task, seeds: Sequence[int]) -> None:
        """Begin episodes.

        Raises:
            InputError: there are neither one rule nor as many as episodes.
        """
        if len(self._rules) not in (1, len(seeds)):
            raise InputError(f"expected 1 or {len(seeds)} rules, found {len(self._rules)}", field="rules")
        self._state = _State(task, self._rules, len(seeds))

    def act(self, observations: NDArray[np.float32], windows: NDArray[np.void]) -> NDArray[np.void]:
        """ACTION[n], by the rules.

        Raises:
            InputError: no episode has begun.
        """
        if self._state is None:
            raise InputError("call reset before act")
        if windows["end_s"].any():
            self._state.see(windows)
        return self._state.actions()


class _State:
    """What the rule remembers of n episodes: averages, triggers, and for how long each has been wanted."""

    def __init__(self, task: Task, rules: Sequence[ReactiveRule], episodes: int) -> None:
        self._window_s, self._engines = task.window_s, task.cell.engines
        self._start = to_array([task.start])
        self._granted = task.grid.granted
        self._bulk = np.flatnonzero([tenant.ttft_slo_s >= BULK_TTFT_S for tenant in task.tenants])
        self._p = {
            name: np.broadcast_to([getattr(rule, name) for rule in rules], episodes)
            for name in ReactiveRule.model_fields
        }
        # Python's exp, as NumPy's may round otherwise in arrays of another length.
        gains = [1.0 - math.exp(-self._window_s / rule.memory_s) for rule in rules]
        self._gain = np.broadcast_to(gains, episodes)
        self._averages: dict[str, NDArray[np.float64]] = {}
        self._on = {
            name: np.zeros(episodes, bool)
            for name in ("flood", "crowd", "running", "priority", "fast", "split")
        }
        self._wanted_s = {name: np.zeros(episodes) for name in ("fast", "split")}
        self._calm_s = {name: np.zeros(episodes) for name in ("fast", "split")}
        self._admission_rate = np.full(episodes, np.inf)

    def see(self, windows: NDArray[np.void]) -> None:
        """Update averages and triggers with the last window."""
        p, on, per_engine = self._p, self._on, 1.0 / self._engines
        per_s = per_engine / self._window_s
        in_flight = self._average("in_flight", windows["in_flight"] * per_engine)
        running = self._average("running", windows["running"] * per_engine)
        bulk = self._average("bulk", windows["tenant_arrived"][:, self._bulk].sum(axis=1) * per_s)
        prompts = self._average("prompts", windows["arrived_prompt_tokens"] * per_s)
        outputs = self._average("outputs", np.maximum(windows["output_tokens"], 0) * per_s)
        wait_s = windows["oldest_wait_s"]
        self._trigger("flood", bulk, p["flood_rate"])
        self._trigger("crowd", in_flight, p["crowd_in_flight"])
        self._trigger("running", running, p["speculation_running"])
        self._trigger("priority", wait_s, p["priority_wait_s"])
        slow, calm = wait_s >= p["fast_wait_s"], in_flight < p["fast_calm_in_flight"]
        self._trigger_slowly("fast", slow, calm, p["fast_after_s"])
        heavy = (prompts >= p["split_ratio"] * outputs) & (prompts >= p["split_prompt_rate"])
        heavy &= ~on["flood"]
        light = prompts < p["release"] * p["split_prompt_rate"]
        light |= prompts < p["release"] * p["split_ratio"] * outputs
        self._trigger_slowly("split", heavy, light, p["split_after_s"])
        self._admit((windows["arrived"] + windows["retries"]) / self._window_s, wait_s)

    def _admit(self, sent_rps: NDArray[np.float64], wait_s: NDArray[np.float64]) -> None:
        """Let fewer in while attempts wait for long, then more and more, in the end everybody."""
        p, rate = self._p, self._admission_rate
        crowded = wait_s >= p["admission_wait_s"]
        less = np.maximum(
            p["admission_cut"] * np.minimum(rate, sent_rps), LEAST_ADMISSION_RPS * self._engines
        )
        more = p["admission_growth"] * rate
        enough = more > 1.5 * sent_rps + LEAST_ADMISSION_RPS * self._engines
        self._admission_rate = np.where(crowded, less, np.where(enough, np.inf, more))

    def actions(self) -> NDArray[np.void]:
        """ACTION[n], what the triggers ask for."""
        p, on = self._p, self._on
        asked = {
            "batch_cap": np.where(on["crowd"], p["crowd_batch_cap"], p["batch_cap"]),
            "kv_budget_fraction": np.where(
                on["flood"],
                p["flood_kv_budget_fraction"],
                np.where(on["crowd"], p["crowd_kv_budget_fraction"], p["kv_budget_fraction"]),
            ),
            "speculation_depth": np.where(
                on["running"], p["crowd_speculation_depth"], p["speculation_depth"]
            ),
            "quantization_tier": np.where(on["fast"], p["fast_tier"], 0),
            "prefill_decode_split": on["split"],
            "priority_routing": on["flood"] | on["priority"] | (p["priority_wait_s"] == 0),
            "admission_rate": np.where(
                self._admission_rate > _MOST_ADMISSION_RPS, np.inf, self._admission_rate
            ),
        }
        actions = np.repeat(self._start, len(self._gain))
        for name in self._granted:
            actions[name] = asked[name]
        return actions

    def _average(self, name: str, value: NDArray[np.float64]) -> NDArray[np.float64]:
        before = self._averages.get(name, value)
        self._averages[name] = before + self._gain * (value - before)
        return self._averages[name]

    def _trigger(self, name: str, value: NDArray[np.float64], threshold: NDArray[np.float64]) -> None:
        kept = self._on[name] & (value >= self._p["release"] * threshold)
        self._on[name] = (value >= threshold) | kept

    def _trigger_slowly(
        self, name: str, wanted: NDArray[np.bool_], calm: NDArray[np.bool_], after_s: NDArray[np.float64]
    ) -> None:
        """On when it has been wanted for `after_s`, off when calm has lasted for the rule's `calm_s`."""
        self._wanted_s[name] = np.where(wanted, self._wanted_s[name] + self._window_s, 0.0)
        self._calm_s[name] = np.where(calm & ~wanted, self._calm_s[name] + self._window_s, 0.0)
        begins = self._wanted_s[name] >= after_s
        ends = self._calm_s[name] >= self._p["calm_s"]
        self._on[name] = begins | (self._on[name] & ~ends)
