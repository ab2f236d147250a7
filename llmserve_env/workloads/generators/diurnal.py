"""A daily wave: Poisson arrivals whose rate is a sine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from llmserve_env.workloads.generators.generator import ArrivalProcess
from llmserve_env.workloads.generators.renewal import running_sum
from llmserve_env.workloads.lengths.law import streams
from llmserve_env.workloads.parameters import parameter


@dataclass(frozen=True)
class Diurnal(ArrivalProcess):
    """Rate at time t: rate * (1 - amplitude * cos(2 pi t / period)); it starts in the trough.

    Drawn by thinning a Poisson process of the highest rate (Lewis and Shedler, 1979).
    """

    DURATION_S: ClassVar[float] = 86400.0

    rate_rps: float = parameter("rate", 1.0, "mean requests per second over a period", above=0)
    amplitude: float = parameter("amplitude", 0.84, "swing relative to the mean", at_least=0, at_most=1)
    period_s: float = parameter("period", 86400.0, "length of a day (s)", above=0)

    @property
    def mean_rate_rps(self) -> float:
        """Long-run requests per second."""
        return self.rate_rps

    def arrivals(self, seed: np.random.SeedSequence, duration_s: float) -> NDArray[np.float64]:
        """float64[n], ascending times in 0..duration_s (s)."""
        gap_rng, keep_rng = streams(seed, 2)
        top_rps = self.rate_rps * (1 + self.amplitude)
        times = running_sum(gap_rng.standard_exponential, duration_s * top_rps) / top_rps
        rate_rps = self.rate_rps * (1 - self.amplitude * np.cos(2 * np.pi * times / self.period_s))
        kept = keep_rng.random(len(times)) * top_rps < rate_rps
        return times[kept & (times < duration_s)]
