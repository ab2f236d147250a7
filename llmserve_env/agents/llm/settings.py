"""How a language model is asked, and its name among the agents: llm:MODEL@URL."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

from llmserve_env.errors import InputError

LLM = "llm:"

_ADDRESS = re.compile(r"llm:(?P<model>[^?]+?)(@(?P<url>https?://[^?]+))?(\?(?P<settings>.*))?")
_SECRET = ("model", "endpoint", "api_key")


@dataclass(frozen=True)
class LLMSettings:
    """How a model is asked.

    Attributes:
        model: name of the model at the endpoint.
        endpoint: base URL with its /v1 (default: OpenAI's).
        api_key: key for the endpoint; one that is named may need none.
        windows_per_call: windows for which an answer holds.
        history: windows that a prompt shows, at most.
        max_prompt_chars: bound of a prompt; the oldest windows are left out to keep it (characters).
        max_answer_tokens: bound of an answer (tokens).
        temperature: sampling temperature; None leaves it to the endpoint, as some models demand.
        timeout_s: bound of one attempt (s).
        max_retries: more attempts after no connection, 408, 409, 429 or 5xx. The client waits 0.5 s, twice as
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


def llm_settings(plays: str) -> LLMSettings:
    """How a model is asked.

    Args:
        plays: llm:MODEL[@URL][?NAME=VALUE&...], with the base URL of the endpoint (default: OPENAI_BASE_URL,
            else OpenAI's) and fields of `LLMSettings`, such as windows_per_call=6. The key is that of
            OPENAI_API_KEY.

    Raises:
        InputError: it cannot be read, or the URL has a password, which scores would tell.
    """
    found = _ADDRESS.fullmatch(plays)
    if found is None:
        raise InputError(f"expected llm:MODEL@URL?NAME=VALUE, found {plays!r}", field="agents")
    if urlsplit(found["url"] or "").username is not None:
        raise InputError("expected a URL without credentials: scores tell it", field="agents")
    known = {each.name: each.type for each in fields(LLMSettings) if each.name not in _SECRET}
    settings: dict[str, Any] = {}
    for pair in found["settings"].split("&") if found["settings"] else ():
        name, _, text = pair.partition("=")
        if name not in known:
            raise InputError(f"expected one of {', '.join(known)}, found {name!r}", field="agents")
        try:
            value = json.loads(text)
            settings[name] = {"int": int, "float": float}[str(known[name]).split(" ")[0]](value)
        except (ValueError, TypeError) as error:
            if text == "null" and "None" in str(known[name]):
                settings[name] = None
                continue
            raise InputError(f"expected a number, found {text!r}", field=name) from error
    return LLMSettings.from_environment(model=found["model"], endpoint=found["url"], **settings)


def llm_label(plays: str) -> str:
    """Under which it is reported."""
    found = _ADDRESS.fullmatch(plays)
    return plays if found is None else LLM + found["model"]
