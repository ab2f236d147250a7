"""Conversations: each turn's prompt is the conversation so far and a new message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from llmserve_env.errors import InputError
from llmserve_env.workloads.lengths import LengthLaw
from llmserve_env.workloads.lengths.law import streams, whole_tokens
from llmserve_env.workloads.parameters import Parameters, parameter
from llmserve_env.workloads.workload import Workload

Values = TypeVar("Values", NDArray[np.int64], NDArray[np.float64])


@dataclass(frozen=True)
class Conversations(Parameters):
    """What the sessions hold that begin at given times; a session has a geometric number of turns.

    A turn follows the one before it after that one's estimated service (its output tokens times `tpot`) and
    an exponential think time: arrivals are fixed beforehand and do not wait for the server. A session ends
    when its context would exceed `context`. Prefix ids name full blocks: those within the system prompt are
    shared by all sessions, the others by the turns of one. Output lengths come from the length law, prompts
    from the session.
    """

    WARMUP_MEANS: ClassVar[float] = 5.0
    """Sessions are to be drawn from this many mean session lengths before time 0."""

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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context_tokens <= self.system_tokens:
            raise InputError(
                f"expected more tokens than system ({self.system_tokens}), found {self.context_tokens}",
                field="context",
            )

    @property
    def warmup_s(self) -> float:
        """Sessions that begin this long before time 0 make the load level from the start (s)."""
        return self.WARMUP_MEANS * self.turns * (self.think_s + 500 * self.tpot_s)

    def turns_of(
        self,
        begin_s: NDArray[np.float64],
        seed: np.random.SeedSequence,
        duration_s: float,
        lengths: LengthLaw,
    ) -> Workload:
        """The requests of sessions.

        Args:
            begin_s: float64[n], ascending; when each session begins, negative for warm-up (s). Further ones
                at the end leave the turns of the others as they are.
            seed: its child 0 is left for whoever draws `begin_s`.
            duration_s: only turns that arrive in 0..duration_s are kept.
            lengths: lengths of the outputs.
        """
        _, turn_counts, first, follow, think = streams(seed, 5)
        turns = turn_counts.geometric(1 / self.turns, len(begin_s))
        session = np.repeat(np.arange(len(turns)), turns)
        opening = np.flatnonzero(np.diff(session, prepend=-1))
        n = len(session)
        lengths_seed = np.random.SeedSequence(seed.entropy, spawn_key=(*seed.spawn_key, 5))
        _, output = lengths.sample(lengths_seed, n)
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
