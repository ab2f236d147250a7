"""An agent that asks a language model behind an OpenAI-compatible endpoint.

The model is asked for a JSON object, by a schema that lists each control's values (`response_format`
json_schema, strict). The schema keeps to what OpenAI's strict mode and vLLM's guided decoding both take:
type, enum, required, additionalProperties. Answers are checked against it again: not every endpoint obeys.
**Whatever is no usable answer leaves the configuration in force as it is**, and is counted by its reason.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from llmserve_env.agents.llm.prompt import NO_ANSWER, Unusable, answer_schema, parse, prompt
from llmserve_env.agents.llm.settings import LLM, LLMSettings
from llmserve_env.controls import to_array
from llmserve_env.errors import InputError, missing_package
from llmserve_env.net.urls import without_credentials
from llmserve_env.observation import describe
from llmserve_env.rewards import Rewards
from llmserve_env.schema import ServeAction, ServeObservation
from llmserve_env.tasks.catalog import task_info

if TYPE_CHECKING:
    from collections.abc import Sequence

    import openai
    from numpy.typing import NDArray

    from llmserve_env.tasks import Task


_OPENAI = "https://api.openai.com/v1"


@dataclass
class LLMUsage:
    """What asking came to in an episode.

    Attributes:
        calls: to the endpoint, retries not counted.
        retries: retries by the client.
        fallbacks: calls without a usable answer by reason (NO_ANSWER, NO_ACTION).
        prompt_tokens: as the endpoint counted them.
        completion_tokens: as the endpoint counted them.
        uncounted: answers for which the endpoint gave no token counts.
        latency_s: latency of each call, retries and waits included (s).
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


@dataclass
class _Conversation:
    """What is remembered of an episode.

    Attributes:
        seed: seed for the endpoint.
        demand: float64[1], weight of all its requests.
        in_force: the configuration.
        seen: the last windows.
        windows: how many there were.
        end_s: end of the last window; one that does not end later is of an episode that is over.
        without_answer: calls in a row without any answer.
    """

    seed: int
    demand: NDArray[np.float64]
    in_force: ServeAction
    seen: deque[ServeObservation]
    windows: int = 0
    end_s: float = -1.0
    without_answer: int = 0


class LLMAgent:
    """Plays episodes by asking a model, which is shown the windows in the words of `ServeObservation`.

    A call takes seconds: nothing is won by many episodes side by side, which take turns. The reward
    that it is shown is the task's of all that was sent, as in the simulator.

    Args:
        settings: how it is asked.
        name: under which results are reported (default: "llm:" and the model's).

    Attributes:
        settings: as given.
        usage: usage of the episodes since the last reset.

    Raises:
        InputError: there is neither an endpoint nor a key, or the `openai` package is missing.

    Example:
        >>> with LLMAgent(LLMSettings("tiny", "http://127.0.0.1:8101/v1")) as agent:
        ...     play(agent, task, [seed]).scores
    """

    def __init__(self, settings: LLMSettings, name: str | None = None) -> None:
        try:
            import openai
        except ImportError as error:
            raise missing_package(error) from error
        self.name = name or LLM + settings.model
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
        self._task: Task | None = None

    def __enter__(self) -> LLMAgent:
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

    def reset(self, task: Task, seeds: Sequence[int]) -> None:
        """Begin episodes.

        Args:
            task: what is played.
            seeds: seeds of the episodes; the endpoint gets their remainders by 2**31, which every one takes.
        """
        self._task, self._brief, self._rewards = task, task_info(task), Rewards(task)
        self._episodes = [
            _Conversation(
                int(seed) % 2**31, self._demand(int(seed)), task.start, deque(maxlen=self.settings.history)
            )
            for seed in seeds
        ]
        self.usage = LLMUsage()

    def act(self, observations: NDArray[np.float32], windows: NDArray[np.void]) -> NDArray[np.void]:
        """ACTION[n], the configurations for the next window.

        Raises:
            InputError: no episode has begun; the endpoint turned the key or the model's name down (401, 403,
                404), or gave no answer `give_up_after` times in a row; the bound of the prompt leaves no room
                for a window.
        """
        if self._task is None:
            raise InputError("call reset before act")
        for index, episode in enumerate(self._episodes):
            window = windows[index : index + 1]
            if window["end_s"][0] > episode.end_s:
                self._see(episode, window)
                if (episode.windows - 1) % self.settings.windows_per_call == 0:
                    self._answer(episode)
        return to_array([episode.in_force for episode in self._episodes])

    def _demand(self, seed: int) -> NDArray[np.float64]:
        """float64[1], weight of all requests of an episode."""
        assert self._task is not None
        counts = np.bincount(self._task.requests(seed).tenant, minlength=len(self._task.tenants))
        return np.array([self._rewards.demand(counts)])

    def _see(self, episode: _Conversation, window: NDArray[np.void]) -> None:
        """Take in the last window, WINDOW[1]."""
        assert self._task is not None
        reward = 0.0
        if episode.windows:
            components, _ = self._rewards.of(window, episode.demand)
            so_far = np.zeros_like(components), np.zeros((1, 4), np.int64)
            reward = float(self._rewards.add(window, np.ones(1, bool), components, *so_far)[0])
        seen = describe(self._task, window[0], episode.windows, reward=reward, done=False, metadata={})
        episode.seen.append(seen)
        episode.windows += 1
        episode.end_s = float(window["end_s"][0])

    def _answer(self, episode: _Conversation) -> None:
        """Ask, and put into force what can be used."""
        self.usage.calls += 1
        begun = time.perf_counter()
        try:
            episode.in_force = parse(self._ask(episode), self._brief)
        except Unusable as error:
            self.usage.fallbacks[error.reason] += 1
            episode.without_answer = episode.without_answer + 1 if error.reason in NO_ANSWER else 0
            if episode.without_answer >= self.settings.give_up_after:
                raise InputError(
                    f"{self.endpoint} gave no answer {episode.without_answer} times in a row, "
                    f"the last: {error}"
                ) from error
        else:
            episode.without_answer = 0
        finally:
            self.usage.latency_s.append(time.perf_counter() - begun)

    def _ask(self, episode: _Conversation) -> str:
        """The text of the model's answer.

        Raises:
            Unusable: there is none.
            InputError: no further call can have one.
        """
        import openai

        try:
            answer = self._client.chat.completions.with_raw_response.create(**self._request(episode))
            self.usage.retries += answer.retries_taken
            return self._text(answer.parse())
        except openai.APIError as error:
            self.usage.retries += int(error.request.headers.get("x-stainless-retry-count", 0))
            if isinstance(error, openai.APIStatusError) and error.status_code in (401, 403, 404):
                raise InputError(f"{self.endpoint}: {error.message}", field="endpoint") from error
            raise Unusable(_reason(error), error.message) from error
        except ValueError as error:  # a body that is no JSON
            raise Unusable("malformed", str(error)) from error

    def _request(self, episode: _Conversation) -> dict[str, Any]:
        brief = self._brief
        request: dict[str, Any] = {
            "model": self.settings.model,
            "messages": prompt(
                brief,
                list(episode.seen),
                episode.in_force,
                held_s=brief.window_s * self.settings.windows_per_call,
                max_chars=self.settings.max_prompt_chars,
            ),
            "max_completion_tokens": self.settings.max_answer_tokens,
            "seed": episode.seed,
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
