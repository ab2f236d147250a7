"""The numbers in `data/constants.toml`: host overhead, speculation, quality, switching and KV transfer."""

from __future__ import annotations

import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat, field_validator

from llmserve_env.errors import InputError
from llmserve_env.hardware.profile import Record, Source, TierName
from llmserve_env.schema import bounds

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_DEPTH: int = bounds("speculation_depth")["le"]
"""Draft tokens of one verification step, at most."""

_FILE = Path(__file__).parent / "data" / "constants.toml"


class Sourced(Record):
    """Base of the tables.

    Attributes:
        source: where the figures come from.
        assumption: whether no measurement stands behind them.
    """

    source: Source
    assumption: bool = False


class Host(Sourced):
    """The engine's own work between iterations.

    Attributes:
        overhead_us: what it adds to each iteration, on any hardware (us).
    """

    overhead_us: NonNegativeFloat


class Speculation(Sourced):
    """How many tokens a class of requests gains by speculation, and what drafting costs.

    Attributes:
        tokens_per_step: [MAX_DEPTH + 1], mean tokens that a step emits with 0..MAX_DEPTH draft tokens.
        draft_layers: decoder layers that run for each draft token.
        draft_head: whether an LM head runs for each draft token.
    """

    tokens_per_step: Annotated[
        tuple[Annotated[float, Field(ge=1)], ...], Field(min_length=MAX_DEPTH + 1, max_length=MAX_DEPTH + 1)
    ]
    draft_layers: Annotated[int, Field(ge=0)]
    draft_head: bool

    @field_validator("tokens_per_step")
    @classmethod
    def _possible(cls, tokens: tuple[float, ...]) -> tuple[float, ...]:
        if any(value > depth + 1 for depth, value in enumerate(tokens)):
            raise ValueError("a step with d draft tokens emits at most d + 1")
        if any(a > b for a, b in pairwise(tokens)):
            raise ValueError("expected numbers that do not fall with depth")
        return tokens


class Admission(Sourced):
    """The token bucket in front of the queue.

    Attributes:
        burst_s: what a full bucket holds, in seconds of its rate (s).
    """

    burst_s: PositiveFloat


class Quality(Sourced):
    """Answers of a precision.

    Attributes:
        score: on benchmarks, relative to bf16.
    """

    score: Annotated[float, Field(gt=0, le=1)]


class Switching(Sourced):
    """What an engine pays for another precision or another role.

    Attributes:
        restart_s: process, memory, compilation and graphs (s), for engines of any size.
        weight_load_gb_per_s: from storage to the GPU (GB/s).
    """

    restart_s: NonNegativeFloat
    weight_load_gb_per_s: PositiveFloat

    def duration_s(self, weight_bytes: float) -> float:
        """Seconds that an engine is away while it restarts with weights of this size."""
        return self.restart_s + weight_bytes / (self.weight_load_gb_per_s * 1e9)


class KvTransfer(Sourced):
    """A link between a prefill engine and a decode engine.

    Attributes:
        gpus: those whose engines it joins by default, as the driver names them.
        bandwidth_gb_per_s: bandwidth of one GPU in one direction (GB/s).
        latency_ms: before the first byte (ms).
    """

    gpus: tuple[str, ...]
    bandwidth_gb_per_s: PositiveFloat
    latency_ms: NonNegativeFloat

    def duration_s(self, kv_bytes: float, gpu_count: int = 1) -> float:
        """Seconds to move a KV cache between engines of `gpu_count` GPUs each."""
        return self.latency_ms * 1e-3 + kv_bytes / (self.bandwidth_gb_per_s * 1e9 * gpu_count)


class Constants(Record):
    """All of the file.

    Attributes:
        host: the engine's own work.
        speculation: by class of requests: "chat", "math", "ngram".
        admission: the token bucket of `ServeAction.admission_rate`.
        quality: by precision.
        switching: cost of another precision or role.
        kv_transfer: by link: "nvlink4", "nvlink3", "rdma", "pcie5", "pcie4".
    """

    host: Host
    speculation: dict[str, Speculation]
    admission: Admission
    quality: dict[TierName, Quality]
    switching: Switching
    kv_transfer: dict[str, KvTransfer]

    def kv_link(self, gpu: str) -> KvTransfer:
        """The link that joins engines on this GPU by default.

        Args:
            gpu: its name, as the driver reports it (`Profile.gpu.name`).

        Raises:
            InputError: no link names that GPU.
        """
        for link in self.kv_transfer.values():
            if gpu in link.gpus:
                return link
        known = sorted(name for link in self.kv_transfer.values() for name in link.gpus)
        raise InputError(f"no KV link is known for {gpu!r}: expected one of {', '.join(known)}", field="gpu")


@cache
def constants() -> Constants:
    """The shipped constants. Cached; leave them unchanged."""
    return Constants.model_validate(tomllib.loads(_FILE.read_text(encoding="utf-8")))
