"""Episodes played at the level of the schema, in this process or through the HTTP service alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from pydantic import ValidationError

from llmserve_env.actions import to_action
from llmserve_env.agents import load_agent
from llmserve_env.backend import WINDOW
from llmserve_env.episode import Episode
from llmserve_env.errors import InputError
from llmserve_env.grading import grade
from llmserve_env.net.urls import without_credentials
from llmserve_env.schema import GradeResult, ServeAction, ServeObservation
from llmserve_env.tasks import load_task
from llmserve_env.tasks.catalog import TaskInfo, task_info

if TYPE_CHECKING:
    import httpx

    from llmserve_env.agents import Agent

_FULL_TRIES = 5
_LONGEST_WAIT_S = 60.0


class Policy(Protocol):
    """Plays one episode at a time from what the schema shows."""

    def reset(self, brief: TaskInfo, seed: int) -> None:
        """Begin an episode."""
        ...

    def act(self, observation: ServeObservation) -> ServeAction:
        """The configuration for the next window."""
        ...


class BlindPolicy:
    """A reference agent that looks at nothing: random, defaults, best-constant.

    Args:
        name: of the agent.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._agent: Agent | None = None

    def reset(self, brief: TaskInfo, seed: int) -> None:
        """Begin an episode of a shipped task."""
        task = load_task(brief.id)
        self._agent = load_agent(self._name, task)
        self._agent.reset(task, [seed])

    def act(self, observation: ServeObservation) -> ServeAction:
        """The configuration for the next window.

        Raises:
            InputError: no episode has begun.
        """
        if self._agent is None:
            raise InputError("call reset before act")
        return to_action(self._agent.act(np.zeros((1, 0), np.float32), np.zeros(1, WINDOW))[0])


class Runtime(Protocol):
    """Where episodes are played."""

    def brief(self, task_id: str) -> TaskInfo:
        """What players are told of a task."""
        ...

    def reset(self, task_id: str, seed: int) -> ServeObservation:
        """Begin an episode."""
        ...

    def step(self, action: ServeAction) -> ServeObservation:
        """Serve one window."""
        ...

    def grade(self) -> GradeResult:
        """Grade the episode by its log."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


class InProcess:
    """Plays shipped tasks in this process."""

    def __init__(self) -> None:
        self._episode: Episode | None = None

    def brief(self, task_id: str) -> TaskInfo:
        """What players are told of a task."""
        return task_info(load_task(task_id))

    def reset(self, task_id: str, seed: int) -> ServeObservation:
        """Begin an episode."""
        self._episode = Episode(load_task(task_id))
        return self._episode.reset(seed)

    def step(self, action: ServeAction) -> ServeObservation:
        """Serve one window."""
        return self._begun.step(action)

    def grade(self) -> GradeResult:
        """Grade the episode by replaying its log."""
        return grade(self._begun.log())

    def close(self) -> None:
        """Nothing is held."""

    @property
    def _begun(self) -> Episode:
        if self._episode is None:
            raise InputError("call reset first")
        return self._episode


class OverHttp:
    """Plays through the HTTP service: /tasks, /reset, /step, /grader, in one session.

    Args:
        base_url: of the service.
        timeout_s: for one answer (s).
        sleep: waits some seconds, where the service is full and says for how long.
    """

    def __init__(
        self, base_url: str, timeout_s: float = 60.0, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        import httpx

        self._url = without_credentials(base_url)
        self._sleep = sleep
        try:
            self._client = httpx.Client(base_url=base_url, timeout=timeout_s)
        except httpx.InvalidURL as error:
            raise InputError(f"expected the service's URL, found {base_url!r}", field="base_url") from error
        self._session: dict[str, str] = {}

    def brief(self, task_id: str) -> TaskInfo:
        """What players are told of a task."""
        answer = self._call("GET", "/tasks")
        with self._expected("a list of tasks"):
            entries = {entry["id"]: entry for entry in answer["tasks"]}
            if task_id in entries:
                return TaskInfo.model_validate(entries[task_id])
        raise InputError(f"{self._url} has {', '.join(entries)}, not '{task_id}'", field="task")

    def reset(self, task_id: str, seed: int) -> ServeObservation:
        """Begin an episode; where the service is full, wait as long as it says, some times."""
        found = self._call("POST", "/reset", {"task_id": task_id, "seed": seed, **self._session})
        with self._expected("a session"):
            self._session = {"session_id": found["metadata"]["session_id"]}
        return self._observation(found)

    def step(self, action: ServeAction) -> ServeObservation:
        """Serve one window."""
        body = {"action": action.model_dump(mode="json"), **self._session}
        return self._observation(self._call("POST", "/step", body))

    def grade(self) -> GradeResult:
        """Have the service grade the session's log."""
        found = self._call("POST", "/grader", self._session)
        with self._expected("a grade"):
            return GradeResult.model_validate(found)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        import httpx

        for attempt in range(_FULL_TRIES):
            try:
                response = self._client.request(method, path, json=body)
            except httpx.HTTPError as error:
                raise InputError(f"{self._url}{path}: {error}", field="base_url") from error
            if response.status_code != 429 or attempt == _FULL_TRIES - 1:
                break
            self._sleep(_wait_s(response))
        if response.is_error:
            raise InputError(f"{self._url}{path}: HTTP {response.status_code}: {response.text[:500]}")
        try:
            answer = response.json()
        except ValueError as error:
            raise InputError(f"{self._url}{path}: expected JSON: {error}", field="base_url") from error
        if not isinstance(answer, dict):
            raise InputError(f"{self._url}{path}: expected an object", field="base_url")
        return answer

    def _observation(self, found: dict[str, Any]) -> ServeObservation:
        with self._expected("an observation"):
            fields = {**found["observation"], "reward": found["reward"] or 0.0, "done": found["done"]}
            return ServeObservation.model_validate(fields)

    @contextmanager
    def _expected(self, what: str) -> Iterator[None]:
        """Say of an answer of another form, or of another version's schema, what was expected."""
        try:
            yield
        except (KeyError, TypeError, ValidationError) as error:
            raise InputError(f"{self._url}: expected {what}: {error!r}", field="base_url") from error


def play_episode(
    runtime: Runtime,
    policy: Policy,
    task_id: str,
    seed: int,
    watch: Callable[[float], object] = lambda share: None,
) -> GradeResult:
    """Play an episode to its end.

    Args:
        runtime: where.
        policy: plays.
        task_id: what.
        seed: of the episode.
        watch: called after every window with the share of the episode that is over.
    """
    brief = runtime.brief(task_id)
    observation = runtime.reset(task_id, seed)
    policy.reset(brief, seed)
    while not observation.done:
        observation = runtime.step(policy.act(observation))
        watch(observation.step_index / brief.windows)
    return runtime.grade()


def _wait_s(response: httpx.Response) -> float:
    """What Retry-After says, within bounds; a second where it says nothing that is a number of seconds."""
    try:
        return min(max(float(response.headers["retry-after"]), 0.0), _LONGEST_WAIT_S)
    except (KeyError, ValueError):
        return 1.0
