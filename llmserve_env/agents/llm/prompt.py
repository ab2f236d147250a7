"""What a language model is asked, and what of its answers can be used."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from llmserve_env.errors import InputError
from llmserve_env.schema import ServeAction, ServeObservation

if TYPE_CHECKING:
    from llmserve_env.tasks.catalog import TaskInfo

NO_ANSWER = ("connection", "timeout", "rate_limited", "server_error", "rejected", "malformed")
"""Reasons of the endpoint's: no connection, no answer in time, 429, 5xx, another 4xx, no chat completion."""
NO_ACTION = ("truncated", "refused", "empty", "not_json", "not_in_schema")
"""Reasons of the model's: cut off at its limit, refused or filtered, no text, no JSON, a value outside."""

_TOLD_ELSEWHERE = {"metadata", "task_id", "done", "step_index", "time_s"}


class Unusable(Exception):
    """There is no usable answer; `reason` is one of NO_ANSWER and NO_ACTION."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def answer_schema(brief: TaskInfo) -> dict[str, Any]:
    """JSON schema of an answer: an object with every control that the task grants, each one of its values."""
    properties = {name: {"type": _type(values), "enum": values} for name, values in brief.controls.items()}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def parse(text: str, brief: TaskInfo) -> ServeAction:
    """The action that an answer holds; a control that the task does not grant stays as it starts.

    Raises:
        Unusable: it is not what `answer_schema` describes.
    """
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unusable("not_json", str(error)) from error
    if not isinstance(answer, dict) or set(answer) != set(brief.controls):
        raise Unusable("not_in_schema", f"expected an object with {', '.join(brief.controls)}")
    for name, value in answer.items():
        values = brief.controls[name]
        if isinstance(value, bool) != isinstance(values[0], bool) or value not in values:
            raise Unusable("not_in_schema", f"{name}: expected one of {values}")
    return ServeAction(**{**brief.start.model_dump(), **answer})


def prompt(
    brief: TaskInfo,
    seen: list[ServeObservation],
    in_force: ServeAction,
    *,
    held_s: float,
    max_chars: int,
) -> list[dict[str, str]]:
    """Messages that ask for a configuration.

    Args:
        brief: brief of the task.
        seen: the last windows, oldest first.
        in_force: the configuration of the moment.
        held_s: time for which the answer will hold (s).
        max_chars: bound of all text; as many of the last windows are shown as fit.

    Raises:
        InputError: not even one fits.
    """
    system = _system(brief, held_s)
    setting = {name: in_force.model_dump(mode="json")[name] for name in brief.controls}
    lines = [_compact(_shown(observation)) for observation in seen]
    while True:
        user = "\n".join(
            ["Last windows, oldest first:", *lines, f"In force: {_compact(setting)}", "Configuration:"]
        )
        if len(system) + len(user) <= max_chars:
            return [{"role": "system", "content": system}, {"role": "user", "content": user}]
        if len(lines) == 1:
            raise InputError(
                f"expected {len(system) + len(user)} or more, as {brief.id} needs with one window, found "
                f"{max_chars}",
                field="max_prompt_chars",
            )
        lines.pop(0)


def _system(brief: TaskInfo, held_s: float) -> str:
    tenants = [
        f"- {each.name}: {each.ttft_slo_ms:g} ms, {each.tpot_slo_ms:g} ms, weight {each.weight:g}, "
        f"priority {each.priority}"
        for each in brief.tenants
    ]
    fields = ServeAction.model_fields
    controls = [
        f"- {name}, one of {json.dumps(values)}: {fields[name].description or ''}"
        for name, values in brief.controls.items()
    ]
    return "\n".join(
        [
            f"You run an LLM inference service of {brief.engines} engine(s). {brief.description}",
            f"You set its configuration for the next {held_s:g} s from what the last windows of "
            f"{brief.window_s:g} s showed.",
            "A request earns its tenant's weight if it keeps both promises: time to first token, time per "
            "output token. Headroom, free KV memory, idle GPUs and precise weights earn a little more.",
            "Tenants (lower priority is more urgent):",
            *tenants,
            "Controls:",
            *controls,
            "Answer with one JSON object that sets every control, and nothing else.",
        ]
    )


def _shown(observation: ServeObservation) -> dict[str, Any]:
    """An observation without what the prompt says elsewhere, and without what is not there."""
    fields = observation.model_dump(mode="json", exclude=_TOLD_ELSEWHERE, exclude_none=True)
    shown: dict[str, Any] = _rounded(fields)
    return shown


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _type(values: list[Any]) -> str | list[str]:
    """JSON type of a control's values."""
    if isinstance(values[0], bool):
        return "boolean"
    if values[-1] is None:
        return ["number", "null"]
    return {int: "integer", float: "number"}.get(type(values[0]), "string")
