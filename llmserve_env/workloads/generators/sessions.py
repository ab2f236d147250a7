"""Conversations that begin at a steady rate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmserve_env.workloads.generators.conversations import Conversations
from llmserve_env.workloads.generators.generator import Generator
from llmserve_env.workloads.generators.renewal import running_sum
from llmserve_env.workloads.lengths import LengthLaw
from llmserve_env.workloads.lengths.law import streams
from llmserve_env.workloads.parameters import parameter
from llmserve_env.workloads.workload import Workload


@dataclass(frozen=True)
class Sessions(Conversations, Generator):
    """Sessions start as a Poisson process, before time 0 already."""

    rate_rps: float = parameter(
        "rate", 4.0, "mean requests per second, if no session reaches `context`", above=0
    )

    @property
    def mean_rate_rps(self) -> float:
        """Long-run requests per second."""
        return self.rate_rps

    def sample(self, seed: int, duration_s: float, lengths: LengthLaw) -> Workload:
        """The requests that arrive in 0..duration_s."""
        root = np.random.SeedSequence(seed)
        (starts,) = streams(root, 1)
        sessions_rps = self.rate_rps / self.turns
        covered_s = duration_s + self.warmup_s
        begin_s = running_sum(starts.standard_exponential, covered_s * sessions_rps) / sessions_rps
        return self.turns_of(begin_s[begin_s < covered_s] - self.warmup_s, root, duration_s, lengths)
