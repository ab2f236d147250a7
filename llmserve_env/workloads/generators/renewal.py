"""Independent gaps of one law: Poisson, Gamma and Weibull renewal arrivals."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import gamma

import numpy as np
from numpy.typing import NDArray

from llmserve_env.workloads.generators.generator import ArrivalProcess
from llmserve_env.workloads.parameters import parameter


@dataclass(frozen=True)
class Renewal(ArrivalProcess):
    """Independent gaps of mean 1/rate; the first request comes one gap after the start."""

    rate_rps: float = parameter("rate", 8.0, "mean requests per second", above=0)

    @property
    def mean_rate_rps(self) -> float:
        """Long-run requests per second."""
        return self.rate_rps

    @abstractmethod
    def unit_gaps(self, rng: np.random.Generator, n: int) -> NDArray[np.float64]:
        """float64[n], gaps of mean 1."""

    def arrivals(self, seed: np.random.SeedSequence, duration_s: float) -> NDArray[np.float64]:
        """float64[n], ascending times in 0..duration_s (s)."""
        rng = np.random.default_rng(seed)
        times = running_sum(lambda n: self.unit_gaps(rng, n), duration_s * self.rate_rps) / self.rate_rps
        return times[times < duration_s]


@dataclass(frozen=True)
class Poisson(Renewal):
    """Exponential gaps: CV 1, index of dispersion 1 at every scale."""

    def unit_gaps(self, rng: np.random.Generator, n: int) -> NDArray[np.float64]:
        """float64[n], gaps of mean 1."""
        return rng.standard_exponential(n)


@dataclass(frozen=True)
class Gamma(Renewal):
    """Gamma gaps: CV = shape ** -0.5; the index of dispersion tends to 1/shape at long scales."""

    shape: float = parameter("shape", 0.5, "shape of the gaps; 1 is Poisson, below 1 bursty", at_least=0.01)

    def unit_gaps(self, rng: np.random.Generator, n: int) -> NDArray[np.float64]:
        """float64[n], gaps of mean 1."""
        return rng.standard_gamma(self.shape, n) / self.shape


@dataclass(frozen=True)
class Weibull(Renewal):
    """Weibull gaps: heavier-tailed than Gamma gaps of the same CV where the shape is below 1."""

    shape: float = parameter("shape", 0.5, "shape of the gaps; 1 is Poisson, below 1 bursty", at_least=0.1)

    def unit_gaps(self, rng: np.random.Generator, n: int) -> NDArray[np.float64]:
        """float64[n], gaps of mean 1."""
        return rng.weibull(self.shape, n) / gamma(1 + 1 / self.shape)


def running_sum(
    draw: Callable[[int], NDArray[np.float64]], end: float, block: int = 4096
) -> NDArray[np.float64]:
    """Cumulative sums of positive draws, up to the first block that passes `end`.

    Draws in blocks of one size, so that a later end only appends.
    """
    drawn, total = [], 0.0
    while total <= end:
        drawn.append(draw(block))
        total += float(drawn[-1].sum())
    return np.cumsum(np.concatenate(drawn))
