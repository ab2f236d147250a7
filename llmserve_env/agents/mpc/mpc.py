"""Model predictive control: try some configurations on a copy of the cell, and set the one that does best.

The agent keeps a twin of every cell: a simulator that is told, window by window, of requests such as the
records speak of, under the actions that were really set. In every window it brings copies of the twin to the
same present, lets the traffic that it forecasts come for a while, each copy under another configuration, and
sets the one that earned most.

What it knows: the cell and its timing (the simulator itself), the tenants' promises and worth, the records so
far, and the lengths of requests of other episodes (`traffic.PastTraffic`). What it does not: the requests of
the episode that is played, seen or to come, and the state of the real engines.

Where it is wrong:

- The twin's requests have drawn lengths and times: its queue and its running requests differ from the real
  ones, and no record corrects them. Prompts share no prefixes in it.
- The forecast goes on as the last windows did: a change of regime is seen a window after it has begun.
- A configuration is tried as if it stayed for the whole horizon, on one sample of traffic or a few, and what
  is in flight at its end earned nothing. A restart that pays off later than that is never worth it.
- The model of the cell is the world itself here: what it would lose to a miscalibrated one is not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmserve_env.agents.mpc.forecast import RateForecast
from llmserve_env.agents.mpc.traffic import PastTraffic
from llmserve_env.agents.mpc.twin import Twins, wider
from llmserve_env.controls import CONTROLS, to_array
from llmserve_env.errors import InputError
from llmserve_env.rewards import Rewards

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmserve_env.schema import ServeAction
    from llmserve_env.tasks import Task

_PLANS = 2**31 + 4
"""Spawn key: an episode's draws are independent of its traffic, which comes from the same seed."""

_SLOTS = 96
"""Copies of cells that are rolled together: bounds the memory, not the result."""

_STEPS = 16
"""Steps in which a rollout is served at most: rewards weigh what happens within one by its averages."""

_RECENT = 3
"""Configurations set before, tried again: regimes come back."""


class MPCAgent:
    """Sets what does best in short rollouts of a twin of the cell.

    An episode's candidates are the configuration in force, the presets, those set lately, neighbours on the
    grid (one control one step up or down), and random points of the grid.

    Args:
        presets: configurations that are always tried; the first one begins (default: the task's start).
        candidates: configurations that are tried in a window, for each episode.
        horizon_s: how far they are rolled (s). Far enough for a restart to pay off, and for most requests in
            flight to end: only what has ended earns.
        samples: samples of the traffic to come, for each candidate the same.
        margin: by which the best must beat the configuration in force to replace it, as a share.
        threads: threads that serve the rollouts (None: one for each core).
        name: under which results are reported.

    Attributes:
        rolled_s: time that rollouts have served so far (s).
    """

    def __init__(
        self,
        presets: Sequence[ServeAction] = (),
        *,
        candidates: int = 16,
        horizon_s: float = 150.0,
        samples: int = 1,
        margin: float = 0.02,
        threads: int | None = 1,
        name: str = "mpc",
    ) -> None:
        for field, value in (("candidates", candidates), ("samples", samples)):
            if value < 1:
                raise InputError(f"expected 1 or more, found {value}", field=field)
        if not horizon_s > 0:
            raise InputError(f"expected seconds > 0, found {horizon_s}", field="horizon_s")
        self.name = name
        self.rolled_s = 0.0
        self._presets = list(presets)
        self._candidates, self._samples = candidates, samples
        self._horizon_s, self._margin, self._threads = horizon_s, margin, threads
        self._task: Task | None = None

    def reset(self, task: Task, seeds: Sequence[int]) -> None:
        """Begin episodes.

        Raises:
            InputError: a preset sets a control that the task does not grant.
        """
        if self._task is not task:
            self._past = PastTraffic(task)
            self._steps = min(max(round(self._horizon_s / task.window_s), 1), _STEPS)
            self._step_s = self._horizon_s / self._steps
            self._rewards = Rewards(task.model_copy(update={"window_s": self._step_s}))
        self._task, n = task, len(seeds)
        self._tried = to_array([*self._presets, task.start])
        for name in CONTROLS:
            if name not in task.grid.granted and (self._tried[name] != self._tried[name][-1]).any():
                raise InputError(f"{task.id} does not grant this control", field=name)
        roots = (np.random.SeedSequence(int(seed), spawn_key=(_PLANS,)) for seed in seeds)
        self._rngs = [np.random.default_rng(root) for root in roots]
        self._forecast = RateForecast(n, len(task.tenants), task.window_s)
        self._twins = Twins(task, n, 2 * self._past.most + 1000)
        self._slots: Twins | None = None
        self._actions = np.repeat(self._tried[:1], n)
        self._lately: list[list[NDArray[np.void]]] = [[] for _ in seeds]

    def act(self, observations: NDArray[np.float32], windows: NDArray[np.void]) -> NDArray[np.void]:
        """ACTION[n], what did best.

        Raises:
            InputError: no episode has begun.
        """
        if self._task is None:
            raise InputError("call reset before act")
        going = windows["end_s"] > self._twins.now_s + 0.5 * self._task.window_s
        if going.any():
            self._see(windows, going)
            self._plan(np.flatnonzero(going))
        return self._actions.copy()

    def _see(self, windows: NDArray[np.void], going: NDArray[np.bool_]) -> None:
        """Forecast anew, and let the twins serve what the records tell of."""
        assert self._task is not None
        arrived = windows["tenant_arrived"][:, : len(self._task.tenants)]
        self._forecast.see(arrived, going)
        for i in np.flatnonzero(going).tolist():
            start_s = float(self._twins.now_s[i])
            told = self._past.told(
                self._rngs[i],
                arrived[i],
                int(windows["arrived_prompt_tokens"][i]),
                start_s,
                start_s + self._task.window_s,
            )
            self._make_room(int(self._twins.cells["requests"][i]) + len(told.arrival_s))
            self._twins.tell(i, told)
        self._twins.serve(self._actions, self._task.window_s, going)

    def _make_room(self, requests: int) -> None:
        assert self._task is not None
        if requests > self._twins.room:
            self._twins = wider(self._task, self._twins, 2 * requests)
            self._slots = None

    def _plan(self, episodes: NDArray[np.int64]) -> None:
        """Set what does best in rollouts, some episodes at a time."""
        each = self._candidates * self._samples
        together = max(_SLOTS // each, 1)
        for low in range(0, len(episodes), together):
            part = episodes[low : low + together].tolist()
            tried = [self._options(i) for i in part]
            values = self._roll(part, tried).reshape(len(part), self._candidates, self._samples).mean(axis=2)
            for i, options, value in zip(part, tried, values, strict=True):
                best = int(value.argmax())
                if value[best] > value[0] * (1 + self._margin):
                    self._actions[i] = options[best]
                    self._lately[i] = [options[best : best + 1].copy(), *self._lately[i]][:_RECENT]

    def _options(self, i: int) -> NDArray[np.void]:
        """ACTION[candidates], the first is the one in force."""
        assert self._task is not None
        rng, grid = self._rngs[i], self._task.grid
        current = self._actions[i : i + 1]
        here = grid.indices(current)[0]
        steps = []
        for control, count in enumerate(grid.nvec):
            for place in (here[control] - 1, here[control] + 1):
                if 0 <= place < count:
                    steps.append(np.where(np.arange(len(here)) == control, place, here))
        drawn = rng.integers(grid.nvec, size=(self._candidates, len(here)))
        known = [current, self._tried, *self._lately[i]]
        left = max(self._candidates - sum(map(len, known)), 0)
        near = rng.permutation(np.array(steps).reshape(-1, len(here)))[: left * 3 // 4]
        options = np.concatenate([*known, grid.actions(np.concatenate([near, drawn]))])
        return options[: self._candidates]

    def _roll(self, part: Sequence[int], tried: Sequence[NDArray[np.void]]) -> NDArray[np.float64]:
        """What each copy earned until the horizon: float64[episodes * candidates * samples]."""
        assert self._task is not None
        task, each = self._task, self._candidates * self._samples
        now_s = self._twins.now_s[part]
        traffic = [
            [
                self._past.expected(
                    self._rngs[i], self._forecast.rates[i], start_s, start_s + self._horizon_s
                )
                for _ in range(self._samples)
            ]
            for i, start_s in zip(part, now_s.tolist(), strict=True)
        ]
        most = max(len(sample.arrival_s) for samples in traffic for sample in samples)
        slots = self._slots_for(int(self._twins.cells["requests"][part].max()) + most)
        for place, (i, samples) in enumerate(zip(part, traffic, strict=True)):
            mine = np.arange(place * each, (place + 1) * each)
            slots.copy_from(mine, self._twins, i)
            for number, sample in enumerate(samples):
                for slot in mine[number :: self._samples].tolist():
                    slots.tell(slot, sample)
        used = len(part) * each
        which = np.arange(len(slots.cells)) < used
        actions = np.repeat(self._actions[:1], len(which))
        actions[:used] = np.repeat(np.concatenate(tried), self._samples)
        earned = np.zeros(len(which))
        for _ in range(self._steps):
            counts = slots.now_s < task.horizon_s
            slots.serve(actions, self._step_s, which)
            components, _ = self._rewards.of(slots.windows, np.ones(len(which)))
            earned += np.where(counts, components.sum(axis=1), 0.0)
        self.rolled_s += used * self._horizon_s
        return earned[:used]

    def _slots_for(self, requests: int) -> Twins:
        """The copies, with room for so many requests."""
        assert self._task is not None
        if self._slots is None or self._slots.room < requests:
            each = self._candidates * self._samples
            count = max(_SLOTS // each, 1) * each
            room = max(self._twins.room, requests * 5 // 4)
            self._slots = Twins(self._task, count, room, threads=self._threads)
        return self._slots
