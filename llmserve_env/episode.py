"""Episodes: a task played window by window, one at a time or many at once."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmserve_env.controls import to_action, to_array
from llmserve_env.errors import InputError
from llmserve_env.observation import Observer, describe
from llmserve_env.recording import Recording
from llmserve_env.rewards import COMPONENTS, Rewards
from llmserve_env.schema import EpisodeLog, ServeAction, ServeObservation
from llmserve_env.sim.simulator import SimulatorBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from llmserve_env.tasks import Task


@dataclass(frozen=True)
class StepResult:
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
    """Episodes of one task side by side, served by one call of the kernel a step.

    Args:
        task: what is played.
        num_episodes: how many.
        parallel: spread the episodes over Numba's threads.

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
    """

    def __init__(self, task: Task, num_episodes: int = 1, *, parallel: bool = False) -> None:
        if num_episodes < 1:
            raise InputError(f"expected 1 or more, found {num_episodes}", field="num_episodes")
        self.task = task
        self.num_episodes = num_episodes
        self.parallel = parallel
        self._rewards = Rewards(task)
        self._observer = Observer(task)
        self._simulator: SimulatorBatch | None = None
        self._start = to_array([task.start])
        self.actions = np.repeat(self._start, num_episodes)
        self.steps = np.zeros(num_episodes, np.int64)
        self.seeds = np.zeros(num_episodes, np.int64)
        self.components = np.zeros((num_episodes, len(COMPONENTS)))
        self.costs = np.zeros(num_episodes)
        self.totals = np.zeros((num_episodes, len(COMPONENTS)))
        self.requests = np.zeros((num_episodes, 4), np.int64)
        self.over = np.ones(num_episodes, bool)
        self._all = np.ones(num_episodes, bool)
        self._demand = np.zeros(num_episodes)

    @property
    def windows(self) -> NDArray[np.void]:
        """WINDOW[n], records of the last window; copy what has to last."""
        return self.simulator.windows

    @property
    def simulator(self) -> SimulatorBatch:
        """The simulated cells.

        Raises:
            InputError: no episode has begun.
        """
        if self._simulator is None:
            raise InputError("call reset before step")
        return self._simulator

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
        """
        chosen = np.arange(self.num_episodes) if which is None else np.flatnonzero(which)
        seeds = [int(seed) for seed in seeds]
        if self._simulator is None and len(chosen) < self.num_episodes:
            raise InputError("the first reset must be of all episodes", field="which")
        drawn = {seed: self.task.requests(seed) for seed in {seeds[i] for i in chosen}}
        workloads = {int(i): drawn[seeds[i]] for i in chosen}
        if self._simulator is None:
            cell = self.task.cell
            self._simulator = SimulatorBatch(
                self.task.profile,
                [workloads[i] for i in range(self.num_episodes)],
                engines=cell.engines,
                prefill_engines=cell.prefill_engines,
                max_num_batched_tokens=cell.max_num_batched_tokens,
                prefix_cache=cell.prefix_cache,
                action=self.task.start,
                parallel=self.parallel,
            )
        else:
            for i, workload in workloads.items():
                self._simulator.reset(i, workload)
        for i, workload in workloads.items():
            counts = np.bincount(workload.tenant, minlength=len(self.task.tenants))
            self._demand[i] = self._rewards.demand(counts)
            self.seeds[i] = seeds[i]
        self.actions[chosen] = self._start
        self.steps[chosen] = 0
        self.over[chosen] = False
        for array in (self.components, self.costs, self.totals, self.requests):
            array[chosen] = 0
        return self.observations()

    def step(self, actions: NDArray[np.void], which: NDArray[np.bool_] | None = None) -> StepResult:
        """Serve one window of each episode.

        Args:
            actions: ACTION[n].
            which: bool[n], the episodes to serve (default: all); the others stay as they are, with reward 0.

        Raises:
            InputError: no episode has begun, or one of them is over.
        """
        simulator = self.simulator
        if (self.over if which is None else self.over & which).any():
            raise InputError("the episode is over: call reset")
        simulator.advance(actions, self.task.window_s, which)
        windows = simulator.windows
        self.components, self.costs = self._rewards.of(windows, self._demand)
        if which is None:
            self.actions = actions.copy()
        else:
            self.components[~which] = 0.0
            self.costs[~which] = 0.0
            self.actions = np.where(which, actions, self.actions)
        served = self._all if which is None else which
        self.steps += served
        rewards = self._rewards.add(windows, served, self.components, self.totals, self.requests)
        truncated = (self.steps >= self.task.windows) & served
        terminated = np.zeros(self.num_episodes, bool)
        if self.task.max_in_flight is not None:
            terminated = (windows["in_flight"] > self.task.max_in_flight) & served & ~truncated
        self.over |= truncated | terminated
        return StepResult(self.observations(), rewards, terminated, truncated)

    def observations(self) -> NDArray[np.float32]:
        """float32[n, features], what the agents see now."""
        return self._observer.of(self.simulator.windows, self.actions, self.steps)

    def snapshot(self) -> bytes:
        """The exact state of all episodes, mid-episode too, for `restore` on a batch like this one."""
        return pickle.dumps({name: value for name, value in vars(self).items() if name != "task"})

    def restore(self, snapshot: bytes) -> None:
        """Return to a state that `snapshot` of this process gave: never load one from an untrusted source."""
        vars(self).update(pickle.loads(snapshot))


class Episode:
    """One episode at the level of the schema, with its log.

    Args:
        task: what is played.

    Example:
        >>> episode = Episode(load_task("static_workload"))
        >>> observation = episode.reset(seed=1)
        >>> while not observation.done:
        ...     observation = episode.step(ServeAction())
        >>> grade(episode.log()).score
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.batch = EpisodeBatch(task)
        self.recording = Recording()

    def reset(self, seed: int) -> ServeObservation:
        """Begin the episode with a seed."""
        self.batch.reset([seed])
        self.recording = Recording()
        return self.observation()

    def step(self, action: ServeAction) -> ServeObservation:
        """Serve one window.

        Raises:
            InputError: the episode has not begun or is over.
        """
        result = self.batch.step(to_array([action]))
        self.recording.add(self.batch, float(result.rewards[0]), bool(result.terminated[0]))
        return self.observation()

    @property
    def done(self) -> bool:
        """Whether the episode is over."""
        return bool(self.batch.over[0])

    def observation(self) -> ServeObservation:
        """What the agent sees now."""
        batch = self.batch
        action = to_action(batch.actions[0])
        rewards = self.recording.rewards
        metadata: dict[str, Any] = {
            "seed": int(batch.seeds[0]),
            "reward_components": dict(zip(COMPONENTS, batch.components[0].tolist(), strict=True)),
            "cost": float(batch.costs[0]),
            "score": float(batch.scores[0]),
            "action": action.model_dump(mode="json"),
            "not_applied": batch.simulator.not_applied(action) if rewards else {},
            "terminated": self.recording.terminated,
            "truncated": self.done and not self.recording.terminated,
        }
        reward = rewards[-1] if rewards else 0.0
        return describe(
            self.task, batch.windows[0], int(batch.steps[0]), reward=reward, done=self.done, metadata=metadata
        )

    def log(self) -> EpisodeLog:
        """The log so far."""
        return self.recording.log(self.batch)

    def close(self) -> None:
        """Nothing is held that needs it: here for the sake of episodes that real engines serve."""
