"""LLMServe-v0: one episode at a time."""

from __future__ import annotations

import operator
import pickle
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

from llmserve_env.controls import SPECS
from llmserve_env.envs import spaces
from llmserve_env.episode import EpisodeBatch
from llmserve_env.errors import InputError
from llmserve_env.tasks import TRAINING_SEEDS, Task, load_task

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from llmserve_env.recording import Recording
    from llmserve_env.schema import EpisodeLog

RENDER_MODES = ("ansi", "rgb_array")


class LLMServeEnv(gym.Env["NDArray[np.float32]", "NDArray[np.int64]"]):
    """An agent runs an LLM inference service, window by window.

    ## Description

    A cell of vLLM-like engines serves the requests of its tenants. At the start of every window the agent
    sets the configuration of the service; it then sees what the window brought: queues, latencies, memory,
    goodput. A task fixes the cell, the traffic, what the agent may set, the length of a window and of an
    episode.

    ## Action Space

    A `MultiDiscrete`, for each control the index of a value of the task's grid (`task.grid.values`,
    ascending). A control that a task does not grant has one value.

    {controls}

    `step` also takes a record of dtype `controls.ACTION`, whose values may lie between those of the grid. A
    control that the task does not grant stays as it starts.
    `action_masks()` tells which values the cell can apply.

    ## Observation Space

    A `Box` [0, 1] float32 with an entry for each of `observation.feature_names(task)`, of the last window:
    features of the cell, what is set (`set_*`), and of each of the first tenants (`tenant_*`). A quantity
    without an upper bound is mapped by x / (x + half). docs/environments.md lists them all.

    ## Rewards

    In each window, requests that met their SLO earn their weight as a share of the weight of all requests of
    the episode, times the number of windows, parted into goodput, latency headroom, memory, cost and quality
    by the task's weights. The mean of an episode's rewards is its score, 0..1; `llmserve_env.rewards` has
    the formula.

    ## Starting State

    Empty engines in the task's starting configuration, vLLM's defaults. The traffic is drawn from the
    episode's seed: `reset(seed=n)` plays episode n, every later `reset()` draws the next seed from the
    training seeds with `np_random`. Seeds from 2**31 on are for evaluation (`tasks.EVALUATION_SEEDS`) and
    never drawn.

    ## Episode End

    1. Truncation: the horizon is reached, after `task.windows` windows.
    2. Termination: more than `task.max_in_flight` requests are in flight, where the task says so.

    ## Info

    The same keys after every reset and step: `reward_components` (float by name, they sum to the reward),
    `cost` (weight of requests that missed their SLO, in the reward's unit), `score` (so far), `seed` (of the
    episode), `action` (values in force by name, infinite where none is set), `not_applied` (controls without
    effect, with the reason).

    ## Arguments

    ```python
    >>> import gymnasium as gym
    >>> import llmserve_env
    >>> env = gym.make("LLMServe-v0", task_id="static_workload", horizon_s=120.0)
    >>> observation, info = env.reset(seed=1)
    >>> observation, reward, terminated, truncated, info = env.step(env.action_space.sample())

    ```

    | Parameter     | Type            | Default             | Description                                    |
    |---------------|-----------------|---------------------|------------------------------------------------|
    | `task_id`     | str, Path, Task | `"static_workload"` | id of a shipped task, path of a file, a task   |
    | `workload`    | str, dict       | the task's          | workload URI or scenario table                 |
    | `profile`     | str             | the task's          | hardware and model of every engine             |
    | `engines`     | int             | the task's          | engines in the cell                            |
    | `window_s`    | float           | the task's          | time between two actions (s)                   |
    | `horizon_s`   | float           | the task's          | length of an episode (s)                       |
    | `render_mode` | str             | `None`              | `"ansi"` or `"rgb_array"`: a dashboard         |

    ## Vectorized environment

    `gym.make_vec("LLMServe-v0", num_envs=64)` gives `LLMServeVectorEnv`: the same episodes in one call of
    the simulator, about six times as many steps a second.

    ## Version History

    * v0: Initial version.
    """

    metadata: dict[str, Any] = {"render_modes": list(RENDER_MODES), "render_fps": 4}  # noqa: RUF012 - as Env

    def __init__(
        self,
        task_id: str | Path | Task = "static_workload",
        *,
        workload: str | dict[str, Any] | None = None,
        profile: str | None = None,
        engines: int | None = None,
        window_s: float | None = None,
        horizon_s: float | None = None,
        render_mode: str | None = None,
    ) -> None:
        if render_mode is not None and render_mode not in RENDER_MODES:
            raise InputError(
                f"expected one of {', '.join(RENDER_MODES)}, found '{render_mode}'", field="render_mode"
            )
        self.task = open_task(
            task_id,
            workload=workload,
            profile=profile,
            engines=engines,
            window_s=window_s,
            horizon_s=horizon_s,
        )
        self.render_mode = render_mode
        self.observation_space = spaces.observation_space(self.task.groups)
        self.action_space = spaces.action_space(self.task.grid)
        self.batch = EpisodeBatch(self.task, recorded=True)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: seed of the episode (default: the next one that `np_random` draws from the training seeds).
            options: there are none.

        Returns:
            float32[features], and the info.
        """
        seed = check_seed(seed)
        super().reset(seed=seed)
        check_options(options)
        observations = self.batch.reset([draw_seed(self.np_random) if seed is None else seed])
        return observations[0], self._info()

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
        result = self.batch.step(spaces.single_action(self.task.grid, action))
        return (
            result.observations[0],
            result.rewards.item(),
            result.terminated.item(),
            result.truncated.item(),
            self._info(),
        )

    @property
    def recording(self) -> Recording:
        """The windows of the episode so far."""
        return self.batch.recordings[0]

    def action_masks(self) -> NDArray[np.bool_]:
        """bool[sum(nvec)], the values of the grid that the cell can apply, control after control.

        Raises:
            InputError: no episode has begun.
        """
        return spaces.action_mask(self.task.grid, self.batch.backend.not_applied)

    def render(self) -> Any:
        """The episode so far as a dashboard: text (str) or a picture (uint8[height, width, 3])."""
        if self.render_mode is None:
            gym.logger.warn("render() needs a render_mode: gym.make(..., render_mode='rgb_array')")
            return None
        from llmserve_env.envs import render

        draw = {"ansi": render.dashboard_text, "rgb_array": render.dashboard_image}[self.render_mode]
        recording = self.recording
        return draw(self.task, recording.windows, recording.actions, recording.components)

    def log(self) -> EpisodeLog:
        """The log of the episode so far, as the grader takes it."""
        return self.batch.log()

    def snapshot(self) -> bytes:
        """The exact state, mid-episode too, for `restore` on an environment of the same task."""
        return pickle.dumps((self.task.model_dump(), self.batch.snapshot(), self.np_random))

    def restore(self, snapshot: bytes) -> None:
        """Return to a state that `snapshot` gave: never load one from an untrusted source.

        Raises:
            InputError: it is of another task.
        """
        task, batch, generator = pickle.loads(snapshot)
        if task != self.task.model_dump():
            raise InputError(f"expected one of this task, found one of '{task['id']}'", field="snapshot")
        self.batch.restore(batch)
        self.np_random = generator

    def _info(self) -> dict[str, Any]:
        return spaces.to_info(self.batch.info())


def _control_table() -> str:
    """The controls as a table of a docstring."""
    rows = [("Num", "Control", "Values", "What it sets")]
    for number, (name, spec) in enumerate(SPECS.items()):
        rows.append((str(number), name, spec.range_text, spec.title))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))  # type: ignore[arg-type]
    return "\n    ".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    )


LLMServeEnv.__doc__ = (LLMServeEnv.__doc__ or "").replace("{controls}", _control_table())


def open_task(task_id: str | Path | Task, **changes: Any) -> Task:
    """The task that an environment plays.

    Args:
        task_id: id of a shipped task, path of a task file, or a task.
        changes: fields to replace, as `load_task` takes them; None leaves a field as it is.

    Raises:
        InputError: as `load_task`; or changes to what is a task already.
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    if not isinstance(task_id, Task):
        return load_task(task_id, **changes)
    for name in changes:
        raise InputError("a loaded task is played as it is: give the change to load_task", field=name)
    return task_id


def check_seed(seed: int | None) -> int | None:
    """The seed as a plain int, if it can be an episode's.

    Raises:
        InputError: no whole number, negative, or too large.
    """
    return None if seed is None else whole_number(seed, "seed", 0, 2**63 - 1)


def check_options(options: dict[str, Any] | None, takes: tuple[str, ...] = ()) -> None:
    """Raise InputError if a reset was given other options than it takes."""
    if not isinstance(options, Mapping | None):
        raise InputError(f"expected a dictionary, found {options!r}", field="options")
    for name in options or {}:
        if name not in takes:
            known = f"expected {', '.join(takes)}" if takes else "reset takes no options"
            raise InputError(f"{known}; seed=n plays the episode of seed n", field=name)


def whole_number(value: Any, field: str, low: int, high: int | None = None) -> int:
    """An argument that is a whole number, as a plain int.

    Args:
        value: value that was given, which may be one of NumPy's.
        field: name of the argument.
        low: least value.
        high: greatest value.

    Raises:
        InputError: it is none, or out of its range.
    """
    try:
        number = int(operator.index(value))
    except TypeError as error:
        raise InputError(f"expected a whole number, found {value!r}", field=field) from error
    if number < low or (high is not None and number > high):
        bound = f"{low} or more" if high is None else f"{low}..{high}"
        raise InputError(f"expected {bound}, found {number}", field=field)
    return number


def draw_seed(generator: np.random.Generator) -> int:
    """The next of the training seeds."""
    return int(generator.integers(TRAINING_SEEDS.start, TRAINING_SEEDS.stop))
