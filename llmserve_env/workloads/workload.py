"""What a server is asked to do: requests in order of arrival, and the tenants who send them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from llmserve_env.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

LATEST_S = 1e12
"""Latest arrival: what comes later than in 30,000 years is no traffic, but times in another unit."""


@dataclass(frozen=True)
class Tenant:
    """A client of the service with its own promises.

    Attributes:
        name: unique within a workload.
        weight: worth of one of its requests relative to the other tenants' (> 0).
        ttft_slo_s: time to first token that it was promised (s).
        tpot_slo_s: time per output token that it was promised (s).
        patience_s: it gives up a request that has not been started on by then (s; inf: never).
        deadline_s: it gives up a request whose last token has not come by then, however far it is (s; inf:
            never). Both count from when an attempt is sent.
        retries: how often it sends a request again that it gave up or that was refused, 0 to 100.
        retry_after_s: how long it waits before that (s); doubles with every further attempt, up to 16 times.
            The default of half a second is that of the OpenAI client, which waits up to 8 s.
        priority: vLLM's request priority, lower is served first.
        speculation_class: workload class that sets how many draft tokens are accepted
            (a class of the hardware profile, such as "chat", "math" or "ngram").
    """

    name: str = "default"
    weight: float = 1.0
    ttft_slo_s: float = 2.0
    tpot_slo_s: float = 0.1
    patience_s: float = float("inf")
    deadline_s: float = float("inf")
    retries: int = 0
    retry_after_s: float = 0.5
    priority: int = 0
    speculation_class: str = "chat"


@dataclass(frozen=True)
class Workload:
    """Requests in order of arrival.

    Attributes:
        arrival_s: float64[n], seconds since the start, non-decreasing.
        prompt_tokens: int32[n], >= 1.
        output_tokens: int32[n], >= 1.
        tenant: int16[n], index into `tenants`.
        tenants: who sends them.
        prefix_block_tokens: tokens in one hashed prefix block (0: the prompts share nothing).
        prefix_offsets: int64[n + 1], request i owns prefix_ids[prefix_offsets[i]:prefix_offsets[i + 1]].
        prefix_ids: int64[m], block hashes; equal ids at equal depth mean equal text up to there.
            The last block of a prompt may be partial.
        request_ids: names from the source, in order; empty for "0", "1", ...
        source: URI or file it came from.
    """

    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    tenant: NDArray[np.int16]
    tenants: tuple[Tenant, ...] = (Tenant(),)
    prefix_block_tokens: int = 0
    prefix_offsets: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    prefix_ids: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    request_ids: tuple[str, ...] = ()
    source: str = ""

    def __post_init__(self) -> None:
        n = len(self.arrival_s)
        for name, dtype in (
            ("arrival_s", np.float64),
            ("prompt_tokens", np.int32),
            ("output_tokens", np.int32),
            ("tenant", np.int16),
            ("prefix_offsets", np.int64),
            ("prefix_ids", np.int64),
        ):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype=dtype))
        for name in ("prompt_tokens", "output_tokens", "tenant"):
            if len(getattr(self, name)) != n:
                raise InputError(f"has {len(getattr(self, name))} rows, arrival_s has {n}", field=name)
        if n == 0:
            return
        if not np.isfinite(self.arrival_s).all() or self.arrival_s[0] < 0:
            raise InputError("expected finite seconds >= 0", field="arrival_s")
        if self.arrival_s[-1] > LATEST_S:
            raise InputError(
                f"expected seconds up to {LATEST_S:g}, found {self.arrival_s[-1]:g}", field="arrival_s"
            )
        if (np.diff(self.arrival_s) < 0).any():
            raise InputError("expected non-decreasing arrival times", field="arrival_s")
        for name in ("prompt_tokens", "output_tokens"):
            if getattr(self, name).min() < 1:
                raise InputError("expected at least 1 token in every request", field=name)
        if self.tenant.min() < 0 or self.tenant.max() >= len(self.tenants):
            raise InputError(f"expected indices in 0..{len(self.tenants) - 1}", field="tenant")
        if self.prefix_block_tokens and len(self.prefix_offsets) != n + 1:
            raise InputError(
                f"expected {n + 1} offsets, found {len(self.prefix_offsets)}", field="prefix_offsets"
            )
        if self.prefix_block_tokens:
            total = len(self.prefix_ids)
            ends = (int(self.prefix_offsets[0]), int(self.prefix_offsets[-1]))
            if ends != (0, total) or (np.diff(self.prefix_offsets) < 0).any():
                raise InputError(f"expected offsets that rise from 0 to {total}", field="prefix_offsets")

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def duration_s(self) -> float:
        """Time of the last arrival (s)."""
        return float(self.arrival_s[-1]) if len(self) else 0.0

    def request_id(self, index: int) -> str:
        """Name of a request: the source's own, or its index."""
        return self.request_ids[index] if self.request_ids else str(index)

    def take(self, index: NDArray[np.int64]) -> Workload:
        """The requests at `index` (int64[k], in order of arrival), with their prefixes and names."""
        offsets, ids = self.prefix_offsets, self.prefix_ids
        if self.prefix_block_tokens:
            offsets, ids = taken_blocks(offsets, ids, index)
        return replace(
            self,
            arrival_s=self.arrival_s[index],
            prompt_tokens=self.prompt_tokens[index],
            output_tokens=self.output_tokens[index],
            tenant=self.tenant[index],
            prefix_offsets=offsets,
            prefix_ids=ids,
            request_ids=tuple(self.request_ids[i] for i in index) if self.request_ids else (),
        )

    def scaled(self, rate_factor: float) -> Workload:
        """The same requests arriving `rate_factor` times as fast."""
        if not rate_factor > 0:
            raise InputError(f"expected a factor > 0, found {rate_factor}", field="scale")
        return replace(self, arrival_s=self.arrival_s / rate_factor)

    def tiled(self, requests: int) -> Workload:
        """The workload repeated end to end until it has `requests` requests.

        A mean inter-arrival gap separates the copies. Prefix blocks are not repeated: a copy's
        prompts would all hit the first copy's cache.
        """
        n = len(self)
        if n == 0:
            raise InputError("cannot repeat an empty workload")
        copies, index = np.divmod(np.arange(requests), n)
        period_s = self.duration_s * (n + 1) / n
        return replace(
            self,
            arrival_s=self.arrival_s[index] + copies * period_s,
            prompt_tokens=self.prompt_tokens[index],
            output_tokens=self.output_tokens[index],
            tenant=self.tenant[index],
            prefix_block_tokens=0,
            prefix_offsets=np.zeros(1, np.int64),
            prefix_ids=np.zeros(0, np.int64),
            request_ids=(),
        )


def taken_blocks(
    offsets: NDArray[np.int64], ids: NDArray[np.int64], index: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Prefix offsets and ids, as in `Workload`, of the requests at `index` (int64[k])."""
    counts = np.diff(offsets)[index]
    starts = offsets[:-1][index]
    taken = np.concatenate(([0], np.cumsum(counts)))
    return taken, ids[np.arange(taken[-1]) + np.repeat(starts - taken[:-1], counts)]
