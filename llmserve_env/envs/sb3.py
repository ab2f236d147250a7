"""The vector environment as Stable-Baselines3's `VecEnv`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv

from llmserve_env.envs import spaces
from llmserve_env.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import gymnasium as gym
    from numpy.typing import NDArray
    from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices


class SB3VecEnv(VecEnv):
    """What `DummyVecEnv` of single environments in a `Monitor` would give, in one call of the simulator.

    Infos are those of a vector environment, one dict an episode.
    `env_method("action_masks")` is there for sb3-contrib's MaskablePPO.

    Args:
        env: environment of `gym.make_vec`, LLMServe-v0 or LLMServeContinuous-v0, in autoreset mode SAME_STEP.

    Raises:
        InputError: it resets in another mode.
    """

    def __init__(self, env: gym.vector.VectorEnv[Any, Any, Any]) -> None:
        if env.metadata["autoreset_mode"] is not AutoresetMode.SAME_STEP:
            raise InputError("expected SAME_STEP, as SB3's own environments do", field="autoreset_mode")
        self.env: Any = env
        self._began = time.time()
        self._returns = np.zeros(env.num_envs)
        self._lengths = np.zeros(env.num_envs, np.int64)
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """The first episode's seed, for the next reset; None draws training seeds, where SB3 draws any."""
        self._seeds = [None if seed is None else seed + i for i in range(self.num_envs)]
        return self._seeds

    def reset(self) -> NDArray[np.float32]:
        """Begin an episode each: float32[n, features]."""
        observations, info = self.env.reset(seed=self._seeds)
        self._reset_seeds()
        self._returns[:], self._lengths[:] = 0, 0
        self.reset_infos = _rows(info, self.num_envs)
        return observations  # type: ignore[no-any-return]

    def step_async(self, actions: NDArray[Any]) -> None:
        """Take the actions of the next window, int[n, controls] or float[n, controls]."""
        self._actions = actions

    def step_wait(
        self,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Serve it: observations, rewards, whether an episode is over, infos."""
        observations, rewards, terminated, truncated, info = self.env.step(self._actions)
        dones = terminated | truncated
        self._returns += rewards
        self._lengths += 1
        infos = _rows(info, self.num_envs)
        last = _rows(info["final_info"], self.num_envs) if dones.any() else infos
        for i in np.flatnonzero(dones).tolist():
            self.reset_infos[i], infos[i] = infos[i], last[i]
            infos[i]["terminal_observation"] = info["final_obs"][i]
            infos[i]["episode"] = {
                "r": round(float(self._returns[i]), 6),
                "l": int(self._lengths[i]),
                "t": round(time.time() - self._began, 6),
            }
        for i in range(self.num_envs):
            infos[i]["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
        self._returns[dones], self._lengths[dones] = 0, 0
        return observations, rewards.astype(np.float32), dones, infos

    def close(self) -> None:
        """Nothing is held."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of the vector environment, or its method `action_masks`, for each episode."""
        value = self._masks if attr_name == "action_masks" else getattr(self.env, attr_name)
        return [value for _ in self._get_indices(indices)]

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """What a method gives for each episode: only `action_masks` is there."""
        if method_name != "action_masks":
            raise AttributeError(f"episodes side by side have no method '{method_name}' of their own")
        return [self._masks() for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Refused: the episodes are no objects of their own."""
        raise AttributeError(f"episodes side by side have no attribute '{attr_name}' of their own")

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Any = None
    ) -> list[bool]:
        """Whether infos are as that wrapper gives them: those of `Monitor` are."""
        return [issubclass(wrapper_class, Monitor) for _ in self._get_indices(indices)]

    def _masks(self) -> NDArray[np.bool_]:
        env: Any = self.env.unwrapped
        return spaces.action_mask(env.task.grid, env.batch.backend.not_applied)


def _rows(info: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Gymnasium's info of arrays as a dict for each episode."""
    rows: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, values in info.items():
        if name.startswith(("_", "final_")):
            continue
        column = _rows(values, count) if isinstance(values, dict) else values.tolist()
        for row, value, is_told in zip(rows, column, info[f"_{name}"], strict=True):
            if is_told:
                row[name] = value
    return rows
