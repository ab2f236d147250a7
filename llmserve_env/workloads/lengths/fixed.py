"""Lengths that are all the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmserve_env.workloads.lengths.law import LengthLaw, TokenPairs


@dataclass(frozen=True)
class FixedLengths(LengthLaw):
    """Every request has the same prompt and output length (tokens)."""

    prompt_tokens: int
    output_tokens: int

    def sample(self, seed: np.random.SeedSequence, n: int) -> TokenPairs:
        """Give n equal pairs; the seed changes nothing."""
        return np.full(n, self.prompt_tokens, np.int64), np.full(n, self.output_tokens, np.int64)
