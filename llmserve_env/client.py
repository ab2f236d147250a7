"""The client of a server: one session over one WebSocket connection."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from llmserve_env.errors import InputError
from llmserve_env.schema import EpisodeLog, GradeResult, ServeAction, ServeObservation, ServeState
from llmserve_env.tasks.catalog import TaskInfo

try:
    from openenv.core.client_types import StepResult
    from openenv.core.env_client import EnvClient
    from openenv.core.utils import convert_to_ws_url
    from websockets.exceptions import ConnectionClosed
except ImportError as error:
    reason = "the client needs OpenEnv 0.10: pip install -e '.[server]' in the checkout"
    raise ImportError(reason) from error

if TYPE_CHECKING:
    from openenv.core.sync_client import SyncEnvClient


class ServiceError(RuntimeError):
    """The server refused a message for another reason than its content.

    Args:
        message: what the server says.
        status: the HTTP status that it would have.
        code: OpenEnv's word for it.
    """

    def __init__(self, message: str, *, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class NotFoundError(ServiceError):
    """There is no such task, or no such session (any more)."""


class ConflictError(ServiceError):
    """Not in this state of the episode: before a reset, after its end, or a grade before its end."""


class CapacityError(ServiceError):
    """The server has as many sessions as it may have."""


_ERRORS = {404: NotFoundError, 409: ConflictError, 429: CapacityError}


@dataclass(frozen=True)
class Steps:
    """Several windows in a row.

    Attributes:
        results: results of every window, or of the last one only if that is what was asked for.
        rewards: rewards of every window that was played.
    """

    results: list[StepResult[ServeObservation]]
    rewards: list[float]


class LLMServeEnv(EnvClient[ServeAction, ServeObservation, ServeState]):
    """OpenEnv's client: a session on a server, from the first call to `close`.

    The Gymnasium environment is another class: `gym.make("LLMServe-v0")` makes an
    `llmserve_env.envs.serve_env.LLMServeEnv`, and `gym.make("LLMServeRemote-v0", url=...)` plays on a server.

    The methods are coroutines; `sync()` gives a client with the same methods that block:

    ```python
    with LLMServeEnv.from_url("http://localhost:8000").sync() as env:
        result = env.reset(task_id="static_workload", seed=1)
        while not result.done:
            result = env.step(ServeAction(batch_cap=128))
        print(env.grade().score)
    ```

    ```python
    async with LLMServeEnv.from_url("http://localhost:8000") as env:
        result = await env.reset(task_id="static_workload", seed=1)
        result = await env.step(ServeAction(batch_cap=128))
    ```

    A result has `observation`, `reward` and `done`. A server that refuses what was sent raises `InputError`
    with the field; otherwise a `ServiceError`: `ConflictError`, `NotFoundError` or `CapacityError`. A
    connection that breaks raises `ConnectionError`; the next call opens another one, whose session is new.

    Args:
        base_url: URL of the server, http(s):// or ws(s)://; that of its WebSocket, with /ws, is as good.
        session_id: an open session to play in, which is left open; by default one of its own, which ends with
            the connection.
        options: those of `openenv.core.env_client.EnvClient`, such as `message_timeout_s` and `headers`.
            Pings have no timeout unless `websocket_ping_timeout_s` gives them one.
    """

    def __init__(self, base_url: str | None = None, *, session_id: str | None = None, **options: Any) -> None:
        self._session_id = session_id
        # A caller may compute his next action in the thread of the event loop, which answers no pings then.
        super().__init__(base_url, **{"websocket_ping_timeout_s": None, **options})

    @classmethod
    def from_url(cls, url: str, *, session_id: str | None = None, **options: Any) -> LLMServeEnv:
        """The client of a server that runs; arguments as the class."""
        return cls(url, session_id=session_id, **options)

    def reset(
        self,
        *,
        task_id: str | None = None,
        seed: int | None = None,
        workload: str | dict[str, Any] | None = None,
        horizon_s: float | None = None,
        features: bool = False,
        records: bool = False,
        episode_id: str | None = None,
    ) -> Any:
        """Begin an episode.

        Args:
            task_id: id of a task (default: static_workload).
            seed: seed of the episode (default: one that the server draws from the training seeds).
            workload: other traffic than the task's: the URI of a generator, or a scenario's table.
            horizon_s: another length of the episode (s).
            features: whether `observation.metadata["features"]` has what Gymnasium agents see.
            records: whether `observation.metadata["record"]` has the window's record.
            episode_id: a name for the episode, told by `state` (default: one is made).

        Returns:
            The first observation, as a StepResult.

        Raises:
            NotFoundError: no such task.
            InputError: another argument cannot be used.
            CapacityError: the server is full.
        """
        return super().reset(
            task_id=task_id,
            seed=seed,
            workload=workload,
            horizon_s=horizon_s,
            features=features,
            records=records or None,  # a server of an older version does not know it
            episode_id=episode_id,
        )

    async def step_n(self, actions: Sequence[ServeAction], *, every: bool = True) -> Steps:
        """Serve a window with each of the actions in turn, in one message; stops at the end of the episode.

        Args:
            actions: 1 to 1000.
            every: whether the result of every window is wanted, or only the last one's.

        Raises:
            ConflictError: no episode has begun, or it is over.
        """
        data = {"actions": [self._step_payload(action) for action in actions], "every": every}
        found = await self._asked("step_n", data)
        return Steps([self._parse_result(window) for window in found["steps"]], found["rewards"])

    async def grade(self, log: EpisodeLog | None = None) -> GradeResult:
        """The grade of an episode.

        Args:
            log: log of any episode (default: the session's own, which must be over).

        Raises:
            InputError: the log is not what the simulator does; names the field.
            ConflictError: the session's episode is not over.
        """
        data = {} if log is None else {"episode_log": log.model_dump(mode="json")}
        return GradeResult.model_validate(await self._asked("grade", data))

    async def log(self) -> EpisodeLog:
        """The log of the episode so far.

        Raises:
            ConflictError: no episode has begun.
        """
        return EpisodeLog.model_validate(await self._asked("log"))

    async def tasks(self) -> list[TaskInfo]:
        """The tasks that the server plays."""
        return [TaskInfo.model_validate(task) for task in (await self._asked("tasks"))["tasks"]]

    def _set_base_url(self, base_url: str) -> None:
        base_url = base_url.rstrip("/").removesuffix("/ws")
        super()._set_base_url(base_url)
        if self._session_id is not None:
            query = urlencode({"session_id": self._session_id})
            self._ws_url = f"{convert_to_ws_url(base_url)}/ws?{query}"

    async def _reset_async(self, **arguments: Any) -> StepResult[ServeObservation]:
        given = {name: value for name, value in arguments.items() if value is not None}
        return await super()._reset_async(**given)

    async def _asked(self, kind: str, data: dict[str, Any] | None = None) -> dict[str, Any]:
        response = await self._send_and_receive({"type": kind, "data": data or {}})
        found: dict[str, Any] = response["data"]
        return found

    async def _send_and_receive(self, message: dict[str, Any]) -> dict[str, Any]:
        """As the base class, with errors that say what they are."""
        with suppress(ConnectionClosed):  # a server that refuses a session says why before it hangs up
            await self._send(message)
        try:
            response: dict[str, Any] = await self._receive()
        except ConnectionClosed as error:
            raise ConnectionError(
                f"the connection to {self._ws_url} ended, and a session of its own with it: {error}"
            ) from error
        if response.get("type") == "error":
            raise _refusal(response.get("data", {}))
        return response

    def _step_payload(self, action: ServeAction) -> dict[str, Any]:
        return action.model_dump(mode="json")

    def _parse_result(self, payload: dict[str, Any]) -> StepResult[ServeObservation]:
        reward, done = payload["reward"], payload["done"]
        observation = ServeObservation.model_validate(
            {**payload["observation"], "reward": reward, "done": done}
        )
        return StepResult(observation, reward, done, observation.metadata)

    def _parse_state(self, payload: dict[str, Any]) -> ServeState:
        return ServeState.model_validate(payload)


class RemoteSession:
    """A `session.Session` on a server, which begins with the first call and ends with `close`.

    Args:
        url: URL of the server.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._end: Callable[[], object] = lambda: None
        self._client: SyncEnvClient[ServeAction, ServeObservation, ServeState] | None = None
        self._last: ServeObservation | None = None
        self._horizon_s: float | None = None
        self._task: TaskInfo | None = None

    def tasks(self) -> list[TaskInfo]:
        """The tasks that the server plays."""
        found: list[TaskInfo] = self._connected().tasks()
        return found

    def reset(
        self, *, task_id: str | None, seed: int, horizon_s: float | None = None, records: bool = False
    ) -> ServeObservation:
        """Begin an episode; arguments as `session.Session`.

        Raises:
            InputError: the server cannot play it; names the argument.
            CapacityError: the server is full.
        """
        client = self._connected()
        try:
            result = client.reset(task_id=task_id, seed=seed, horizon_s=horizon_s, records=records)
        except NotFoundError as error:
            raise InputError(str(error), field="task_id") from error
        seen: ServeObservation = result.observation
        self._last, self._task, self._horizon_s = seen, None, horizon_s
        return seen

    def step(self, actions: Sequence[ServeAction]) -> list[float]:
        """Serve a window for each action."""
        self.observation()  # says when no episode has begun
        try:
            steps = self._connected().step_n(actions, every=False)
        except ConflictError as error:
            raise InputError(str(error)) from error
        self._last = steps.results[-1].observation
        rewards: list[float] = steps.rewards
        return rewards

    def observation(self) -> ServeObservation:
        """What is seen now."""
        if self._last is None:
            raise InputError("no episode has begun")
        return self._last

    def task(self) -> TaskInfo:
        """The task as it is played."""
        seen = self.observation()
        if self._task is None:
            windows = self._connected().state().windows
            task = next(task for task in self.tasks() if task.id == seen.task_id)
            length_s = task.horizon_s if self._horizon_s is None else self._horizon_s
            self._task = task.model_copy(update={"windows": windows, "horizon_s": length_s})
        return self._task

    def grade(self) -> GradeResult:
        """The grade of the episode, by the server's replay of its log."""
        self.observation()
        try:
            found: GradeResult = self._connected().grade()
        except ConflictError as error:
            raise InputError(str(error)) from error
        return found

    def log(self) -> EpisodeLog:
        """The log so far."""
        self.observation()
        found: EpisodeLog = self._connected().log()
        return found

    def close(self) -> None:
        """End the session; another call begins the next one."""
        self._end()
        self._client = None

    def _connected(self) -> Any:
        if self._client is None:
            client = LLMServeEnv.from_url(self._url).sync()
            client.connect()
            # Trainers make sessions and drop them; one is not to outlive who plays in it.
            self._end = weakref.finalize(self, client.close)
            self._client = client
        return self._client


def _refusal(data: dict[str, Any]) -> Exception:
    """The exception of an error message."""
    message, status, code = data.get("message", "no reason given"), data.get("status"), data.get("code")
    if status == 422 or (status is None and code == "VALIDATION_ERROR"):
        return _input_error(message, data.get("errors") or [])
    if status is None and code == "CAPACITY_REACHED":
        status = 429
    return _ERRORS.get(status or 0, ServiceError)(message, status=status, code=code)


def _input_error(message: str, faults: list[dict[str, Any]]) -> InputError:
    """The first fault that the server found, by its field."""
    if not faults:
        return InputError(message)
    first = faults[0]
    field = ".".join(str(part) for part in first["loc"] if part not in ("body", "data", "action"))
    found = first.get("input")
    told = f", found {found!r}" if isinstance(found, (str, int, float)) else ""
    return InputError(f"{first['msg']}{told}", field=field or None)
