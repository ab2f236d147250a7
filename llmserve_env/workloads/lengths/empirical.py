"""Lengths drawn again from those of a trace."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmserve_env.workloads.lengths.law import LengthLaw, TokenPairs, streams


@dataclass(frozen=True)
class EmpiricalLengths(LengthLaw):
    """Pairs drawn with replacement: keeps the marginals and the correlation of the source.

    Attributes:
        prompt_tokens: int64[m].
        output_tokens: int64[m].
    """

    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]

    def sample(self, seed: np.random.SeedSequence, n: int) -> TokenPairs:
        """Draw n pairs."""
        (rng,) = streams(seed, 1)
        rows = (rng.random(n) * len(self.prompt_tokens)).astype(np.int64)
        return self.prompt_tokens[rows], self.output_tokens[rows]
