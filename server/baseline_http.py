"""A session of the service over HTTP, for baselines that are played through it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from pydantic import ValidationError

from llmserve_env.errors import InputError
from llmserve_env.net.http import open_client
from llmserve_env.net.urls import without_credentials
from llmserve_env.schema import EpisodeLog, GradeResult, ServeAction, ServeObservation
from llmserve_env.tasks.catalog import TaskInfo

if TYPE_CHECKING:
    import httpx

_FULL_TRIES = 5
_LONGEST_WAIT_S = 60.0


class HttpSession:
    """Plays through the HTTP service: /tasks, /reset, /step, /grader, /log, in one session.

    Args:
        base_url: URL of the service.
        timeout_s: time for one answer (s).
        sleep: waits some seconds, where the service is full and says for how long.
    """

    def __init__(
        self, base_url: str, timeout_s: float = 60.0, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        import httpx

        self._url = without_credentials(base_url)
        self._sleep = sleep
        try:
            self._client = open_client(base_url, timeout_s=timeout_s)
        except httpx.InvalidURL as error:
            raise InputError(f"expected the service's URL, found {base_url!r}", field="base_url") from error
        self._session: dict[str, str] = {}
        self._last: ServeObservation | None = None

    def tasks(self) -> list[TaskInfo]:
        """The tasks that the service plays."""
        answer = self._call("GET", "/tasks")
        with self._expected("a list of tasks"):
            return [TaskInfo.model_validate(entry) for entry in answer["tasks"]]

    def reset(
        self, *, task_id: str | None, seed: int, horizon_s: float | None = None, records: bool = False
    ) -> ServeObservation:
        """Begin an episode; where the service is full, wait as long as it says, some times."""
        asked = {"task_id": task_id, "seed": seed, "horizon_s": horizon_s, "records": records or None}
        given = {name: value for name, value in asked.items() if value is not None}
        found = self._call("POST", "/reset", {**given, **self._session})
        with self._expected("a session"):
            self._session = {"session_id": found["metadata"]["session_id"]}
        return self._observed(found)

    def step(self, actions: Sequence[ServeAction]) -> list[float]:
        """Serve a window for each action."""
        rewards = list[float]()
        for action in actions:
            body = {"action": action.model_dump(mode="json"), **self._session}
            seen = self._observed(self._call("POST", "/step", body))
            rewards.append(seen.reward)
            if seen.done:
                break
        return rewards

    def observation(self) -> ServeObservation:
        """What is seen now.

        Raises:
            InputError: no episode has begun.
        """
        if self._last is None:
            raise InputError("no episode has begun")
        return self._last

    def task(self) -> TaskInfo:
        """The task that is played, as the service lists it."""
        task_id = self.observation().task_id
        return next(task for task in self.tasks() if task.id == task_id)

    def grade(self) -> GradeResult:
        """Have the service grade the session's log."""
        found = self._call("POST", "/grader", self._session)
        with self._expected("a grade"):
            return GradeResult.model_validate(found)

    def log(self) -> EpisodeLog:
        """The log so far."""
        path = f"/log?{urlencode(self._session)}"
        with self._expected("a log"):
            return EpisodeLog.model_validate(self._call("GET", path))

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

    def _observed(self, found: dict[str, Any]) -> ServeObservation:
        with self._expected("an observation"):
            fields = {**found["observation"], "reward": found["reward"] or 0.0, "done": found["done"]}
            self._last = ServeObservation.model_validate(fields)
        return self._last

    @contextmanager
    def _expected(self, what: str) -> Iterator[None]:
        """Say of an answer of another form, or of another version's schema, what was expected."""
        try:
            yield
        except (KeyError, TypeError, ValidationError) as error:
            raise InputError(f"{self._url}: expected {what}: {error!r}", field="base_url") from error


def _wait_s(response: httpx.Response) -> float:
    """What Retry-After says, within bounds; a second where it says nothing that is a number of seconds."""
    try:
        return min(max(float(response.headers["retry-after"]), 0.0), _LONGEST_WAIT_S)
    except (KeyError, ValueError):
        return 1.0
