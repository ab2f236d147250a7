"""What a generator of requests is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from llmserve_env.workloads.lengths import LengthLaw
from llmserve_env.workloads.parameters import Parameters
from llmserve_env.workloads.workload import Workload


@dataclass(frozen=True)
class Generator(Parameters, ABC):
    """A seeded source of requests.

    One seed gives one endless stream: a longer duration adds requests and changes none.
    """

    DURATION_S: ClassVar[float] = 600.0
    """Duration when none is asked for (s)."""

    @property
    @abstractmethod
    def mean_rate_rps(self) -> float:
        """Long-run requests per second."""

    @property
    def longest_s(self) -> float:
        """Duration beyond which it has nothing (s)."""
        return float("inf")

    @abstractmethod
    def sample(self, seed: int, duration_s: float, lengths: LengthLaw) -> Workload:
        """The requests that arrive in 0..duration_s."""


@dataclass(frozen=True)
class ArrivalProcess(Generator):
    """A generator whose lengths do not depend on its arrivals."""

    @abstractmethod
    def arrivals(self, seed: np.random.SeedSequence, duration_s: float) -> NDArray[np.float64]:
        """float64[n], ascending times in 0..duration_s (s)."""

    def sample(self, seed: int, duration_s: float, lengths: LengthLaw) -> Workload:
        """The requests that arrive in 0..duration_s."""
        arrival_s = self.arrivals(np.random.SeedSequence(seed, spawn_key=(0,)), duration_s)
        prompt_tokens, output_tokens = lengths.sample(
            np.random.SeedSequence(seed, spawn_key=(1,)), len(arrival_s)
        )
        return Workload(
            arrival_s=arrival_s,
            prompt_tokens=prompt_tokens.astype(np.int32),
            output_tokens=output_tokens.astype(np.int32),
            tenant=np.zeros(len(arrival_s), np.int16),
        )
