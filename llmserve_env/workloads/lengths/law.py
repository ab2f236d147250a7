"""What a length law is."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

TokenPairs = tuple[NDArray[np.int64], NDArray[np.int64]]
"""int64[n] prompt tokens and int64[n] output tokens, all >= 1."""


class LengthLaw(ABC):
    """Joint law of a request's prompt and output length.

    Drawing more requests with the same seed keeps the first ones.
    """

    @abstractmethod
    def sample(self, seed: np.random.SeedSequence, n: int) -> TokenPairs:
        """Draw n pairs."""


def streams(seed: np.random.SeedSequence, count: int) -> list[np.random.Generator]:
    """Independent generators, so that one quantity's draws never shift another's.

    The children are derived by position: calling this twice with one seed gives the same streams.
    """
    return [
        np.random.default_rng(np.random.SeedSequence(seed.entropy, spawn_key=(*seed.spawn_key, child)))
        for child in range(count)
    ]


def whole_tokens(values: NDArray[np.float64], most: int) -> NDArray[np.int64]:
    """Round to whole tokens in 1..most."""
    return np.clip(np.rint(values), 1, most).astype(np.int64)
