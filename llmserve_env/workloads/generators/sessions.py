"""Conversations: each turn's prompt is the conversation so far and a new message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from llmserve_env.workloads.generators.generator import Generator
from llmserve_env.workloads.generators.renewal import running_sum
from llmserve_env.workloads.lengths import LengthLaw
from llmserve_env.workloads.lengths.law import streams, whole_tokens
from llmserve_env.workloads.parameters import parameter
from llmserve_env.workloads.workload import Workload

Values = TypeVar("Values", NDArray[np.int64], NDArray[np.float64])


@dataclass(frozen=True)
class Sessions(Generator):
    """Sessions start as a Poisson process; a session has a geometric number of turns.

    A turn follows the one before it after that one's estimated service (its output tokens times `tpot`) and
    an exponential think time: arrivals are fixed beforehand and do not wait for the server. A session ends
    when its context would exceed `context`. Sessions begin before time 0, so that the load is level from the
    start. Prefix ids name full blocks: those within the system prompt are shared by all sessions, the others
    by the turns of one. Output lengths come from the length law, prompts from the session.
    """

    WARMUP_MEANS: ClassVar[float] = 5.0
    """Sessions are drawn from this many mean session lengths before time 0."""

    rate_rps: float = parameter(
        "rate", 4.0, "mean requests per second, if no session reaches `context`", above=0
    )
    turns: float = parameter("turns", 4.0, "mean turns of a session", at_least=1)
    think_s: float = parameter("think", 60.0, "mean time from an answer to the next message (s)", at_least=0)
    tpot_s: float = parameter("tpot", 0.03, "estimated time per output token (s)", at_least=0)
    system_tokens: int = parameter("system", 512, "system prompt shared by all sessions (tokens)", at_least=0)
    first_tokens: float = parameter("first", 200.0, "median of the first message (tokens)", at_least=1)
    first_sigma: float = parameter("first_sigma", 1.0, "lognormal sigma of the first message", at_least=0)
    follow_tokens: float = parameter("follow", 60.0, "median of a later message (tokens)", at_least=1)
    follow_sigma: float = parameter("follow_sigma", 1.0, "lognormal sigma of a later message", at_least=0)
    context_tokens: int = parameter("context", 32768, "longest prompt (tokens)", at_least=1)
    block_tokens: int = parameter("block", 16, "tokens in a prefix block", at_least=1)

    @property
    def mean_rate_rps(self) -> float:
        """Long-run requests per second."""
        return self.rate_rps

    def sample(self, seed: int, duration_s: float, lengths: LengthLaw) -> Workload:
        """The requests that arrive in 0..duration_s."""
        root = np.random.SeedSequence(seed)
        starts, turn_counts, first, follow, think = streams(root, 5)
        sessions_rps = self.rate_rps / self.turns
        warmup_s = self.WARMUP_MEANS * self.turns * (self.think_s + 500 * self.tpot_s)
        begin_s = (
            running_sum(starts.standard_exponential, (duration_s + warmup_s) * sessions_rps) / sessions_rps
        )
        begin_s = begin_s[begin_s < duration_s + warmup_s] - warmup_s
        turns = turn_counts.geometric(1 / self.turns, len(begin_s))
        session = np.repeat(np.arange(len(turns)), turns)
        opening = np.flatnonzero(np.diff(session, prepend=-1))
        n = len(session)
        _, output = lengths.sample(np.random.SeedSequence(seed, spawn_key=(5,)), n)
        message = _lognormal(follow, self.follow_tokens, self.follow_sigma, n)
        message[opening] = self.system_tokens + _lognormal(
            first, self.first_tokens, self.first_sigma, len(turns)
        )
        prompt = _running(message + output, opening, session) - output
        pause_s = think.standard_exponential(n) * self.think_s + output * self.tpot_s
        arrival_s = begin_s[session] + _running(pause_s, opening, session) - pause_s
        fits = np.flatnonzero((prompt <= self.context_tokens) & (arrival_s >= 0) & (arrival_s < duration_s))
        order = fits[np.argsort(arrival_s[fits], kind="stable")]
        offsets, ids = self._blocks(prompt[order], session[order])
        return Workload(
            arrival_s=arrival_s[order],
            prompt_tokens=prompt[order].astype(np.int32),
            output_tokens=output[order].astype(np.int32),
            tenant=np.zeros(len(order), np.int16),
            prefix_block_tokens=self.block_tokens,
            prefix_offsets=offsets,
            prefix_ids=ids,
        )

    def _blocks(
        self, prompt: NDArray[np.int64], session: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        counts = prompt // self.block_tokens
        offsets = np.concatenate(([0], np.cumsum(counts)))
        depth = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)
        deepest = self.context_tokens // self.block_tokens + 1
        own = np.repeat(session, counts) * deepest + depth
        return offsets, np.where(depth < self.system_tokens // self.block_tokens, depth, own)


def _lognormal(rng: np.random.Generator, median: float, sigma: float, n: int) -> NDArray[np.int64]:
    return whole_tokens(median * np.exp(sigma * rng.standard_normal(n)), 2**31 - 1)


def _running(values: Values, opening: NDArray[np.int64], session: NDArray[np.int64]) -> Values:
    """Cumulative sums that begin anew with each session."""
    total = values.cumsum()
    before = total[opening] - values[opening]
    return total - before[session]
