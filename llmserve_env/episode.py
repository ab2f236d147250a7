"""Episodes: a task, what serves it and a log, one at a time or many at once.

Step, end, score, info and log are here and nowhere else, whoever serves.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llmserve_env.controls import to_action, to_array, to_values
from llmserve_env.errors import InputError
from llmserve_env.observation import Observer, describe
from llmserve_env.recording import Recording
from llmserve_env.rewards import COMPONENTS, Rewards
from llmserve_env.schema import EpisodeLog, ServeAction, ServeObservation
from llmserve_env.sim.simulator import SimulatorBatch
from llmserve_env.tasks import load_task

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmserve_env.backend import Backend
    from llmserve_env.tasks import Task
    from llmserve_env.workloads.workload import Workload

OpenBackend = Callable[["Task", "Sequence[Workload]", "Sequence[int]"], "Backend"]
"""Begins what serves episodes of a task, from the first workload and the seed of each."""


def simulate(
    task: Task, workloads: Sequence[Workload], seeds: Sequence[int], *, threads: int | None = 1
) -> Backend:
    """Simulated cells of a task: an `OpenBackend`.

    Args:
        task: the task, which gives the cell.
        workloads: workload of each episode.
        seeds: seed of each episode; nothing but the workloads is drawn from them.
        threads: threads that serve the episodes (None: one for each core).
    """
    cell = task.cell
    return SimulatorBatch(
        task.profile,
        workloads,
        engines=cell.engines,
        prefill_engines=cell.prefill_engines,
        max_num_batched_tokens=cell.max_num_batched_tokens,
        prefix_cache=cell.prefix_cache,
        action=task.start,
        threads=threads,
    )


@cache
def prepare() -> None:
    """Compile what simulated episodes need, or load it, once for this process.

    Call it before processes begin that would each compile it, and before somebody waits for a first step.
    """
    batch = EpisodeBatch(load_task("static_workload", horizon_s=1.0, window_s=1.0))
    batch.reset([0])
    batch.step(batch.actions)


class StepResult(NamedTuple):
    """What n episodes give back for one action each.

    Attributes:
        observations: float32[n, features].
        rewards: float64[n].
        terminated: bool[n], ended before the horizon because the task says so.
        truncated: bool[n], at the horizon.
    """

    observations: NDArray[np.float32]
    rewards: NDArray[np.float64]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]


class EpisodeBatch:
    """Episodes of one task side by side, served together.

    Args:
        task: what is played.
        num_episodes: how many.
        threads: threads that serve simulated episodes (None: one for each core).
        backend: begins what serves them, at the first reset (default: the simulator).
        recorded: whether all windows are kept, for logs and pictures.

    Attributes:
        windows: WINDOW[n], records of the last window.
        actions: ACTION[n], the actions in force.
        steps: int64[n], windows served in the episode so far.
        seeds: int64[n].
        components: float64[n, components], parts of the last reward (rewards.COMPONENTS).
        costs: float64[n], weight of requests that missed their SLO in the last window, in the reward's unit.
        totals: float64[n, components], parts of the score so far.
        requests: int64[n, 4], requests so far: arrived, completed, within the SLO, failed.
        over: bool[n], episodes that have ended.
        observed: float32[n, features], what the agents see now.
        recordings: n of them, empty unless `recorded`.
    """

    def __init__(
        self,
        task: Task,
        num_episodes: int = 1,
        *,
        threads: int | None = 1,
        backend: OpenBackend | None = None,
        recorded: bool = False,
    ) -> None:
        if num_episodes < 1:
            raise InputError(f"expected 1 or more, found {num_episodes}", field="num_episodes")
        self.task = task
        self.num_episodes = num_episodes
        self.recorded = recorded
        self._open = partial(simulate, threads=threads) if backend is None else backend
        self._backend: Backend | None = None
        self._rewards = Rewards(task)
        self._observer = Observer(task)
        self._start = to_array([task.start])
        self._horizon = task.windows
        self.actions = np.repeat(self._start, num_episodes)
        self._asked: NDArray[np.void] | None = None
        self.steps = np.zeros(num_episodes, np.int64)
        self.seeds = np.zeros(num_episodes, np.int64)
        self.components = np.zeros((num_episodes, len(COMPONENTS)))
        self.costs = np.zeros(num_episodes)
        self.totals = np.zeros((num_episodes, len(COMPONENTS)))
        self.requests = np.zeros((num_episodes, 4), np.int64)
        self.over = np.ones(num_episodes, bool)
        self.observed = np.zeros((num_episodes, len(self._observer.features)), np.float32)
        self.recordings = [Recording() for _ in range(num_episodes)]
        self._all = np.ones(num_episodes, bool)
        self._demand = np.zeros(num_episodes)

    @property
    def windows(self) -> NDArray[np.void]:
        """WINDOW[n], records of the last window; copy what has to last."""
        return self.backend.windows

    @property
    def backend(self) -> Backend:
        """What serves.

        Raises:
            InputError: no episode has begun.
        """
        if self._backend is None:
            raise InputError("call reset before step")
        return self._backend

    @property
    def scores(self) -> NDArray[np.float64]:
        """float64[n], the grade so far: what is still to come counts as nothing."""
        scores: NDArray[np.float64] = self.totals.sum(axis=1)
        return scores

    def reset(self, seeds: Sequence[int], which: NDArray[np.bool_] | None = None) -> NDArray[np.float32]:
        """Begin episodes anew.

        Args:
            seeds: n of them.
            which: bool[n], the episodes to reset (default: all).

        Returns:
            float32[n, features], observations of all episodes.

        Raises:
            InputError: what serves cannot begin them.
        """
        chosen = np.arange(self.num_episodes) if which is None else np.flatnonzero(which)
        seeds = [int(seed) for seed in seeds]
        if self._backend is None and len(chosen) < self.num_episodes:
            raise InputError("the first reset must be of all episodes", field="which")
        drawn = {seed: self.task.requests(seed) for seed in {seeds[i] for i in chosen}}
        self.over[chosen] = True  # until what serves them has begun
        if self._backend is None:
            self._backend = self._open(self.task, [drawn[seed] for seed in seeds], seeds)
        else:
            for i in chosen.tolist():
                self._backend.reset(i, drawn[seeds[i]], seeds[i])
        for i in chosen.tolist():
            counts = np.bincount(self._backend.workloads[i].tenant, minlength=len(self.task.tenants))
            self._demand[i] = self._rewards.demand(counts)
            self.seeds[i] = seeds[i]
            self.recordings[i] = Recording()
        self.actions[chosen] = self._start
        if self._asked is not None:
            self._asked[chosen] = self._start
        self.steps[chosen] = 0
        self.over[chosen] = False
        for array in (self.components, self.costs, self.totals, self.requests):
            array[chosen] = 0
        self.observed = self._observe()
        return self.observed

    def step(self, actions: NDArray[Any], which: NDArray[np.bool_] | None = None) -> StepResult:
        """Serve one window of each episode.

        Args:
            actions: ACTION[n], or int[n, controls] indices into the task's grid. A control that the task does
                not grant stays as it is, and `info` names it among those that were not applied.
            which: bool[n], the episodes to serve (default: all); the others stay as they are, with reward 0.

        Raises:
            InputError: no episode has begun, or one of them is over; the actions are neither of the two, or
                an index or a value is out of its range.
        """
        backend = self.backend
        if np.count_nonzero(self.over if which is None else self.over & which):  # any() takes 1 us more
            raise InputError("the episode is over: call reset")
        asked = self.task.grid.records(actions)
        if len(asked) != self.num_episodes:
            raise InputError(f"expected {self.num_episodes}, found {len(asked)}", field="actions")
        # What indices choose is in the grid, and a new array.
        in_force = self.task.grid.in_force(asked) if asked is actions else asked
        windows = backend.serve(in_force, self.task.window_s, which)
        earning = self._rewards.earning(windows, backend.unmeasured)
        self.components, self.costs = self._rewards.of(earning, self._demand)
        self._note_asked(asked, in_force, which)
        if which is None:
            self.actions = in_force
        else:
            self.components[~which] = 0.0
            self.costs[~which] = 0.0
            self.actions = np.where(which, in_force, self.actions)
        served = self._all if which is None else which
        self.steps += served
        rewards = self._rewards.add(windows, served, self.components, self.totals, self.requests)
        truncated = (self.steps >= self._horizon) & served
        terminated = np.zeros(self.num_episodes, bool)
        if self.task.max_in_flight is not None:
            terminated = (windows["in_flight"] > self.task.max_in_flight) & served & ~truncated
        self.over |= truncated | terminated
        if self.recorded:
            self._record(windows, served, rewards, terminated)
        self.observed = self._observe()
        if np.count_nonzero(self.over) == self.num_episodes:
            backend.close()
        return StepResult(self.observed, rewards, terminated, truncated)

    def info(self, index: int = 0) -> dict[str, Any]:
        """What there is to know of an episode beside its observation, ready for JSON.

        Args:
            index: index of the episode.

        Returns:
            `reward_components`, `cost`, `score`, `seed`, the `action` in force, what of the action that was
            given was `not_applied` with the reason, and the backend's notes.
        """
        action = self.actions[index]
        return {
            "reward_components": dict(zip(COMPONENTS, self.components[index].tolist(), strict=True)),
            "cost": float(self.costs[index]),
            "score": float(self.scores[index]),
            "seed": int(self.seeds[index]),
            "action": to_values(action),
            "not_applied": self._not_applied(index) if self.steps[index] else {},
            **self.backend.notes(),
        }

    @property
    def beyond_grant(self) -> bool:
        """Whether an episode's last action set a control that the task does not grant."""
        return self._asked is not None

    def not_granted(self, index: int = 0) -> dict[str, str]:
        """The controls that an episode's last action set and that the task does not grant, with the reason.

        Args:
            index: index of the episode.
        """
        return {} if self._asked is None else self.task.grid.not_granted(self._asked[index])

    def log(self, index: int = 0) -> EpisodeLog:
        """The log of a recorded episode so far.

        Args:
            index: index of the episode.
        """
        live = self._backend is not None and not self._backend.replayable
        recording, score = self.recordings[index], float(self.scores[index])
        return recording.log(self.task, int(self.seeds[index]), score, live=live)

    def snapshot(self) -> bytes:
        """The exact state of all episodes, mid-episode too, for `restore` on a batch like this one.

        Raises:
            InputError: what serves cannot be brought back to a state.
        """
        state = {name: value for name, value in vars(self).items() if name not in _NOT_KEPT}
        return pickle.dumps((state, None if self._backend is None else self._backend.snapshot()))

    def restore(self, snapshot: bytes) -> None:
        """Return to a state that `snapshot` of this process gave: never load one from an untrusted source.

        Raises:
            InputError: as `snapshot`.
        """
        state, backend = pickle.loads(snapshot)
        if backend is None:
            self._backend = None
        else:
            if self._backend is None:
                self.reset(state["seeds"])
            self.backend.restore(backend)
        vars(self).update(state)

    def close(self) -> None:
        """Cancel what is under way and give back what is held.

        Raises:
            InputError: settings that were found cannot be brought back.
        """
        if self._backend is not None:
            self._backend.close()

    def _note_asked(
        self, asked: NDArray[np.void], in_force: NDArray[np.void], which: NDArray[np.bool_] | None
    ) -> None:
        """Keep what was asked for, where something else came into force."""
        beyond = asked is not in_force and asked.tobytes() != in_force.tobytes()
        if which is not None and (beyond or self._asked is not None):
            self._asked = np.where(which, asked, self.actions if self._asked is None else self._asked)
        else:
            self._asked = asked.copy() if beyond else None

    def _not_applied(self, index: int) -> dict[str, str]:
        asked = self.actions[index] if self._asked is None else self._asked[index]
        return {**self.not_granted(index), **self.backend.ignored(index, asked)}

    def _observe(self) -> NDArray[np.float32]:
        return self._observer.of(self.backend.windows, self.actions, self.steps)

    def _record(
        self,
        windows: NDArray[np.void],
        served: NDArray[np.bool_],
        rewards: NDArray[np.float64],
        terminated: NDArray[np.bool_],
    ) -> None:
        if self.num_episodes == 1:
            self.recordings[0].add(windows, self.actions, self.components, rewards, terminated)
            return
        for i in np.flatnonzero(served).tolist():
            row = slice(i, i + 1)
            self.recordings[i].add(
                windows[row], self.actions[row], self.components[row], rewards[row], terminated[row]
            )


_NOT_KEPT = ("task", "_open", "_backend")
"""Attributes of an `EpisodeBatch` that are no state of its episodes; the backend keeps its own."""


class Episode:
    """One episode at the level of the schema, with its log.

    Args:
        task: what is played.
        backend: begins what serves it, at the first reset (default: the simulator).

    Attributes:
        batch: the episode as a batch of one.

    Example:
        >>> episode = Episode(load_task("static_workload"))
        >>> observation = episode.reset(seed=1)
        >>> while not observation.done:
        ...     observation = episode.step(ServeAction())
        >>> grade(episode.log()).score
    """

    def __init__(self, task: Task, backend: OpenBackend | None = None) -> None:
        self.task = task
        self.batch = EpisodeBatch(task, backend=backend, recorded=True)

    def reset(self, seed: int) -> ServeObservation:
        """Begin the episode with a seed.

        Raises:
            InputError: what serves cannot begin it.
        """
        self.batch.reset([seed])
        return self.observation()

    def step(self, action: ServeAction) -> ServeObservation:
        """Serve one window.

        Raises:
            InputError: the episode has not begun or is over.
        """
        self.batch.step(to_array([action]))
        return self.observation()

    @property
    def done(self) -> bool:
        """Whether the episode is over."""
        return bool(self.batch.over[0])

    @property
    def action(self) -> ServeAction:
        """In force."""
        return to_action(self.batch.actions[0])

    def observation(self) -> ServeObservation:
        """What the agent sees now."""
        batch, recording = self.batch, self.batch.recordings[0]
        ends = {
            "terminated": recording.terminated,
            "truncated": self.done and not recording.terminated,
        }
        return describe(
            self.task,
            batch.windows[0],
            int(batch.steps[0]),
            reward=recording.rewards[-1] if recording.rewards else 0.0,
            done=self.done,
            metadata={**batch.info(), **ends},
        )

    def log(self) -> EpisodeLog:
        """The log so far."""
        return self.batch.log()

    def close(self) -> None:
        """Cancel what is under way and give back what is held; the log stays.

        Raises:
            InputError: settings that were found cannot be brought back.
        """
        self.batch.close()
