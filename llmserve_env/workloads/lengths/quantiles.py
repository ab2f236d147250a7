"""Lengths from published quantiles."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from llmserve_env.workloads.lengths.law import LengthLaw, TokenPairs, streams, whole_tokens


@dataclass(frozen=True)
class QuantileCurve:
    """Laws that pass through given quantiles and are lognormal between them.

    ln(tokens) is linear in the normal score of the probability from one quantile to the next, goes on below
    the first one, and ends at the last one.

    Attributes:
        probability: float64[k], ascending, each inside 0..1.
        tokens: float64[laws, k], non-decreasing along a row, > 0.
    """

    probability: NDArray[np.float64]
    tokens: NDArray[np.float64]

    def at(self, score: NDArray[np.float64], law: NDArray[np.int64] | int = 0) -> NDArray[np.int64]:
        """int64[n] tokens at normal scores float64[n], of the law in row `law` (int64[n] or one for all)."""
        knots = np.array([NormalDist().inv_cdf(p) for p in self.probability])
        logs = np.log(self.tokens)
        score = np.minimum(score, knots[-1])
        left = np.clip(np.searchsorted(knots, score) - 1, 0, len(knots) - 2)
        share = (score - knots[left]) / (knots[left + 1] - knots[left])
        low, high = logs[law, left], logs[law, left + 1]
        return whole_tokens(np.exp(low + share * (high - low)), int(self.tokens.max()))


@dataclass(frozen=True)
class QuantileLengths(LengthLaw):
    """Prompt and output lengths through quantiles, tied by a Gaussian copula.

    Attributes:
        prompt: law of the prompt length.
        output: law of the output length.
        score_correlation: correlation of their normal scores.
    """

    prompt: QuantileCurve
    output: QuantileCurve
    score_correlation: float = 0.0

    def sample(self, seed: np.random.SeedSequence, n: int) -> TokenPairs:
        """Draw n pairs."""
        prompt_rng, output_rng = streams(seed, 2)
        prompt, own = prompt_rng.standard_normal(n), output_rng.standard_normal(n)
        tie = self.score_correlation
        return self.prompt.at(prompt), self.output.at(tie * prompt + np.sqrt(1 - tie**2) * own)
