"""A population of clients with skewed rates and drifting gap laws, in the manner of ServeGen and BurstGPT."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmserve_env.workloads.generators.generator import ArrivalProcess
from llmserve_env.workloads.generators.windows import WINDOW_S, fill_window
from llmserve_env.workloads.lengths.law import streams
from llmserve_env.workloads.parameters import parameter

GAMMA_SHARE = 0.75
"""Three in four of ServeGen's client windows are fitted by Gamma gaps, the rest by Weibull."""

SHAPES = (0.1, 2.6)
"""Range of the clients' gap shapes in ServeGen."""


@dataclass(frozen=True)
class Clients(ArrivalProcess):
    """Clients with Zipf rates; each 600 s a client is active or silent and has a new rate and gap shape.

    The total rate varies with its clients': `rate` is its long-run mean. Shapes are lognormal between clients
    and, around a client's own, between windows.
    """

    rate_rps: float = parameter("rate", 8.0, "mean requests per second of all clients", above=0)
    clients: int = parameter("clients", 100, "number of clients", at_least=1, at_most=100_000)
    skew: float = parameter("skew", 1.2, "Zipf exponent of the clients' rates", at_least=0)
    active: float = parameter(
        "active", 0.8, "share of the windows in which a client is active", above=0, at_most=1
    )
    shape: float = parameter(
        "shape", 0.55, "median gap shape over clients", at_least=SHAPES[0], at_most=SHAPES[1]
    )
    spread: float = parameter("spread", 0.7, "standard deviation of ln shape between clients", at_least=0)
    drift: float = parameter(
        "drift", 0.6, "standard deviation of ln shape between a client's windows", at_least=0
    )
    redraw: float = parameter("redraw", 0.8, "CV of a client's rate between its active windows", at_least=0)

    @property
    def mean_rate_rps(self) -> float:
        """Long-run requests per second."""
        return self.rate_rps

    def arrivals(self, seed: np.random.SeedSequence, duration_s: float) -> NDArray[np.float64]:
        """float64[n], ascending times in 0..duration_s (s)."""
        population, *windows = streams(seed, 1 + int(np.ceil(duration_s / WINDOW_S)))
        share = np.arange(1, self.clients + 1) ** -self.skew
        mean_rps = self.rate_rps * share / share.sum()
        own_shape = self.shape * np.exp(self.spread * population.standard_normal(self.clients))
        weibull = population.random(self.clients) >= GAMMA_SHARE
        sigma = np.sqrt(np.log1p(self.redraw**2))
        times = []
        for index, rng in enumerate(windows):
            factor = np.exp(sigma * rng.standard_normal(self.clients) - sigma**2 / 2)
            factor *= (rng.random(self.clients) < self.active) / self.active
            shape = np.clip(own_shape * np.exp(self.drift * rng.standard_normal(self.clients)), *SHAPES)
            times.append(fill_window(rng, index * WINDOW_S, mean_rps * factor, shape, weibull)[0])
        arrival_s = np.concatenate(times)
        return arrival_s[arrival_s < duration_s]
