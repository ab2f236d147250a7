"""Requests that stand for those that an agent cannot see: what came, by its counts, and what may come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmserve_env.tasks import TRAINING_SEEDS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmserve_env.tasks import Task

LOG_SEEDS = TRAINING_SEEDS[-4:]
"""Seeds whose episodes are the past: the last ones of training, which nobody plays by counting from 0."""

_MOST_SCALE = 4.0
"""Bound of the factor that brings drawn prompts to a window's sum of tokens: few draws may miss it widely."""


@dataclass(frozen=True)
class Requests:
    """Requests in order of arrival.

    Attributes:
        arrival_s: float64[k], since the episode's start (s).
        prompt_tokens: int64[k].
        output_tokens: int64[k].
        tenant: int64[k].
    """

    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    tenant: NDArray[np.int64]


class PastTraffic:
    """Lengths of the requests that each tenant sent in other episodes, as an operator has them in its logs.

    Nothing of the episode that is played is known beforehand, and of the others neither when requests came
    nor at which rates. In a task on a trace, episodes are stretches of one trace, and some of the lengths may
    be those of the stretch that is played.

    Args:
        task: the task that is played.

    Attributes:
        most: requests of the longest of those episodes, for an idea of the memory that is needed.
    """

    def __init__(self, task: Task) -> None:
        past = [task.requests(seed) for seed in LOG_SEEDS]
        tenant = np.concatenate([each.tenant for each in past])
        prompts = np.concatenate([each.prompt_tokens for each in past]).astype(np.int64)
        outputs = np.concatenate([each.output_tokens for each in past]).astype(np.int64)
        self.most = max(len(each) for each in past)
        self._lengths = []
        for index in range(len(task.tenants)):
            own = tenant == index if (tenant == index).any() else np.ones(len(tenant), bool)
            self._lengths.append(np.stack([prompts[own], outputs[own]]))

    def told(
        self,
        rng: np.random.Generator,
        counts: NDArray[np.int64],
        prompt_tokens: int,
        start_s: float,
        end_s: float,
    ) -> Requests:
        """Requests such as a window's record tells of.

        Args:
            rng: draws.
            counts: int64[tenant], how many arrived.
            prompt_tokens: prompt tokens of all of them; drawn prompts are scaled to it.
            start_s: start of the window (s).
            end_s: end of the window (s).
        """
        drawn = self._drawn(rng, counts, start_s, end_s)
        total = int(drawn.prompt_tokens.sum())
        if not total:
            return drawn
        scale = min(max(prompt_tokens / total, 1 / _MOST_SCALE), _MOST_SCALE)
        prompts = np.maximum(np.rint(drawn.prompt_tokens * scale), 1).astype(np.int64)
        return Requests(drawn.arrival_s, prompts, drawn.output_tokens, drawn.tenant)

    def expected(
        self, rng: np.random.Generator, rates: NDArray[np.float64], start_s: float, end_s: float
    ) -> Requests:
        """Poisson arrivals at float64[tenant] rates (requests/s)."""
        return self._drawn(rng, rng.poisson(rates * (end_s - start_s)), start_s, end_s)

    def _drawn(
        self, rng: np.random.Generator, counts: NDArray[np.int64], start_s: float, end_s: float
    ) -> Requests:
        """So many requests of each tenant, at any time in between, with lengths of the past."""
        tenant = rng.permutation(np.repeat(np.arange(len(counts)), counts))
        arrival_s = np.sort(rng.uniform(start_s, end_s, len(tenant)))
        lengths = np.zeros((2, len(tenant)), np.int64)
        for index, known in enumerate(self._lengths):
            own = np.flatnonzero(tenant == index)
            lengths[:, own] = known[:, rng.integers(known.shape[1], size=len(own))]
        return Requests(arrival_s, lengths[0], lengths[1], tenant)
