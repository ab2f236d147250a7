"""Sessions: a service that plays one episode at a time, in this process or somewhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from llmserve_env.backend import WINDOW
from llmserve_env.controls import check_records, to_action, to_array
from llmserve_env.episode import Episode, StepResult
from llmserve_env.errors import InputError
from llmserve_env.grading import grade
from llmserve_env.observation import Observer
from llmserve_env.recording import record_row
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import list_tasks, load_task
from llmserve_env.tasks.catalog import TaskInfo, catalog, task_info

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmserve_env.schema import EpisodeLog, GradeResult, ServeObservation
    from llmserve_env.tasks import Task

DEFAULT_TASK = "static_workload"


class Session(Protocol):
    """A service that plays one episode at a time: here, over a WebSocket or HTTP, or inside a server.

    Everything raises `InputError` for what cannot be played, or not now.
    """

    def tasks(self) -> list[TaskInfo]:
        """The tasks that it plays."""
        ...

    def reset(
        self, *, task_id: str | None, seed: int, horizon_s: float | None = None, records: bool = False
    ) -> ServeObservation:
        """Begin an episode.

        Args:
            task_id: id of the task (default: static_workload).
            seed: seed of the episode.
            horizon_s: length of the episode (s; default: the task's).
            records: whether `metadata["record"]` of observations has the window's record.
        """
        ...

    def step(self, actions: Sequence[ServeAction]) -> list[float]:
        """Serve a window for each action, fewer where the episode ends, and return their rewards."""
        ...

    def observation(self) -> ServeObservation:
        """What is seen now."""
        ...

    def task(self) -> TaskInfo:
        """The task as it is played, with the episode's own length."""
        ...

    def grade(self) -> GradeResult:
        """The grade of the episode, which must be over."""
        ...

    def log(self) -> EpisodeLog:
        """The log so far."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


class LocalSession:
    """Plays shipped tasks in this process."""

    def __init__(self) -> None:
        self._episode: Episode | None = None
        self._task: TaskInfo | None = None

    def tasks(self) -> list[TaskInfo]:
        """The shipped tasks."""
        return list(catalog())

    def reset(
        self, *, task_id: str | None, seed: int, horizon_s: float | None = None, records: bool = False
    ) -> ServeObservation:
        """Begin an episode; arguments as `Session`.

        Raises:
            InputError: an unknown task, a length out of its range, or records are asked for.
        """
        if task_id is not None and task_id not in list_tasks():  # and no path either
            raise InputError(f"expected one of {', '.join(list_tasks())}, found '{task_id}'", field="task_id")
        if records:
            raise InputError("play an Episode: it has the records themselves", field="records")
        changes = {} if horizon_s is None else {"horizon_s": horizon_s}
        episode = Episode(load_task(task_id or DEFAULT_TASK, **changes))
        observation = episode.reset(seed)
        self._episode, self._task = episode, None
        return observation

    def step(self, actions: Sequence[ServeAction]) -> list[float]:
        """Serve a window for each action.

        Raises:
            InputError: no episode has begun, or it is over.
        """
        episode, rewards = self._current(), list[float]()
        for action in actions:
            rewards.append(episode.step(action).reward)
            if episode.done:
                break
        return rewards

    def observation(self) -> ServeObservation:
        """What is seen now."""
        return self._current().observation()

    def task(self) -> TaskInfo:
        """The task as it is played."""
        task = self._current().task
        if self._task is None:
            self._task = task_info(task)
        return self._task

    def grade(self) -> GradeResult:
        """The grade of the episode, by replay of its log."""
        episode = self._current()
        if not episode.done:
            raise InputError("the episode is not over: it can be graded after its last window")
        return grade(episode.log())

    def log(self) -> EpisodeLog:
        """The log so far."""
        return self._current().log()

    def close(self) -> None:
        """Nothing is held."""

    def _current(self) -> Episode:
        if self._episode is None:
            raise InputError("no episode has begun")
        return self._episode


class RemoteEpisode:
    """An episode that a session plays, with the face of `Episode`: agents play its `batch` as any other.

    Args:
        task: a shipped one, which may have another length.
        session: the session that plays it.

    Attributes:
        task: as given.
        batch: the episode as a batch of one.

    Raises:
        InputError: the task has been changed in a way that a session cannot be told of.

    Example:
        >>> episode = RemoteEpisode(load_task("static_workload"), RemoteSession("http://localhost:8000"))
        >>> play_batch(load_agent("reactive", episode.task), episode.batch, [1])
        >>> episode.grade().score
    """

    def __init__(self, task: Task, session: Session) -> None:
        self.task = task
        self.batch = RemoteBatch(task, session)
        self._session = session

    def reset(self, seed: int) -> ServeObservation:
        """Begin the episode with a seed."""
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
        return self._session.observation()

    def grade(self) -> GradeResult:
        """The grade of the episode, which must be over, by the service."""
        return self._session.grade()

    def log(self) -> EpisodeLog:
        """The log so far."""
        return self._session.log()

    def close(self) -> None:
        """Give back what the session holds."""
        self._session.close()


class RemoteBatch:
    """An episode that a session plays, with the face of an `EpisodeBatch` of one.

    Args:
        task: as `RemoteEpisode`.
        session: the session that plays it.

    Attributes:
        task: as given.
        windows: WINDOW[1], the last window's record.
        actions: ACTION[1], in force.
        steps: int64[1], windows served.
        over: bool[1], whether the episode has ended.
        observed: float32[1, features], what the agent sees now.
    """

    num_episodes = 1

    def __init__(self, task: Task, session: Session) -> None:
        self.task = task
        self._session = session
        self._observer = Observer(task)
        self._horizon_s = _told_horizon_s(task)
        self.windows = np.zeros(1, WINDOW)
        self.actions = to_array([task.start])
        self.steps = np.zeros(1, np.int64)
        self.over = np.ones(1, bool)
        self.observed = np.zeros((1, len(self._observer.features)), np.float32)

    def reset(self, seeds: Sequence[int]) -> NDArray[np.float32]:
        """Begin the episode; float32[1, features]."""
        (seed,) = seeds
        seen = self._session.reset(
            task_id=self.task.id, seed=int(seed), horizon_s=self._horizon_s, records=True
        )
        return self._seen(seen)

    def step(self, actions: NDArray[np.void], which: NDArray[np.bool_] | None = None) -> StepResult:
        """Serve one window.

        Args:
            actions: ACTION[1].
            which: bool[1], always True: there is no other episode to wait for.

        Raises:
            InputError: the episode has not begun or is over.
        """
        if self.over[0]:
            raise InputError("the episode is over: call reset" if self.steps[0] else "call reset before step")
        (action,) = check_records(actions)
        rewards = self._session.step([to_action(action)])
        seen = self._session.observation()
        told = seen.metadata
        return StepResult(
            self._seen(seen),
            np.array(rewards),
            np.array([told["terminated"]]),
            np.array([told["truncated"]]),
        )

    def info(self, index: int = 0) -> dict[str, Any]:
        """What there is to know beside the observation, as `EpisodeBatch.info`."""
        unsaid = ("terminated", "truncated", "record")
        metadata = self._session.observation().metadata
        return {name: value for name, value in metadata.items() if name not in unsaid}

    def _seen(self, observation: ServeObservation) -> NDArray[np.float32]:
        """Take in an observation; float32[1, features]."""
        try:
            self.windows = record_row(observation.metadata["record"]).reshape(1)
            self.actions = to_array([ServeAction.model_validate(observation.metadata["action"])])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"expected a record of the window: {error!r}", field="metadata") from error
        self.steps = np.array([observation.step_index])
        self.over = np.array([observation.done])
        self.observed = self._observer.of(self.windows, self.actions, self.steps)
        return self.observed


def _told_horizon_s(task: Task) -> float | None:
    """Length of an episode, where it is not the shipped task's (s)."""
    if task.id in list_tasks():
        shipped = load_task(task.id)
        if task == shipped:
            return None
        if task == load_task(task.id, horizon_s=task.horizon_s):
            return task.horizon_s
    raise InputError("a session plays shipped tasks; no more than their length may be another", field="task")
