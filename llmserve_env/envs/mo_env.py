"""LLMServeMO-v0: rewards that are vectors, after MO-Gymnasium's convention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces

from llmserve_env.envs.serve_env import LLMServeEnv
from llmserve_env.envs.vector_env import LLMServeVectorEnv
from llmserve_env.objectives import OBJECTIVES, ObjectiveBatch

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from llmserve_env.tasks import Task


class LLMServeMOEnv(LLMServeEnv):
    """`LLMServe-v0` with a vector of rewards: nobody has said yet what counts how much.

    ## Description

    Episodes, actions, observations, seeds, ends and arguments are those of `LLMServe-v0`, of which this is a
    subclass. Only the reward differs.

    ## Reward Space

    `reward_space`, a `Box` float32[4]; `reward_dim` is 4. Every objective is 0 or more in a window, its mean
    over an episode at most 1, so that its sum is at most `task.windows`.

    | Num | Objective | What it is                                                                         |
    |-----|-----------|------------------------------------------------------------------------------------|
    | 0   | goodput   | weight of requests that met their SLO, as a share of the episode's, times windows  |
    | 1   | latency   | that, times the headroom that each had under its SLO                               |
    | 2   | cost      | that, times what the cell left free: idle GPU time and free KV memory              |
    | 3   | quality   | that, times the quality of the precision that served it                            |

    `llmserve_env.objectives` says how memory and cost are one. The task's own weights
    (`llmserve_env.objectives.Objectives(task).weights`) give the reward of `LLMServe-v0` back.

    ## Info

    That of `LLMServe-v0`, whose `reward_components` and `score` stay those of the task's own weights, and
    `objectives`: the reward vector by name, as floats of 64 bits.

    ## Arguments

    ```python
    >>> import gymnasium as gym
    >>> import llmserve_env
    >>> env = gym.make("LLMServeMO-v0", task_id="static_workload", disable_env_checker=True)
    >>> observation, info = env.reset(seed=1)
    >>> observation, rewards, terminated, truncated, info = env.step(env.action_space.sample())

    ```

    Gymnasium's checker takes rewards for scalars and warns of
    vectors; `mo_gymnasium.make` leaves it out, too.

    ## Vectorized environment

    `gym.make_vec("LLMServeMO-v0", num_envs=64)` gives rewards float32[64, 4]; `reward_space` is that of one.

    ## Version History

    * v0: Initial version.
    """

    def __init__(self, task_id: str | Path | Task = "static_workload", **arguments: Any) -> None:
        super().__init__(task_id, **arguments)
        self.batch: ObjectiveBatch = ObjectiveBatch(self.task, recorded=True)
        self.reward_space = reward_space(self.task)
        self.reward_dim = len(OBJECTIVES)

    def step(  # type: ignore[override] # a vector for a number: MO-Gymnasium's convention
        self, action: NDArray[np.int64] | NDArray[np.void]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], bool, bool, dict[str, Any]]:
        """Serve one window.

        Args:
            action: as for LLMServe-v0.

        Returns:
            float32[features], rewards float32[4], terminated, truncated, info.
        """
        observation, _, terminated, truncated, info = super().step(action)
        return observation, self.batch.earned[0].astype(np.float32), terminated, truncated, info

    def _info(self) -> dict[str, Any]:
        objectives = dict(zip(OBJECTIVES, self.batch.objectives[0].tolist(), strict=True))
        return {**super()._info(), "objectives": objectives}


class LLMServeMOVectorEnv(LLMServeVectorEnv):
    """`LLMServeMOEnv` n times, as `LLMServeVectorEnv` is `LLMServeEnv` n times: rewards float32[n, 4].

    Args:
        num_envs: episodes side by side.
        task_id: and all others: as `LLMServeVectorEnv`.
    """

    def __init__(
        self, num_envs: int = 1, task_id: str | Path | Task = "static_workload", **arguments: Any
    ) -> None:
        super().__init__(num_envs, task_id, **arguments)
        self.batch: ObjectiveBatch = ObjectiveBatch(self.task, self.num_envs, threads=self.threads)
        self.reward_space = reward_space(self.task)
        self.reward_dim = len(OBJECTIVES)

    def step(
        self, actions: NDArray[np.int64] | NDArray[np.void]
    ) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Serve one window of every episode: as `LLMServeVectorEnv`, with rewards float32[n, 4]."""
        observations, _, terminated, truncated, info = super().step(actions)
        return observations, self.batch.earned.astype(np.float32), terminated, truncated, info

    def _info(self, which: NDArray[np.bool_]) -> dict[str, Any]:
        parts: dict[str, Any] = {}
        for name, values in zip(OBJECTIVES, self.batch.objectives.T, strict=True):
            parts |= {name: np.where(which, values, 0.0), f"_{name}": which.copy()}
        return {**super()._info(which), "objectives": parts, "_objectives": which.copy()}


def reward_space(task: Task) -> spaces.Box:
    """Box float32[4]: one window can earn at most what all of an episode's may."""
    return spaces.Box(0.0, float(task.windows), (len(OBJECTIVES),), np.float32)
