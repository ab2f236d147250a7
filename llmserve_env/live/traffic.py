"""What is sent: a task's requests within bounds, and text for them."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llmserve_env.live.settings import EndpointSettings
    from llmserve_env.workloads.workload import Workload

_WORDS = tuple(
    word
    for line in (
        "the of and to in is that for it as with be on not this are or by from at which an have one can all",
        "when will more if no out so what up use new time than only may first other two also any like into",
    )
    for word in line.split()
)
"""Frequent words, which the vocabularies of most models hold as one token each."""


@dataclass(frozen=True)
class Cuts:
    """What the bounds took from an episode's requests.

    Attributes:
        requests: requests of the task, with this seed.
        left_out: of those, never sent: their windows had too many.
        prompts_shortened: of those sent.
        answers_shortened: of those sent.
    """

    requests: int
    left_out: int
    prompts_shortened: int
    answers_shortened: int


def bounded(workload: Workload, window_s: float, settings: EndpointSettings) -> tuple[Workload, Cuts]:
    """The requests of an episode that are sent: of each window the first so many, with bounded lengths."""
    window = (workload.arrival_s // window_s).astype(np.int64)
    place = np.arange(len(workload)) - np.searchsorted(window, window)  # within its window
    kept = workload.take(np.flatnonzero(place < settings.max_requests_per_step))
    cuts = Cuts(
        requests=len(workload),
        left_out=len(workload) - len(kept),
        prompts_shortened=int((kept.prompt_tokens > settings.max_prompt_tokens).sum()),
        answers_shortened=int((kept.output_tokens > settings.max_completion_tokens).sum()),
    )
    sent = replace(
        kept,
        prompt_tokens=np.minimum(kept.prompt_tokens, settings.max_prompt_tokens),
        output_tokens=np.minimum(kept.output_tokens, settings.max_completion_tokens),
    )
    return sent, cuts


class Prompts:
    """Text for the requests of a workload: random, equal where the workload says that prompts share a prefix.

    Args:
        workload: the workload, which gives lengths and prefixes.
        seed: seed of the episode; the same request of the same episode has the same prompt.
        token_ids: token ids, as `EndpointSettings.token_ids`.
    """

    def __init__(self, workload: Workload, seed: int, token_ids: tuple[int, int] | None) -> None:
        self._workload = workload
        self._seed = seed
        self._token_ids = token_ids

    def of(self, index: int) -> str | list[int]:
        """The prompt of a request: text, or token ids."""
        workload = self._workload
        length = int(workload.prompt_tokens[index])
        drawn: list[int] = []
        if workload.prefix_block_tokens:
            low, high = workload.prefix_offsets[index : index + 2]
            for depth, block in enumerate(workload.prefix_ids[low:high].tolist()):
                if len(drawn) >= length:
                    break
                drawn += self._draw(f"{self._seed} {depth} {block}", workload.prefix_block_tokens)
        drawn += self._draw(f"{self._seed} request {index}", max(length - len(drawn), 0))
        drawn = drawn[:length]
        return drawn if self._token_ids else " ".join(_WORDS[each] for each in drawn)

    def _draw(self, key: str, count: int) -> list[int]:
        low, high = self._token_ids or (0, len(_WORDS))
        return random.Random(key).choices(range(low, high), k=count)
