"""Many clients in one window of time, each with its own rate and law of gaps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WINDOW_S = 600.0
"""ServeGen re-draws a client's rate and law every 10 minutes (Xiang et al., ServeGen, arXiv 2505.09999)."""


_LONGEST_GAP = 1e290
"""Weibull shapes near 0 draw infinite gaps, and a window of them has no length."""


def fill_window(
    rng: np.random.Generator,
    start_s: float,
    rate_rps: NDArray[np.float64],
    shape: NDArray[np.float64],
    weibull: NDArray[np.bool_],
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Arrivals of clients in one window.

    A client sends rate * 600 requests, rounded up or down at random so that the mean is kept. Its gaps, one
    more than its requests, have its law's shape and are scaled to fill the window, as ServeGen scales them
    to a rate (ServeGen draws no last gap, and so puts a client's last request at the window's end).

    Args:
        rng: draws the window.
        start_s: its start (s).
        rate_rps: float64[clients].
        shape: float64[clients], of the gaps' law.
        weibull: bool[clients], Weibull gaps, otherwise Gamma.

    Returns:
        float64[n] ascending times (s) and int64[n] clients.
    """
    counts = np.floor(rate_rps * WINDOW_S + rng.random(len(rate_rps))).astype(np.int64)
    gaps_each = counts + 1
    client = np.repeat(np.arange(len(counts)), gaps_each)
    gaps = np.where(
        weibull[client],
        rng.weibull(shape[client]),
        rng.standard_gamma(shape[client]),
    )
    gaps = np.minimum(gaps, _LONGEST_GAP)
    gaps += np.finfo(np.float64).tiny  # shapes near 0 draw exact zeros, and a window of them has no length
    first = np.cumsum(gaps_each) - gaps_each
    total = np.add.reduceat(gaps, first)
    scaled = gaps / total[client]
    time = np.cumsum(scaled) - client  # every earlier client's gaps sum to 1
    last = first + counts
    inside = np.ones(len(gaps), bool)
    inside[last] = False
    time = start_s + WINDOW_S * np.clip(time[inside], 0.0, 1.0)
    order = np.argsort(time, kind="stable")
    return time[order], client[inside][order]
