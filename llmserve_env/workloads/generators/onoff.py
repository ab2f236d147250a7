"""On/off arrivals: silences, then bursts of a drawn rate and length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmserve_env.errors import InputError
from llmserve_env.workloads.generators.phases import PHASES_A_BLOCK, PhasedArrivals
from llmserve_env.workloads.parameters import parameter


@dataclass(frozen=True)
class OnOff(PhasedArrivals):
    """Exponential silences between bursts whose length and rate are uniform; it starts with a silence."""

    off_s: float = parameter("off", 60.0, "mean silence (s)", above=0)
    on_min_s: float = parameter("on_min", 10.0, "shortest burst (s)", above=0)
    on_max_s: float = parameter("on_max", 50.0, "longest burst (s)", above=0)
    burst_min_rps: float = parameter("burst_min", 5.0, "lowest rate of a burst (requests/s)", above=0)
    burst_max_rps: float = parameter("burst_max", 25.0, "highest rate of a burst (requests/s)", above=0)
    shape: float = parameter(
        "shape", 1.0, "Gamma shape of the gaps within a burst; 1 is Poisson", at_least=0.01
    )
    rate_rps: float | None = parameter(
        "rate", None, "mean requests per second; scales the bursts' rates", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on_max_s < self.on_min_s:
            raise InputError(f"expected a number >= on_min ({self.on_min_s:g})", field="on_max")
        if self.burst_max_rps < self.burst_min_rps:
            raise InputError(f"expected a number >= burst_min ({self.burst_min_rps:g})", field="burst_max")

    @property
    def mean_rate_rps(self) -> float:
        """Long-run requests per second."""
        return self.rate_rps or self._own_rate_rps

    @property
    def _own_rate_rps(self) -> float:
        on_s = (self.on_min_s + self.on_max_s) / 2
        return (self.burst_min_rps + self.burst_max_rps) / 2 * on_s / (on_s + self.off_s)

    @property
    def gap_shape(self) -> float:
        """Gamma shape of the gaps in operational time."""
        return self.shape

    def phases(self, rng: np.random.Generator) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Endless blocks of phases: their lengths (s) and rates (requests/s)."""
        scale, bursts = self.mean_rate_rps / self._own_rate_rps, PHASES_A_BLOCK // 2
        while True:
            lengths_s, rates_rps = np.zeros((bursts, 2)), np.zeros((bursts, 2))
            lengths_s[:, 0] = rng.exponential(self.off_s, bursts)
            lengths_s[:, 1] = rng.uniform(self.on_min_s, self.on_max_s, bursts)
            rates_rps[:, 1] = rng.uniform(self.burst_min_rps, self.burst_max_rps, bursts) * scale
            yield lengths_s.ravel(), rates_rps.ravel()
