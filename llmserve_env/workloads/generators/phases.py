"""Gaps stretched by a rate that changes from phase to phase."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmserve_env.workloads.generators.generator import ArrivalProcess
from llmserve_env.workloads.generators.renewal import running_sum
from llmserve_env.workloads.lengths.law import streams

PHASES_A_BLOCK = 256


@dataclass(frozen=True)
class PhasedArrivals(ArrivalProcess):
    """Gamma gaps in operational time, which runs at the rate of the phase that real time is in.

    With shape 1 it is the doubly stochastic Poisson process of that rate.
    """

    @abstractmethod
    def phases(self, rng: np.random.Generator) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Endless blocks of phases: their lengths (s) and rates (requests/s), float64[k] each."""

    @property
    @abstractmethod
    def gap_shape(self) -> float:
        """Gamma shape of the gaps in operational time."""

    def arrivals(self, seed: np.random.SeedSequence, duration_s: float) -> NDArray[np.float64]:
        """float64[n], ascending times in 0..duration_s (s)."""
        phase_rng, gap_rng = streams(seed, 2)
        total, lengths, rates = 0.0, [], []
        for length_s, rate_rps in self.phases(phase_rng):
            lengths.append(length_s)
            rates.append(rate_rps)
            total += float(length_s.sum())
            if total > duration_s:
                break
        length_s = np.concatenate(lengths)
        real = np.concatenate(([0.0], np.cumsum(length_s)))
        operational = np.concatenate(([0.0], np.cumsum(length_s * np.concatenate(rates))))
        end = float(np.interp(duration_s, real, operational))
        count = running_sum(lambda n: gap_rng.standard_gamma(self.gap_shape, n) / self.gap_shape, end)
        times = np.interp(count[count < end], operational, real)
        return times[times < duration_s]
