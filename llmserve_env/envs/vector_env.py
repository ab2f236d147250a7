"""LLMServe-v0, many at once: one call of the simulator serves a window of every episode."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from llmserve_env.envs import spaces
from llmserve_env.envs.serve_env import check_options, check_seed, draw_seed, open_task, whole_number
from llmserve_env.episode import EpisodeBatch
from llmserve_env.errors import InputError
from llmserve_env.rewards import COMPONENTS
from llmserve_env.sim.kernel import checked_threads

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from llmserve_env.tasks import Task


class LLMServeVectorEnv(VectorEnv["NDArray[np.float32]", "NDArray[np.int64]", "NDArray[Any]"]):
    """`LLMServeEnv` n times, bit for bit what n of them would give, over automatic resets too.

    Its info holds one array for each number of the single environment's, with Gymnasium's `_key` masks;
    `action` is left out, and `not_applied` names no more than what the task does not grant, after windows in
    which an action set it.

    Args:
        num_envs: episodes side by side.
        task_id: and `workload`, `profile`, `engines`, `window_s`, `horizon_s`: as `LLMServeEnv`.
        threads: threads that serve the episodes (None: one for each core). Results do not depend on it.
        autoreset_mode: Gymnasium's, or its value: SAME_STEP (the observation is the next episode's first,
            the last one is in `info["final_obs"]` and its info in `info["final_info"]`), NEXT_STEP, DISABLED.

    Raises:
        InputError: an argument is out of its range.
    """

    def __init__(
        self,
        num_envs: int = 1,
        task_id: str | Path | Task = "static_workload",
        *,
        workload: str | dict[str, Any] | None = None,
        profile: str | None = None,
        engines: int | None = None,
        window_s: float | None = None,
        horizon_s: float | None = None,
        threads: int | None = 1,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        render_mode: None = None,
        max_episode_steps: None = None,
    ) -> None:
        num_envs = whole_number(num_envs, "num_envs", 1)
        if render_mode is not None:
            raise InputError("only a single environment is rendered: gym.make", field="render_mode")
        if max_episode_steps is not None:
            raise InputError("horizon_s sets the length of an episode", field="max_episode_steps")
        self.threads = checked_threads(None if threads is None else whole_number(threads, "threads", 1))
        try:
            self.autoreset_mode = AutoresetMode(autoreset_mode)
        except ValueError as error:
            modes = ", ".join(mode.value for mode in AutoresetMode)
            raise InputError(
                f"expected one of {modes}, found {autoreset_mode!r}", field="autoreset_mode"
            ) from error
        self.task = open_task(
            task_id,
            workload=workload,
            profile=profile,
            engines=engines,
            window_s=window_s,
            horizon_s=horizon_s,
        )
        self.num_envs = num_envs
        self.batch = EpisodeBatch(self.task, num_envs, threads=self.threads)
        self.metadata = {"render_modes": [], "autoreset_mode": self.autoreset_mode}
        self.single_observation_space = spaces.observation_space(self.task.groups)
        self.single_action_space = spaces.action_space(self.task.grid)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generators: list[np.random.Generator | None] = [None] * num_envs
        self._ended = np.zeros(num_envs, bool)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin episodes.

        Args:
            seed: seed of the first episode, the others take the next ones; or n seeds; for None each draws
                the next training seed from a generator of its own.
            options: `reset_mask` bool[n], the episodes to reset (default: all).

        Returns:
            float32[n, features], and the info of those that were reset.
        """
        seeds = self._seeds(seed)
        check_options(options, takes=("reset_mask",))
        mask = self._mask(({} if options is None else options).get("reset_mask"))
        for i in np.flatnonzero(mask):
            if seeds[i] is not None:
                self._generators[i] = seeding.np_random(seeds[i])[0]
        self._ended[mask] = False
        return self._begin(mask, seeds), self._info(mask)

    def step(
        self, actions: NDArray[np.int64] | NDArray[np.void]
    ) -> tuple[
        NDArray[np.float32], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]
    ]:
        """Serve one window of every episode.

        Args:
            actions: int[n, controls] indices into the grid, or ACTION[n] records.

        Returns:
            float32[n, features], rewards float64[n], terminated bool[n], truncated bool[n], info.

        Raises:
            InputError: an index out of its range; an episode has not begun, or is over with resets disabled.
        """
        waiting = self._ended if self.autoreset_mode is AutoresetMode.NEXT_STEP else None
        if waiting is not None and waiting.any():
            result = self.batch.step(actions, which=~waiting)
            observations = self._begin(waiting, [None] * self.num_envs)
        else:
            result = self.batch.step(actions)
            observations = result.observations
        over = result.terminated | result.truncated
        everyone = np.ones(self.num_envs, bool)
        self._ended = over
        info: dict[str, Any] = {}
        if self.autoreset_mode is AutoresetMode.SAME_STEP and over.any():
            final = np.full(self.num_envs, None, object)
            for i in np.flatnonzero(over):
                final[i] = observations[i].copy()
            info = {"final_obs": final, "_final_obs": over.copy()}
            info |= {"final_info": self._info(over), "_final_info": over.copy()}
            observations = self._begin(over, [None] * self.num_envs)
        info |= self._info(everyone)
        return observations, result.rewards, result.terminated, result.truncated, info

    @property  # type: ignore[misc] # as SyncVectorEnv, which has no setter either
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The generators from which the episodes draw their seeds."""
        return tuple(self._generator(i) for i in range(self.num_envs))

    def _generator(self, index: int) -> np.random.Generator:
        generator = self._generators[index]
        if generator is None:
            generator = self._generators[index] = seeding.np_random()[0]
        return generator

    def _begin(self, which: NDArray[np.bool_], seeds: Sequence[int | None]) -> NDArray[np.float32]:
        """Reset some episodes, with a seed drawn for each that is given None; observations of all."""
        drawn = np.zeros(self.num_envs, np.int64)
        for i in np.flatnonzero(which).tolist():
            seed = seeds[i]
            drawn[i] = draw_seed(self._generator(i)) if seed is None else seed
        return self.batch.reset(drawn.tolist(), which)

    def _seeds(self, seed: int | Sequence[int | None] | None) -> list[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if not isinstance(seed, Iterable):
            first = whole_number(seed, "seed", 0)
            seeds: list[int | None] = [first + i for i in range(self.num_envs)]
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise InputError(f"expected {self.num_envs} seeds, found {len(seeds)}", field="seed")
        return [check_seed(each) for each in seeds]

    def _mask(self, mask: Any) -> NDArray[np.bool_]:
        if mask is None:
            return np.ones(self.num_envs, bool)
        chosen = np.asarray(mask)
        if chosen.dtype != np.bool_ or chosen.shape != (self.num_envs,) or not chosen.any():
            raise InputError(
                f"expected bool[{self.num_envs}] with at least one True, found {mask!r}", field="reset_mask"
            )
        return chosen

    def _info(self, which: NDArray[np.bool_]) -> dict[str, Any]:
        """Gymnasium's form of the infos of some episodes: arrays that are 0 elsewhere, and masks."""
        batch, everyone = self.batch, which.all()

        def masked(values: NDArray[Any]) -> NDArray[Any]:
            return values.copy() if everyone else np.where(which, values, np.zeros(1, values.dtype))

        parts: dict[str, Any] = {}
        for name, values in zip(COMPONENTS, batch.components.T, strict=True):
            parts |= {name: masked(values), f"_{name}": which.copy()}
        return {
            **self._not_granted(which),
            "reward_components": parts,
            "_reward_components": which.copy(),
            "cost": masked(batch.costs),
            "_cost": which.copy(),
            "score": masked(batch.scores),
            "_score": which.copy(),
            "seed": masked(batch.seeds),
            "_seed": which.copy(),
        }

    def _not_granted(self, which: NDArray[np.bool_]) -> dict[str, Any]:
        """The part `not_applied` of the infos of some episodes; empty where all that was set was granted."""
        if not self.batch.beyond_grant:
            return {}
        parts: dict[str, Any] = {}
        told = np.zeros(self.num_envs, bool)
        for i in np.flatnonzero(which).tolist():
            for name, reason in self.batch.not_granted(i).items():
                if name not in parts:
                    parts |= {name: np.full(self.num_envs, None, object), f"_{name}": told & False}
                parts[name][i], parts[f"_{name}"][i], told[i] = reason, True, True
        return {"not_applied": parts, "_not_applied": told} if parts else {}
