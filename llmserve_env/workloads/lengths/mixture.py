"""Lengths from mixtures of lognormal laws."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmserve_env.workloads.lengths.law import LengthLaw, TokenPairs, streams, whole_tokens


@dataclass(frozen=True)
class LognormalMixture:
    """A mixture of lognormal laws of one length.

    Attributes:
        components: (weight, mu, sigma) of each law, in ln tokens; the weights sum to 1.
        most: longest length; longer draws are cut to it (tokens).
    """

    components: tuple[tuple[float, float, float], ...]
    most: int

    def sample(self, seed: np.random.SeedSequence, n: int) -> NDArray[np.int64]:
        """int64[n] tokens."""
        choice, normal = streams(seed, 2)
        weight, mu, sigma = np.array(self.components).T
        part = np.searchsorted(np.cumsum(weight)[:-1] / weight.sum(), choice.random(n), side="right")
        return whole_tokens(np.exp(mu[part] + sigma[part] * normal.standard_normal(n)), self.most)


@dataclass(frozen=True)
class MixtureLengths(LengthLaw):
    """Prompt and output lengths from independent lognormal mixtures."""

    prompt: LognormalMixture
    output: LognormalMixture

    def sample(self, seed: np.random.SeedSequence, n: int) -> TokenPairs:
        """Draw n pairs."""
        entropy, key = seed.entropy, seed.spawn_key
        return (
            self.prompt.sample(np.random.SeedSequence(entropy, spawn_key=(*key, 0)), n),
            self.output.sample(np.random.SeedSequence(entropy, spawn_key=(*key, 1)), n),
        )
