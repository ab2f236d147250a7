"""The service as tools of a language model: typed, documented methods that answer in compact JSON."""

from __future__ import annotations

import json
import textwrap
from enum import Enum
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from llmserve_env.controls import SPECS, ControlSpec
from llmserve_env.envs.serve_env import check_seed, draw_seed
from llmserve_env.errors import InputError
from llmserve_env.schema import GROUPS, ServeAction
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

    def set_serving_config(self, *args: Any, **named: Any) -> str:  # noqa: D417 - see `_config_doc`
        """Set the configuration of the service and serve with it for one window of time or several.

        The task's `controls` are what can be set. Any other stays as the episode began, whatever it is set to
        here, and `not_applied` names it.

        Args:
            {controls}
            windows: For how many windows to serve with it, 1 to {most_windows}; it stops at the end of the
                episode.

        Returns:
            JSON of the last window's observation, the mean reward of the windows, the score so far, and the
            settings that had no effect with the reason.
        """
        try:
            arguments = _CONFIG.bind(self, *args, **named).arguments
        except TypeError as error:  # an argument too many, or one that is missing
            return _text({"error": str(error)})
        del arguments["self"]
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
    expected = _range(SPECS[name]) if name in SPECS else f"a whole number from 1 to {_MOST_WINDOWS}"
    return f"{name}: expected {expected}, found {fault['input']!r}"


def _range(spec: ControlSpec) -> str:
    """The values of a control in words."""
    if spec.type is bool:
        return "true or false"
    if spec.options:
        return f"one of {', '.join(spec.options)}"
    number = "a whole number" if spec.type is int else "a number"
    return (
        f"{number} up to {spec.high:g}, or none"
        if spec.optional
        else f"{number} from {spec.low} to {spec.high}"
    )


def _left_out(spec: ControlSpec) -> Any:
    """What a control is set to that is left out: without it one of every task must be given."""
    if spec.optional:
        return None
    return Parameter.empty if spec.declared.group in GROUPS else spec.value(spec.code(spec.default))


def _config_signature() -> Signature:
    """The arguments of `set_serving_config`: each control, and for how many windows."""
    parameters = [Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)]
    for name, spec in SPECS.items():
        kind: Any = Literal[spec.options] if issubclass(spec.type, Enum) else spec.type
        parameters.append(
            Parameter(
                name,
                Parameter.POSITIONAL_OR_KEYWORD,
                default=_left_out(spec),
                annotation=kind | None if spec.optional else kind,
            )
        )
    windows = Parameter("windows", Parameter.POSITIONAL_OR_KEYWORD, default=1, annotation=int)
    # What must be given comes first.
    parameters.sort(key=lambda each: each.default is not Parameter.empty)
    return Signature([*parameters, windows], return_annotation=str)


def _config_doc(doc: str) -> str:
    """Its docstring, which tells a model what each argument sets."""
    lines = []
    for name in _CONFIG.parameters:
        if name not in SPECS:
            continue
        spec, left_out = SPECS[name], _left_out(SPECS[name])
        value = "none" if left_out is None else left_out
        alone = "" if left_out is Parameter.empty else f"; {value} if left out"
        text = f"{name}: {spec.meaning} Expects {_range(spec)}{alone}."
        lines += textwrap.wrap(text, 90, subsequent_indent="    ")
    controls = "\n            ".join(lines)
    return doc.replace("{controls}", controls).replace("{most_windows}", str(_MOST_WINDOWS))


_CONFIG = _config_signature()


def _declare(method: Any) -> None:
    """Give `set_serving_config` the arguments and the docstring that follow from the controls."""
    method.__signature__ = _CONFIG
    method.__annotations__ = {
        name: parameter.annotation for name, parameter in _CONFIG.parameters.items() if name != "self"
    } | {"return": str}
    method.__doc__ = _config_doc(method.__doc__ or "")


_declare(ServeToolEnv.set_serving_config)


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
