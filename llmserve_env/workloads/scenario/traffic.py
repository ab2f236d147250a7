"""What one tenant of a scenario sends, given how its rate changes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmserve_env.workloads.generators.conversations import Conversations
from llmserve_env.workloads.generators.phases import times_at
from llmserve_env.workloads.lengths import LengthLaw
from llmserve_env.workloads.lengths.law import streams
from llmserve_env.workloads.workload import Workload


@dataclass(frozen=True)
class Traffic(ABC):
    """Requests of one tenant.

    Attributes:
        lengths: law of their lengths; of conversations it gives the outputs.
    """

    lengths: LengthLaw

    @abstractmethod
    def sample(
        self,
        seed: np.random.SeedSequence,
        edges_s: NDArray[np.float64],
        rates_rps: NDArray[np.float64],
        duration_s: float,
    ) -> Workload:
        """The requests that arrive in 0..duration_s.

        Args:
            seed: seed of this tenant alone.
            edges_s: float64[s + 1], from 0 to beyond `duration_s` (s).
            rates_rps: float64[s], requests per second between them.
            duration_s: end of the arrivals (s).
        """


@dataclass(frozen=True)
class Independent(Traffic):
    """Requests on their own, with Gamma gaps that the rate stretches.

    Attributes:
        gap_shape: Gamma shape of the gaps; 1 is Poisson, below 1 bursty.
    """

    gap_shape: float = 1.0

    def sample(
        self,
        seed: np.random.SeedSequence,
        edges_s: NDArray[np.float64],
        rates_rps: NDArray[np.float64],
        duration_s: float,
    ) -> Workload:
        """The requests that arrive in 0..duration_s."""
        (gaps,) = streams(seed, 1)
        arrival_s = times_at(edges_s, _expected(edges_s, rates_rps), gaps, self.gap_shape, duration_s)
        lengths_seed = np.random.SeedSequence(seed.entropy, spawn_key=(*seed.spawn_key, 1))
        prompt_tokens, output_tokens = self.lengths.sample(lengths_seed, len(arrival_s))
        return Workload(
            arrival_s=arrival_s,
            prompt_tokens=prompt_tokens.astype(np.int32),
            output_tokens=output_tokens.astype(np.int32),
            tenant=np.zeros(len(arrival_s), np.int16),
        )


@dataclass(frozen=True)
class Conversing(Traffic):
    """Sessions that begin as a Poisson process of the rate over the mean turns; later turns follow them.

    Sessions of the time before 0 begin at the first rate.

    Attributes:
        conversations: what a session holds.
    """

    conversations: Conversations

    def sample(
        self,
        seed: np.random.SeedSequence,
        edges_s: NDArray[np.float64],
        rates_rps: NDArray[np.float64],
        duration_s: float,
    ) -> Workload:
        """The requests that arrive in 0..duration_s."""
        (starts,) = streams(seed, 1)
        edges_s = np.concatenate(([-self.conversations.warmup_s], edges_s))
        rates_rps = np.concatenate((rates_rps[:1], rates_rps))
        begun = _expected(edges_s, rates_rps / self.conversations.turns)
        begin_s = times_at(edges_s, begun, starts, 1.0, duration_s)
        return self.conversations.turns_of(begin_s, seed, duration_s, self.lengths)


def _expected(edges_s: NDArray[np.float64], rates_rps: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate(([0.0], np.cumsum(np.diff(edges_s) * rates_rps)))
