"""Language models among the agents: llm:MODEL@URL, played as `server.baseline_inference` plays them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from llmserve_env.agents.llm import LLMPolicy, LLMSettings
from llmserve_env.agents.play import Played
from llmserve_env.agents.prompt import answer_schema, prompt
from llmserve_env.episode import Episode
from llmserve_env.errors import InputError
from llmserve_env.tasks import Task
from llmserve_env.tasks.catalog import task_info

LLM = "llm:"

_ADDRESS = re.compile(r"llm:(?P<model>[^?]+?)(@(?P<url>https?://[^?]+))?(\?(?P<settings>.*))?")
_SECRET = ("model", "endpoint", "api_key")


@dataclass(frozen=True)
class Asked(Played):
    """What n episodes of a language model came to.

    Attributes:
        usage: what asking came to, of each.
    """

    usage: tuple[dict[str, Any], ...]


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


def describe_llm(plays: str, task: Task) -> dict[str, Any]:
    """What its scores depend on, without secrets: settings, endpoint and a hash of the prompt's wording."""
    settings = llm_settings(plays)
    with LLMPolicy(settings) as policy:
        endpoint = policy.endpoint
    brief = task_info(task)
    told = {name: value for name, value in asdict(settings).items() if name != "api_key"}
    first = prompt(
        brief,
        [Episode(task).reset(0)],
        brief.start,
        held_s=brief.window_s * settings.windows_per_call,
        max_chars=settings.max_prompt_chars,
    )
    wording = json.dumps([first, answer_schema(brief)])
    return {**told, "endpoint": endpoint, "prompt": hashlib.sha256(wording.encode()).hexdigest()[:16]}


def play_llm(plays: str, task: Task, seeds: Sequence[int]) -> Asked:
    """Play episodes, one after the other.

    Raises:
        InputError: the endpoint cannot be used, or gave up answering.
    """
    brief, batches, usage = task_info(task), [], []
    with LLMPolicy(llm_settings(plays)) as policy:
        for seed in seeds:
            episode = Episode(task)
            observation = episode.reset(seed)
            policy.reset(brief, seed)
            while not observation.done:
                observation = episode.step(policy.act(observation))
            batches.append(episode.batch)
            usage.append(policy.usage.told())
    return Asked(
        np.concatenate([batch.scores for batch in batches]),
        np.concatenate([batch.totals for batch in batches]),
        np.concatenate([batch.requests for batch in batches]),
        tuple(usage),
    )
