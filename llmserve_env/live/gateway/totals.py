"""What has been counted since a gateway began: by tenant, never falling."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Literal, get_args

Outcome = Literal["completed", "failed", "refused", "given_up", "rejected"]
"""How a request ended; refused: it was not let in, given up: its client went away, rejected: by its upstream,
for a mistake of its client."""

REQUEST_BOUNDS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
"""Of times to first token, as vLLM's `time_to_first_token_seconds`."""
TOKEN_BOUNDS_S = (
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
"""Of times between tokens, as vLLM's `inter_token_latency_seconds`, with 5 ms for what is faster."""
WHOLE_BOUNDS_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
)  # fmt: skip
"""Of whole requests, as vLLM's `e2e_request_latency_seconds`."""

_KEPT = 4096


@dataclass
class Distribution:
    """A histogram as Prometheus has it.

    Attributes:
        bounds: upper bounds of the buckets, inclusive; above the last there is one more.
        counts: observations by bucket.
        sum: sum of all observations.
    """

    bounds: tuple[float, ...]
    counts: list[int] = field(init=False)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float, count: int = 1) -> None:
        """Observe a value, so many times."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count


class Totals:
    """Counts of one tenant. A request counts once for each of its sequences.

    Attributes:
        arrived: requests.
        outcomes: requests that are over by how they ended.
        in_slo: completed within the SLO.
        prompt_tokens: prompt tokens of the requests that arrived.
        output_tokens: output tokens that came.
        ttft_s: times to first token.
        itl_s: times between the pieces of an answer.
        tpot_s: time per output token after the first, of completed requests.
        e2e_s: from arrival to the last token, of completed requests.
        recent_ttft_s: the last ones, for who takes them away.
        recent_tpot_s: the last ones, likewise.
    """

    def __init__(self) -> None:
        self.arrived = 0
        self.outcomes: Counter[Outcome] = Counter(dict.fromkeys(get_args(Outcome), 0))
        self.in_slo = 0
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.ttft_s = Distribution(REQUEST_BOUNDS_S)
        self.itl_s = Distribution(TOKEN_BOUNDS_S)
        self.tpot_s = Distribution(TOKEN_BOUNDS_S)
        self.e2e_s = Distribution(WHOLE_BOUNDS_S)
        self.recent_ttft_s: deque[float] = deque(maxlen=_KEPT)
        self.recent_tpot_s: deque[float] = deque(maxlen=_KEPT)

    @property
    def in_flight(self) -> int:
        """Requests that are not over."""
        return self.arrived - self.outcomes.total()
