"""Language models among the agents: llm:MODEL@URL, played as `server.baseline_inference` plays them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llmserve_env.agents.llm import LLMAgent
from llmserve_env.agents.llm_settings import llm_settings
from llmserve_env.agents.prompt import answer_schema, prompt
from llmserve_env.episode import Episode, EpisodeBatch
from llmserve_env.play import Played, play_batch
from llmserve_env.tasks import Task
from llmserve_env.tasks.catalog import task_info


@dataclass(frozen=True)
class Asked(Played):
    """What n episodes of a language model came to.

    Attributes:
        usage: what asking came to, of each.
    """

    usage: tuple[dict[str, Any], ...]


def describe_llm(plays: str, task: Task) -> dict[str, Any]:
    """What its scores depend on, without secrets: settings, endpoint and a hash of the prompt's wording."""
    settings = llm_settings(plays)
    with LLMAgent(settings) as agent:
        endpoint = agent.endpoint
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
    batches, usage = [], []
    with LLMAgent(llm_settings(plays)) as agent:
        for seed in seeds:
            batches.append(play_batch(agent, EpisodeBatch(task), [seed]))
            usage.append(agent.usage.told())
    played = Played.of(batches)
    return Asked(played.scores, played.components, played.requests, tuple(usage))
