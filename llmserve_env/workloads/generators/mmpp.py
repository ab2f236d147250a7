"""Markov-modulated arrivals: the rate moves through states in turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmserve_env.errors import InputError
from llmserve_env.workloads.generators.phases import PHASES_A_BLOCK, PhasedArrivals
from llmserve_env.workloads.parameters import parameter


@dataclass(frozen=True)
class MMPP(PhasedArrivals):
    """States visited in turn, exponential dwell times; Poisson within a state, or Gamma gaps.

    It starts in a state drawn by the time that the states hold.
    """

    rates_rps: tuple[float, ...] = parameter(
        "rates", (4.0, 12.0), "requests per second in each state", at_least=0
    )
    dwells_s: tuple[float, ...] = parameter(
        "dwells", (60.0, 20.0), "mean dwell time of each state (s)", above=0
    )
    shape: float = parameter(
        "shape", 1.0, "Gamma shape of the gaps within a state; 1 is Poisson", at_least=0.01
    )
    rate_rps: float | None = parameter(
        "rate", None, "mean requests per second; scales the states' rates", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.rates_rps) != len(self.dwells_s):
            states, found = len(self.rates_rps), len(self.dwells_s)
            raise InputError(
                f"expected one dwell time for each of {states} rates, found {found}", field="dwells"
            )
        if not max(self.rates_rps) > 0:
            raise InputError("expected at least one rate > 0", field="rates")

    @property
    def mean_rate_rps(self) -> float:
        """Long-run requests per second."""
        return self.rate_rps or self._own_rate_rps

    @property
    def _own_rate_rps(self) -> float:
        return float(np.average(self.rates_rps, weights=self.dwells_s))

    @property
    def gap_shape(self) -> float:
        """Gamma shape of the gaps in operational time."""
        return self.shape

    def phases(self, rng: np.random.Generator) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Endless blocks of phases: their lengths (s) and rates (requests/s)."""
        dwells = np.array(self.dwells_s)
        rates = np.array(self.rates_rps) * (self.mean_rate_rps / self._own_rate_rps)
        state = int(np.searchsorted(np.cumsum(dwells) / dwells.sum(), rng.random()))
        while True:
            states = (state + np.arange(PHASES_A_BLOCK)) % len(dwells)
            yield rng.standard_exponential(PHASES_A_BLOCK) * dwells[states], rates[states]
            state = int(states[-1]) + 1
