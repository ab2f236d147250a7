"""The bucket that holds arrivals to an admission rate."""

from __future__ import annotations

import math
from collections.abc import Iterable

from llmserve_env.hardware.constants import constants


class TokenBucket:
    """Lets requests in at a rate, and a burst of them at once; the simulator's `lets_in`.

    Args:
        priorities: priorities that requests may have. Under priority routing the most urgent have the whole
            burst, the less urgent the smaller a part of it.
    """

    def __init__(self, priorities: Iterable[int]) -> None:
        self._ranks = sorted(set(priorities))
        self._full_s = -math.inf  # when it will be full

    def wait_s(self, rate: float | None, priority: int, by_priority: bool, now_s: float) -> float:
        """Time until it has a token for a request (s): 0 for now.

        Args:
            rate: admission rate in force (requests/s; None: all are let in).
            priority: priority of the request.
            by_priority: whether priorities share the burst.
            now_s: time of the gateway's clock (s).
        """
        if rate is None:
            return 0.0
        burst_s = constants().admission.burst_s
        if by_priority:
            burst_s *= 1 - self._ranks.index(priority) / len(self._ranks)
        full_s = max(self._full_s, now_s) + 1 / rate
        wait_s = full_s - now_s - max(burst_s, 1 / rate)
        return wait_s if wait_s > 1e-9 else 0.0  # sums of 1 / rate are not exact

    def take(self, rate: float | None, now_s: float) -> None:
        """A request takes its token."""
        if rate is not None:
            self._full_s = max(self._full_s, now_s) + 1 / rate
