"""The bucket that holds arrivals to an admission rate."""

from __future__ import annotations

import math
from collections.abc import Iterable

from llmserve_env.hardware.constants import constants


class TokenBucket:
    """Lets sequences in at a rate, and a burst of them at once.

    With requests of one sequence it is the simulator's `lets_in`. A request takes a token for each of its
    sequences, all at once. One that needs more than a burst gets in when the bucket is full, and those after
    it wait until its tokens are there.

    Under priority routing the most urgent have the whole burst, the less urgent the smaller a part of it.
    What the less urgent take counts against the more urgent up to that part, and leaves them a token.

    Args:
        priorities: priorities that requests may have.
    """

    def __init__(self, priorities: Iterable[int]) -> None:
        self._ranks = sorted(set(priorities))
        self._full_s = [-math.inf] * len(self._ranks)  # when it will be full, as each rank sees it

    def wait_s(
        self, rate: float | None, sequences: int, priority: int, by_priority: bool, now_s: float
    ) -> float:
        """Time until it has the tokens for a request (s): 0 for now.

        Args:
            rate: admission rate in force (sequences/s; None: all are let in).
            sequences: sequences of the request.
            priority: priority of the request.
            by_priority: whether priorities share the burst.
            now_s: time of the gateway's clock (s).
        """
        if rate is None:
            return 0.0
        rank, need_s = self._ranks.index(priority), sequences / rate
        full_s = max(self._full_s[rank if by_priority else -1], now_s) + need_s
        wait_s = full_s - now_s - max(self._burst_s(rank, by_priority), need_s)
        return wait_s if wait_s > 1e-9 else 0.0  # sums of 1 / rate are not exact

    def take(
        self, rate: float | None, sequences: int, priority: int, by_priority: bool, now_s: float
    ) -> None:
        """A request takes its tokens. Arguments as of `wait_s`."""
        if rate is None:
            return
        taker = self._ranks.index(priority) if by_priority else 0
        for rank in range(len(self._ranks)):
            full_s = max(self._full_s[rank], now_s) + sequences / rate
            if rank < taker:  # more urgent
                part_s = min(self._burst_s(taker, True), max(self._burst_s(rank, True) - 1 / rate, 0.0))
                full_s = max(min(full_s, now_s + part_s), self._full_s[rank])
            self._full_s[rank] = full_s

    def _burst_s(self, rank: int, by_priority: bool) -> float:
        """What a rank may take at once, as time at the rate (s)."""
        burst_s = constants().admission.burst_s
        return burst_s * (1 - rank / len(self._ranks)) if by_priority else burst_s
