"""The service as tools of a language model: typed, documented methods that answer in compact JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from llmserve_env.envs.serve_env import check_seed, draw_seed
from llmserve_env.errors import InputError
from llmserve_env.schema import ServeAction
from llmserve_env.session import LocalSession, Session

if TYPE_CHECKING:
    from llmserve_env.schema import ServeObservation
    from llmserve_env.tasks.catalog import TaskInfo

_MOST_WINDOWS = 1000
_UNSEEN = {"task_id", "reward", "done", "metadata", "in_flight", "mean_ttft_ms", "engines_split"}
"""Fields of an observation that its text leaves out, or says elsewhere."""


class _Call(ServeAction):
    """Arguments of `ServeToolEnv.set_serving_config`."""

    windows: int = Field(1, ge=1, le=_MOST_WINDOWS)


class ServeToolEnv:
    """An LLM inference service that a language model runs by calling tools.

    Every public method but `reset` and `get_reward` is a tool. A tool answers in JSON: numbers rounded to
    four digits, what is unknown left out. A call that cannot be carried out changes nothing and answers with
    `{"error": ...}`, which says what was expected, so that a model can correct itself.

    With TRL, which makes one of these for each rollout and resets it with the row of the data set:

    ```python
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from llmserve_env.envs.tool_env import ServeToolEnv

    ask = "Run this LLM service. Call set_serving_config until the episode is done; keep the SLOs."
    rows = [{"prompt": [{"role": "user", "content": ask}], "task_id": "static_workload", "horizon_s": 60.0,
             "seed": seed} for seed in range(64)]
    trainer = GRPOTrainer(
        model="Qwen/Qwen3-0.6B",
        environment_factory=ServeToolEnv,  # or functools.partial(ServeToolEnv, "http://localhost:8000")
        train_dataset=Dataset.from_list(rows),
        args=GRPOConfig(max_completion_length=4096, max_tool_calling_iterations=20),
    )
    ```

    The reward is `get_reward()`, the score so far; TRL asks for it by itself, and adds to it what reward
    functions give, which find the same as `environments[i].score`, beside `environments[i].done`. Rows with
    a `seed` have all completions of a prompt play the same episode, which is what they are compared on.

    Args:
        where: URL of a server, on which every instance has a session of its own; or a session; by default the
            episode is played in this process.

    Example:
        >>> env = ServeToolEnv()
        >>> first = env.reset(task_id="static_workload", seed=1, horizon_s=2.0)
        >>> answer = env.set_serving_config(256, 1.0, 0, "FP16", False, False, windows=2)
        >>> env.done
        True
    """

    def __init__(self, where: str | Session | None = None) -> None:
        self._session = _session(where)
        self._generator = np.random.default_rng()

    @property
    def score(self) -> float:
        """The grade so far, 0..1: what is still to come counts as nothing; 0 before an episode."""
        try:
            return float(self._session.observation().metadata["score"])
        except InputError:
            return 0.0

    @property
    def done(self) -> bool:
        """Whether the episode is over."""
        try:
            return self._session.observation().done
        except InputError:
            return False

    def reset(self, **columns: Any) -> str:
        """Begin an episode.

        Args:
            columns: `task_id` (default: static_workload), `seed` (default: one drawn from the training seeds)
                and `horizon_s`, the length of the episode (s; default: the task's). Other columns of a data
                set are not for the environment and stay unread; None is as if not given.

        Returns:
            The task, with the tenants' SLOs, and the first observation.

        Raises:
            InputError: an unknown task, or a seed or length out of its range.
        """
        seed = check_seed(columns.get("seed"))
        observation = self._session.reset(
            task_id=columns.get("task_id"),
            seed=draw_seed(self._generator) if seed is None else seed,
            horizon_s=columns.get("horizon_s"),
        )
        task = self._session.task().model_dump(
            mode="json", exclude={"start", "difficulty"}, exclude_defaults=True
        )
        return _text({"task": task, **_seen(observation, self._session.task())})

    def observe(self) -> str:
        """Look at the service: the last window's load, latencies and memory, and the configuration in force.

        Returns:
            JSON of the last observation, the score so far and the windows left.
        """
        try:
            return _text(_seen(self._session.observation(), self._session.task()))
        except InputError as error:
            return _refused(error)

    def set_serving_config(  # noqa: PLR0917 - a model names every argument
        self,
        batch_cap: int,
        kv_budget_fraction: float,
        speculation_depth: int,
        quantization_tier: Literal["FP16", "INT8", "INT4"],
        prefill_decode_split: bool,
        priority_routing: bool,
        admission_rate: float | None = None,
        windows: int = 1,
    ) -> str:
        """Set the configuration of the service and serve with it for one window of time or several.

        Args:
            batch_cap: Running sequences per engine, 1 to 512. Lowering it drains, it never preempts.
            kv_budget_fraction: Share of the KV cache that running requests may hold, 0.1 to 1.0; the rest
                keeps cached prefixes.
            speculation_depth: Draft tokens per step, 0 (no speculation) to 8.
            quantization_tier: Precision of the weights. A change takes engines out of service while they
                load.
            prefill_decode_split: Whether prefill and decode run on engines of their own. A change restarts
                engines.
            priority_routing: Whether requests of more urgent tenants go first.
            admission_rate: Requests per second that are let into the queue, up to 1000; the others are
                refused at once. Leave it out to let everybody in.
            windows: For how many windows to serve with it, 1 to 1000; it stops at the end of the episode.

        Returns:
            JSON of the last window's observation, the mean reward of the windows, the score so far, and the
            settings that had no effect with the reason.
        """
        arguments = {name: value for name, value in locals().items() if name != "self"}
        try:
            call = _Call.model_validate(arguments)
            if self.done:
                return _text({"error": "the episode is over", "score": self.score})
            rewards = self._session.step([ServeAction(**call.model_dump(exclude={"windows"}))] * call.windows)
            seen = _seen(self._session.observation(), self._session.task())
        except ValidationError as error:
            return _text({"error": [_fault(fault) for fault in error.errors()]})
        except InputError as error:
            return _refused(error)
        return _text({"windows_served": len(rewards), "mean_reward": sum(rewards) / len(rewards), **seen})

    def list_tasks(self) -> str:
        """List the tasks: what is served, for how long, and what makes each of them hard.

        Returns:
            JSON list of the tasks.
        """
        names = {"id", "title", "difficulty", "description", "window_s", "windows"}
        return _text([task.model_dump(mode="json", include=names) for task in self._session.tasks()])

    def grade(self) -> str:
        """Grade the episode once it is over.

        Returns:
            JSON of the score from 0 to 1, its parts, and how many requests met their SLO.
        """
        try:
            return _text(self._session.grade().model_dump(mode="json"))
        except InputError as error:
            return _refused(error)

    def get_reward(self) -> float:
        """Tell the score so far.

        Returns:
            The score from 0 to 1: what is still to come counts as nothing.
        """
        return self.score


def _session(where: str | Session | None) -> Session:
    if where is None:
        return LocalSession()
    if not isinstance(where, str):
        return where
    from llmserve_env.client import RemoteSession

    return RemoteSession(where)


def _seen(observation: ServeObservation, task: TaskInfo) -> dict[str, Any]:
    """An observation as a model is shown it."""
    told = observation.metadata
    window = observation.model_dump(mode="json", exclude=_UNSEEN)
    window["engines_by_tier"] = {tier: count for tier, count in window["engines_by_tier"].items() if count}
    if len(window["tenants"]) == 1:  # says the same again
        del window["tenants"]
    seen = {
        "done": observation.done,
        "windows_left": 0 if observation.done else task.windows - observation.step_index,
        "score_so_far": told["score"],
        "config_in_force": told["action"],
        "last_window": window,
    }
    return {**seen, "not_applied": told["not_applied"]} if told["not_applied"] else seen


def _refused(error: InputError) -> str:
    return _text({"error": str(error)})


def _fault(fault: Any) -> str:
    """What is wrong with an argument of `set_serving_config`, and what is expected of it."""
    name = str(fault["loc"][0])
    schema = _Call.model_json_schema()
    about = schema["properties"][name]
    if "minimum" in about:
        kind = "a whole number" if about["type"] == "integer" else "a number"
        expected = f"{kind} from {about['minimum']} to {about['maximum']}"
    elif about.get("type") == "boolean":
        expected = "true or false"
    else:
        expected = f"one of {', '.join(schema['$defs']['QuantizationTier']['enum'])}"
    return f"{name}: expected {expected}, found {fault['input']!r}"


def _text(value: Any) -> str:
    """Compact JSON."""
    return json.dumps(_short(value), separators=(",", ":"), ensure_ascii=False)


def _short(value: Any) -> Any:
    """A value without what is None, and with numbers of four digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if abs(value) < 1e4 else round(value)
    if isinstance(value, dict):
        return {name: _short(each) for name, each in value.items() if each is not None}
    return [_short(each) for each in value] if isinstance(value, list) else value
