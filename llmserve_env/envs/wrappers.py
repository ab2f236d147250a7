"""Other forms of actions and observations, and the ids that are made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

from llmserve_env.controls import BoxActions
from llmserve_env.envs import spaces
from llmserve_env.envs.serve_env import LLMServeEnv

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmserve_env.envs.vector_env import LLMServeVectorEnv
    from llmserve_env.tasks import Task

    Env = gym.Env[Any, Any]


class ContinuousActions(
    gym.ActionWrapper["NDArray[np.float32]", "NDArray[np.float32]", "NDArray[np.int64]"],
    gym.utils.RecordConstructorArgs,
):
    """Actions as a `Box` [-1, 1]; `controls.BoxActions` says what each entry means.

    Args:
        env: LLMServe-v0, wrapped or not.
    """

    def __init__(self, env: Env) -> None:
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.ActionWrapper.__init__(self, env)
        self._box = BoxActions(_task(env).grid)
        self.action_space = spaces.box_space(_task(env).grid)

    def action(self, action: NDArray[np.float32]) -> Any:
        """The ACTION record of float32[controls]."""
        return self._box.records([action])[0]


class DictActions(
    gym.ActionWrapper["NDArray[np.float32]", "dict[str, Any]", "NDArray[np.int64]"],
    gym.utils.RecordConstructorArgs,
):
    """Actions as a `Dict` of an index for each control that the task grants, by name.

    Args:
        env: LLMServe-v0, wrapped or not.
    """

    def __init__(self, env: Env) -> None:
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.ActionWrapper.__init__(self, env)
        self._grid = _task(env).grid
        self.action_space = spaces.action_dict_space(self._grid)

    def action(self, action: dict[str, Any]) -> NDArray[np.int64]:
        """int64[controls], indices into the grid."""
        return spaces.from_dict(self._grid, action)


class DictObservations(
    gym.ObservationWrapper["dict[str, Any]", "NDArray[np.int64]", "NDArray[np.float32]"],
    gym.utils.RecordConstructorArgs,
):
    """Observations as a `Dict`: cell, settings, tenants [slot, feature] and action_mask.

    Args:
        env: LLMServe-v0, wrapped or not.
    """

    def __init__(self, env: Env) -> None:
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.ObservationWrapper.__init__(self, env)
        self.observation_space = spaces.observation_dict_space(_task(env))
        self._parts = spaces.parts(_task(env).groups)
        self._mask: NDArray[np.bool_] | None = None

    def observation(self, observation: NDArray[np.float32]) -> dict[str, Any]:
        """The parts of float32[features]."""
        if self._mask is None:  # it is the cell's, the same in every window
            self._mask = self.env.get_wrapper_attr("action_masks")()
        return spaces.to_dict(self._parts, observation, self._mask)


class ContinuousVectorActions(gym.vector.VectorActionWrapper):
    """`ContinuousActions` for the vector environment: a `Box` [-1, 1] float32[n, controls].

    Args:
        env: environment of `gym.make_vec("LLMServe-v0", ...)`.

    Attributes:
        autoreset_mode: Gymnasium's, of the environment.
    """

    def __init__(self, env: LLMServeVectorEnv) -> None:
        super().__init__(env)
        self.autoreset_mode = (
            env.unwrapped.autoreset_mode
        )  # libraries ask for it; Gymnasium's wrappers have none
        self._box = BoxActions(env.unwrapped.task.grid)
        self.single_action_space = spaces.box_space(env.unwrapped.task.grid)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, env.num_envs)

    def actions(self, actions: NDArray[np.float32]) -> Any:
        """ACTION[n] of float32[n, controls]."""
        return self._box.records(actions)


def continuous_env(**arguments: Any) -> ContinuousActions:
    """LLMServeContinuous-v0: LLMServe-v0 with `ContinuousActions`, of the same arguments."""
    return ContinuousActions(LLMServeEnv(**arguments))


def continuous_vector_env(**arguments: Any) -> ContinuousVectorActions:
    """LLMServeContinuous-v0 as a vector environment."""
    from llmserve_env.envs.vector_env import LLMServeVectorEnv

    return ContinuousVectorActions(LLMServeVectorEnv(**arguments))


def dict_env(**arguments: Any) -> DictObservations:
    """LLMServeDict-v0: LLMServe-v0 with `DictActions` and `DictObservations`, of the same arguments."""
    return DictObservations(DictActions(LLMServeEnv(**arguments)))


def _task(env: Env) -> Task:
    task: Task = env.get_wrapper_attr("task")
    return task
