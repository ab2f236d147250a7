"""An agent that asks a language model behind an OpenAI-compatible endpoint.

It works at the level of the schema, `ServeObservation` in and `ServeAction` out, rather than with records as
the `Agent`s do: one episode at a time (a call takes seconds, so nothing is won by many side by side), in any
world, HTTP included, where records do not reach.

The model is asked for a JSON object, by a schema that lists each control's values (`response_format`
json_schema, strict). The schema keeps to what OpenAI's strict mode and vLLM's guided decoding both take:
type, enum, required, additionalProperties. Answers are checked against it again: not every endpoint obeys.
**Whatever is no usable answer leaves the configuration in force as it is**, and is counted by its reason.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from llmserve_env.agents.prompt import NO_ANSWER, Unusable, answer_schema, parse, prompt
from llmserve_env.errors import InputError
from llmserve_env.net.urls import without_credentials
from llmserve_env.schema import ServeAction, ServeObservation

if TYPE_CHECKING:
    import openai

    from llmserve_env.tasks.catalog import TaskInfo


_OPENAI = "https://api.openai.com/v1"


@dataclass(frozen=True)
class LLMSettings:
    """How a model is asked.

    Attributes:
        model: its name at the endpoint.
        endpoint: base URL with its /v1 (default: OpenAI's).
        api_key: for it; an endpoint that is named may need none.
        windows_per_call: windows for which an answer holds.
        history: windows that a prompt shows, at most.
        max_prompt_chars: bound of a prompt; the oldest windows are left out to keep it (characters).
        max_answer_tokens: bound of an answer (tokens).
        temperature: of sampling; None leaves it to the endpoint, as some models demand.
        timeout_s: bound of one try (s).
        max_retries: further tries after no connection, 408, 409, 429 or 5xx. The client waits 0.5 s, twice as
            long each time, up to 8 s, with jitter, or what Retry-After says up to two minutes.
        give_up_after: calls in a row without any answer after which the episode is given up: it would show
            what the configuration in force does, not what the model does.
    """

    model: str
    endpoint: str | None = field(default=None, repr=False)
    api_key: str | None = field(default=None, repr=False)
    windows_per_call: int = 1
    history: int = 4
    max_prompt_chars: int = 12_000
    max_answer_tokens: int = 512
    temperature: float | None = 0.0
    timeout_s: float = 60.0
    max_retries: int = 4
    give_up_after: int = 3

    @classmethod
    def from_environment(cls, **settings: Any) -> LLMSettings:
        """Settings whose model, endpoint and key are OPENAI_MODEL, _BASE_URL and _API_KEY unless given.

        Raises:
            InputError: there is no model's name, or neither an endpoint nor a key.
        """
        for name, variable in (("model", "MODEL"), ("endpoint", "BASE_URL"), ("api_key", "API_KEY")):
            if settings.get(name) is None:
                settings[name] = os.environ.get(f"OPENAI_{variable}")
        if not settings["model"]:
            raise InputError("expected the name of a model, here or in OPENAI_MODEL", field="model")
        if not settings["endpoint"] and not settings["api_key"]:
            raise InputError("expected an endpoint, or a key in OPENAI_API_KEY", field="endpoint")
        return cls(**settings)

    def __post_init__(self) -> None:
        for name in ("windows_per_call", "history", "max_answer_tokens", "give_up_after"):
            if getattr(self, name) < 1:
                raise InputError(f"expected 1 or more, found {getattr(self, name)}", field=name)
        if self.max_retries < 0:
            raise InputError(f"expected 0 or more, found {self.max_retries}", field="max_retries")


@dataclass
class LLMUsage:
    """What asking came to in an episode.

    Attributes:
        calls: to the endpoint, retries not counted.
        retries: of the client's.
        fallbacks: calls without a usable answer by reason (NO_ANSWER, NO_ACTION).
        prompt_tokens: as the endpoint counted them.
        completion_tokens: as the endpoint counted them.
        uncounted: answers for which the endpoint gave no token counts.
        latency_s: of each call, retries and waits included (s).
    """

    calls: int = 0
    retries: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    latency_s: list[float] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        """All that, ready for JSON."""
        latency = np.array(self.latency_s)
        return {
            "calls": self.calls,
            "retries": self.retries,
            "fallbacks": dict(sorted(self.fallbacks.items())),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "uncounted": self.uncounted,
            "latency_s": {
                "mean": float(latency.mean()),
                "p50": float(np.percentile(latency, 50)),
                "p99": float(np.percentile(latency, 99)),
            },
        }


class LLMPolicy:
    """Plays episodes by asking a model.

    Args:
        settings: how it is asked.

    Attributes:
        settings: as given.
        usage: of the episode.

    Raises:
        InputError: there is neither an endpoint nor a key, or the `openai` package is missing.

    Example:
        >>> with LLMPolicy(LLMSettings("tiny", "http://127.0.0.1:8101/v1")) as policy:
        ...     policy.reset(task_info(task), seed)
        ...     while not observation.done:
        ...         observation = episode.step(policy.act(observation))
    """

    def __init__(self, settings: LLMSettings) -> None:
        try:
            import openai
        except ImportError as error:
            raise InputError("the openai package is missing: install llmserve-env[server]") from error
        self.settings = settings
        self.usage = LLMUsage()
        if not settings.endpoint and not settings.api_key:
            raise InputError("expected an endpoint or a key", field="endpoint")
        self._client = openai.OpenAI(
            base_url=settings.endpoint or _OPENAI,
            api_key=settings.api_key or "none",
            timeout=settings.timeout_s,
            max_retries=settings.max_retries,
        )
        self._brief: TaskInfo | None = None
        self._in_force = ServeAction()
        self._seen: deque[ServeObservation] = deque(maxlen=settings.history)
        self._seed = self._windows = self._without_answer = 0

    def __enter__(self) -> LLMPolicy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    @property
    def endpoint(self) -> str:
        """Base URL without credentials."""
        return without_credentials(str(self._client.base_url))

    def reset(self, brief: TaskInfo, seed: int) -> None:
        """Begin an episode.

        Args:
            brief: of the task.
            seed: of the episode; the endpoint gets its remainder by 2**31, which every one takes.

        Raises:
            InputError: the bound of the prompt leaves no room for a window.
        """
        self._brief, self._in_force, self._seed = brief, brief.start, seed % 2**31
        self._windows = self._without_answer = 0
        self._seen.clear()
        self.usage = LLMUsage()

    def act(self, observation: ServeObservation) -> ServeAction:
        """The configuration for the next window.

        Raises:
            InputError: no episode has begun; the endpoint turned the key or the model's name down (401, 403,
                404), or gave no answer `give_up_after` times in a row.
        """
        if self._brief is None:
            raise InputError("call reset before act")
        self._seen.append(observation)
        self._windows += 1
        if (self._windows - 1) % self.settings.windows_per_call:
            return self._in_force
        self.usage.calls += 1
        begun = time.perf_counter()
        try:
            self._in_force = parse(self._ask(self._brief), self._brief)
        except Unusable as error:
            self.usage.fallbacks[error.reason] += 1
            self._without_answer = self._without_answer + 1 if error.reason in NO_ANSWER else 0
            if self._without_answer >= self.settings.give_up_after:
                raise InputError(
                    f"{self.endpoint} gave no answer {self._without_answer} times in a row, the last: {error}"
                ) from error
        else:
            self._without_answer = 0
        finally:
            self.usage.latency_s.append(time.perf_counter() - begun)
        return self._in_force

    def _ask(self, brief: TaskInfo) -> str:
        """The text of the model's answer.

        Raises:
            Unusable: there is none.
            InputError: no further call can have one.
        """
        import openai

        try:
            answer = self._client.chat.completions.with_raw_response.create(**self._request(brief))
            self.usage.retries += answer.retries_taken
            return self._text(answer.parse())
        except openai.APIError as error:
            self.usage.retries += int(error.request.headers.get("x-stainless-retry-count", 0))
            if isinstance(error, openai.APIStatusError) and error.status_code in (401, 403, 404):
                raise InputError(f"{self.endpoint}: {error.message}", field="endpoint") from error
            raise Unusable(_reason(error), error.message) from error
        except ValueError as error:  # a body that is no JSON
            raise Unusable("malformed", str(error)) from error

    def _request(self, brief: TaskInfo) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": self.settings.model,
            "messages": prompt(
                brief,
                list(self._seen),
                self._in_force,
                held_s=brief.window_s * self.settings.windows_per_call,
                max_chars=self.settings.max_prompt_chars,
            ),
            "max_completion_tokens": self.settings.max_answer_tokens,
            "seed": self._seed,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "configuration", "strict": True, "schema": answer_schema(brief)},
            },
        }
        if self.settings.temperature is not None:
            request["temperature"] = self.settings.temperature
        return request

    def _text(self, completion: openai.types.chat.ChatCompletion) -> str:
        # The client does not validate what it parses: anything can be missing or of another type.
        try:
            choice = completion.choices[0]
            message, end = choice.message, choice.finish_reason
            refusal, content = message.refusal, message.content
        except (AttributeError, IndexError, TypeError) as error:
            raise Unusable("malformed", "no chat completion") from error
        try:
            assert completion.usage is not None
            self.usage.prompt_tokens += completion.usage.prompt_tokens
            self.usage.completion_tokens += completion.usage.completion_tokens
        except (AssertionError, AttributeError, TypeError):
            self.usage.uncounted += 1
        if refusal or end == "content_filter":
            raise Unusable("refused", str(refusal or end))
        if end == "length":
            raise Unusable("truncated", f"at {self.settings.max_answer_tokens} tokens")
        if not isinstance(content, str) or not content.strip():
            raise Unusable("empty", "no text")
        return content


def _reason(error: openai.APIError) -> str:
    import openai

    if isinstance(error, openai.APITimeoutError):
        return "timeout"
    if isinstance(error, openai.APIConnectionError):
        return "connection"
    if isinstance(error, openai.APIStatusError):
        if error.status_code == 429:
            return "rate_limited"
        return "server_error" if error.status_code >= 500 else "rejected"
    return "malformed"
