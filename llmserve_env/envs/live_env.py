"""LLMServeLive-v0: episodes that real engines serve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

from llmserve_env.envs import spaces
from llmserve_env.envs.serve_env import check_options, check_seed, draw_seed, open_task
from llmserve_env.live.episode import LiveEpisode
from llmserve_env.live.settings import open_endpoint

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from llmserve_env.schema import EpisodeLog
    from llmserve_env.tasks import Task


class LLMServeLiveEnv(gym.Env["NDArray[np.float32]", "NDArray[np.int64]"]):
    """`LLMServe-v0` before running vLLM servers, in real time.

    ## Description

    The task's requests of each window are sent to the servers when they are due, and a client measures what
    it gets; the servers' metrics tell what only engines know. `step` takes `window_s` of real time. Between
    two steps the episode's clock stands still and the servers' do not: answers go on.

    ## Action Space

    That of `LLMServe-v0`. What of it can be applied depends on the servers: `capabilities()` says it by
    field, `action_masks()` by value, and `info["not_applied"]` what had no effect.

    ## Observation Space

    That of `LLMServe-v0`. What nobody tells is 0; `info["live"]["unmeasured"]` names it.

    ## Rewards

    The task's, of what was measured. Nothing is earned for memory in a window in which not all servers told
    the usage of their KV caches, nor for quality where nobody states the weights' precision.

    ## Starting State

    The servers as they are, with nothing sent; the first `step` sets the first configuration.

    ## Episode End

    As in `LLMServe-v0`. Then, and with `close`, what is unfinished is cancelled, and the servers' settings
    become again what was found at `reset`.

    ## Info

    That of `LLMServe-v0`, and `live`: what the bounds cut, what failed and why, what is unmeasured, and why
    the servers' metrics are stale, if they are.

    ## Arguments

    ```python
    >>> import gymnasium as gym
    >>> import llmserve_env
    >>> env = gym.make("LLMServeLive-v0", url="http://127.0.0.1:8101", task_id="static_workload")
    >>> observation, info = env.reset(seed=1)
    >>> observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
    >>> env.close()

    ```

    | Parameter   | Type            | Default             | Description                                     |
    |-------------|-----------------|---------------------|-------------------------------------------------|
    | `url`       | str, sequence   |                     | of a server or several, `parse_upstream`'s form |
    | `task_id`   | str, Path, Task | `"static_workload"` | id of a shipped task, path of a file, a task    |
    | `model`     | str             | the first listed    | its name at the servers                         |
    | `control`   | str             | `None`              | folder of the one server's `LiveScheduler`      |
    | `workload`  | str, dict       | the task's          | workload URI or scenario table                  |
    | `profile`   | str             | the task's          | hardware and model, for prices and names        |
    | `engines`   | int             | the task's          | engines in the cell                             |
    | `window_s`  | float           | the task's          | time between two actions (s)                    |
    | `horizon_s` | float           | the task's          | length of an episode (s)                        |
    | others      |                 |                     | fields of `EndpointSettings`: bounds, API key   |

    ## Version History

    * v0: Initial version.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - as Env

    def __init__(
        self,
        url: str | Sequence[str],
        task_id: str | Path | Task = "static_workload",
        *,
        model: str | None = None,
        control: str | None = None,
        workload: str | dict[str, Any] | None = None,
        profile: str | None = None,
        engines: int | None = None,
        window_s: float | None = None,
        horizon_s: float | None = None,
        **settings: Any,
    ) -> None:
        self.task = open_task(
            task_id,
            workload=workload,
            profile=profile,
            engines=engines,
            window_s=window_s,
            horizon_s=horizon_s,
        )
        self.episode = LiveEpisode(self.task, open_endpoint(url, model, control=control, **settings))
        self.observation_space = spaces.observation_space(self.task.groups)
        self.action_space = spaces.action_space(self.task.grid)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin an episode; one that goes on is ended.

        Args:
            seed: seed of the episode (default: the next one that `np_random` draws from the training seeds).
            options: there are none.

        Returns:
            float32[features], and the info.

        Raises:
            InputError: a control folder cannot be used.
        """
        seed = check_seed(seed)
        super().reset(seed=seed)
        check_options(options)
        self.episode.reset(draw_seed(self.np_random) if seed is None else seed)
        return self.episode.batch.observed[0], self._info()

    def step(
        self, action: NDArray[np.int64] | NDArray[np.void]
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Serve one window, which takes as long.

        Args:
            action: int[controls] indices into the grid, or an ACTION record.

        Returns:
            float32[features], reward, terminated, truncated, info.

        Raises:
            InputError: an index out of its range; no episode has begun, or it is over.
        """
        result = self.episode.batch.step(spaces.single_action(self.task.grid, action))
        return (
            result.observations[0],
            result.rewards.item(),
            result.terminated.item(),
            result.truncated.item(),
            self._info(),
        )

    def action_masks(self) -> NDArray[np.bool_]:
        """bool[sum(nvec)], the values of the grid that the servers can take now, control after control.

        Raises:
            InputError: no episode has begun, or it is over.
        """
        return spaces.action_mask(self.task.grid, self.episode.batch.backend.not_applied)

    def capabilities(self) -> dict[str, str]:
        """How each field of an action is applied to the servers, or why it is not.

        Raises:
            InputError: no episode has begun, or it is over.
        """
        return self.episode.batch.backend.capabilities()

    def log(self) -> EpisodeLog:
        """The log of the episode so far: marked live, it cannot be replayed."""
        return self.episode.log()

    def close(self) -> None:
        """End the episode."""
        self.episode.close()

    def _info(self) -> dict[str, Any]:
        return spaces.to_info(self.episode.batch.info())
