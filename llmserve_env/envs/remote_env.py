"""LLMServeRemote-v0: episodes that a server plays."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

from llmserve_env.client import ConflictError, LLMServeEnv
from llmserve_env.controls import CONTROLS, ActionGrid, to_action
from llmserve_env.envs import spaces
from llmserve_env.envs.serve_env import check_options, check_seed, draw_seed
from llmserve_env.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmserve_env.schema import EpisodeLog, GradeResult, ServeAction, ServeObservation
    from llmserve_env.tasks.catalog import TaskInfo

_INFO = ("reward_components", "cost", "score", "seed", "action", "not_applied")


class LLMServeRemoteEnv(gym.Env["NDArray[np.float32]", "NDArray[np.int64]"]):
    """`LLMServe-v0` played on a server: an agent sees and earns the same, bit for bit.

    ## Description

    Every environment holds a WebSocket connection and with it a session of its own on the server; `close`
    ends both. Actions, observations, rewards, ends of episodes and info are those of `LLMServe-v0`. What the
    server plays need not be known here: the grid of actions comes from its list of tasks.

    A connection that breaks raises `ConnectionError`; the next `reset` opens another one.

    ## Arguments

    ```python
    >>> import gymnasium as gym
    >>> import llmserve_env
    >>> env = gym.make("LLMServeRemote-v0", url="http://localhost:8000", task_id="static_workload")
    >>> observation, info = env.reset(seed=1)
    >>> observation, reward, terminated, truncated, info = env.step(env.action_space.sample())

    ```

    | Parameter   | Type      | Default             | Description                                 |
    |-------------|-----------|---------------------|---------------------------------------------|
    | `url`       | str       |                     | of the server, http(s):// or ws(s)://       |
    | `task_id`   | str       | `"static_workload"` | id of a task that the server has            |
    | `workload`  | str, dict | the task's          | URI of a generator, or scenario table       |
    | `horizon_s` | float     | the task's          | length of an episode (s)                    |

    ## Version History

    * v0: Initial version.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - as Env

    def __init__(
        self,
        url: str,
        task_id: str = "static_workload",
        *,
        workload: str | dict[str, Any] | None = None,
        horizon_s: float | None = None,
    ) -> None:
        self._arguments = {"task_id": task_id, "workload": workload, "horizon_s": horizon_s, "features": True}
        self._client: Any = LLMServeEnv.from_url(url).sync()
        # Once, and also where nobody closes: a session is not to outlive its environment.
        self._end = weakref.finalize(self, self._client.close)
        try:
            self.task = _task(self._client.tasks(), task_id)
        except BaseException:
            self.close()
            raise
        start = self.task.start.model_dump()
        self.grid = ActionGrid({name: self.task.controls.get(name, [start[name]]) for name in CONTROLS})
        self.observation_space = spaces.observation_space(self.grid.groups)
        self.action_space = spaces.action_space(self.grid)
        self._last: ServeObservation | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: seed of the episode (default: the next one that `np_random` draws from the training seeds).
            options: there are none.

        Returns:
            float32[features], and the info.

        Raises:
            InputError: the server cannot play the workload or the horizon; names it.
        """
        seed = check_seed(seed)
        super().reset(seed=seed)
        check_options(options)
        drawn = draw_seed(self.np_random) if seed is None else seed
        self._last = None
        self._last = self._client.reset(seed=drawn, **self._arguments).observation
        return self._vector(self._last), self._info(self._last)

    def step(
        self, action: NDArray[np.int64] | NDArray[np.void]
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Serve one window.

        Args:
            action: int[controls] indices into the grid, or an ACTION record.

        Returns:
            float32[features], reward, terminated, truncated, info.

        Raises:
            InputError: an index out of its range; no episode has begun, or it is over.
        """
        chosen = to_action(self.grid.records(spaces.single_action(self.grid, action))[0])
        if self._last is None:
            raise InputError("call reset before step")
        try:
            seen = self._client.step(chosen).observation
        except ConflictError as error:
            raise InputError(f"{error}: call reset") from error
        self._last = seen
        told = seen.metadata
        return self._vector(seen), seen.reward, told["terminated"], told["truncated"], self._info(seen)

    def action_masks(self) -> NDArray[np.bool_]:
        """bool[sum(nvec)], the values of the grid that the cell can apply, control after control.

        Raises:
            InputError: no episode has begun.
        """
        if self._last is None:
            raise InputError("call reset before step")
        return spaces.action_mask(self.grid, self._unavailable)

    def log(self) -> EpisodeLog:
        """The log of the episode so far, as the grader takes it."""
        found: EpisodeLog = self._client.log()
        return found

    def grade(self) -> GradeResult:
        """The grade of the episode, which must be over, by the server's replay of its log."""
        found: GradeResult = self._client.grade()
        return found

    def close(self) -> None:
        """End the connection, and its session with it."""
        self._end()

    def _unavailable(self, action: ServeAction) -> dict[str, str]:
        values = action.model_dump(mode="json")
        lost = self.task.unavailable
        return {name: "not on this cell" for name, found in lost.items() if values[name] in found}

    def _vector(self, observation: ServeObservation) -> NDArray[np.float32]:
        vector = np.array(observation.metadata["features"], np.float32)
        if vector.shape != self.observation_space.shape:
            raise InputError(
                f"expected {self.observation_space.shape} features, as this package has them, found "
                f"{vector.shape}: the server runs another version",
                field="features",
            )
        return vector

    @staticmethod
    def _info(observation: ServeObservation) -> dict[str, Any]:
        return spaces.to_info({name: observation.metadata[name] for name in _INFO})


def _task(tasks: list[TaskInfo], task_id: str) -> TaskInfo:
    for task in tasks:
        if task.id == task_id:
            return task
    known = ", ".join(task.id for task in tasks)
    raise InputError(f"expected one of {known}, found '{task_id}'", field="task_id")
