"""Forecasts of how many requests each tenant will send, from how many it has sent."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class RateForecast:
    """Arrival rates of the tenants of n episodes: what they were lately is what they will be.

    An exponential average over windows, and a test for a change of regime: where the last `recent` windows,
    or the very last one, hold more or fewer arrivals than the average explains, what was before is
    forgotten. The average is a discounted count over as much discounted time, without bias for a Poisson
    process from the first window on, but for the test's rare false alarms.

    It foresees nothing: a rush is in the forecast when it is in the records.

    Args:
        episodes: n.
        tenants: tenants of the task.
        window_s: between two observations (s).
        memory_s: time constant of the average (s).
        recent: windows that show a new regime.
        surprise: standard deviations of a Poisson count that are taken for one. Arrivals that come in bunches
            vary more than a Poisson process, hence not 3.

    Attributes:
        rates: float64[n, tenant], forecast arrivals (requests/s); 0 before anything was seen.
    """

    def __init__(
        self,
        episodes: int,
        tenants: int,
        window_s: float,
        *,
        memory_s: float = 60.0,
        recent: int = 2,
        surprise: float = 4.0,
    ) -> None:
        self._window_s = window_s
        self._decay = math.exp(-window_s / memory_s)
        self._surprise = surprise
        self._counts = np.zeros((episodes, tenants))
        self._time_s = np.zeros((episodes, tenants))
        self._last = np.zeros((recent, episodes, tenants))
        self._seen = np.zeros(episodes, np.int64)
        self.rates = np.zeros((episodes, tenants))

    def see(self, arrived: NDArray[np.int64], which: NDArray[np.bool_] | None = None) -> None:
        """Add a window.

        Args:
            arrived: int64[n, tenant], requests that came in it.
            which: bool[n], the episodes that it is of (default: all); the others stay as they are.
        """
        rows = np.flatnonzero(np.ones(len(self.rates), bool) if which is None else which)
        self._last[:, rows] = np.roll(self._last[:, rows], 1, axis=0)
        self._last[0, rows] = arrived[rows]
        rates, known = self.rates[rows], self._seen[rows] >= len(self._last)
        self._counts[rows] = self._counts[rows] * self._decay + arrived[rows]
        self._time_s[rows] = self._time_s[rows] * self._decay + self._window_s
        for span in range(len(self._last), 0, -1):  # the shorter span has the last word
            count, time_s = self._last[:span, rows].sum(axis=0), span * self._window_s
            expected = rates * time_s
            other = np.abs(count - expected) > self._surprise * np.sqrt(np.maximum(expected, 1.0))
            new = other & known[:, None]
            self._counts[rows] = np.where(new, count, self._counts[rows])
            self._time_s[rows] = np.where(new, time_s, self._time_s[rows])
        self._seen[rows] += 1
        self.rates[rows] = self._counts[rows] / self._time_s[rows]
