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
        return times_at(real, operational, gap_rng, self.gap_shape, duration_s)


def times_at(
    real: NDArray[np.float64],
    operational: NDArray[np.float64],
    rng: np.random.Generator,
    gap_shape: float,
    duration_s: float,
) -> NDArray[np.float64]:
    """Arrivals whose gaps are Gamma in operational time.

    Args:
        real: float64[k], ascending; knots, the last one at least `duration_s` (s).
        operational: float64[k], non-decreasing from 0; requests expected up to each knot.
        rng: random generator of the gaps.
        gap_shape: Gamma shape of the gaps; 1 is Poisson.
        duration_s: end of the times (s).

    Returns:
        float64[n], ascending times in real[0]..duration_s (s). Further knots and a later end only append.
    """
    end = float(np.interp(duration_s, real, operational))
    count = running_sum(lambda n: rng.standard_gamma(gap_shape, n) / gap_shape, end, block=1024)
    times = np.interp(count[count < end], operational, real)
    return times[times < duration_s]
