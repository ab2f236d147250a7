"""A workload of several tenants whose regimes change within an episode."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from llmserve_env.errors import InputError
from llmserve_env.workloads.generators.generate import MAX_REQUESTS
from llmserve_env.workloads.scenario.regimes import Regime, Visits, draw_visits
from llmserve_env.workloads.scenario.traffic import Traffic
from llmserve_env.workloads.workload import Tenant, Workload, taken_blocks

_STREAM = 2**31 + 2  # spawn key, apart from those of the generators and of mixes of tenants


@dataclass(frozen=True)
class Scenario:
    """Tenants and the regimes that their rates follow.

    One seed gives one endless stream: a longer duration adds requests and changes none. The regimes, and
    each tenant by its position, have random numbers of their own: another rate or length law of one tenant
    leaves the requests of the others as they are.

    Attributes:
        tenants: k tenants.
        traffic: what each of them sends.
        regimes: each is visited once a cycle.
        shuffled: each cycle is in a random order; otherwise as listed, from a random one on.
    """

    tenants: tuple[Tenant, ...]
    traffic: tuple[Traffic, ...]
    regimes: tuple[Regime, ...]
    shuffled: bool = True

    def sample(self, seed: int, duration_s: float) -> Workload:
        """The requests that arrive in 0..duration_s; there may be none.

        Args:
            seed: >= 0; the same one gives the same requests, bit for bit.
            duration_s: time to cover (s).

        Raises:
            InputError: the duration is not > 0, or so long that too many requests would arrive.
        """
        edges_s, regime, factor = self._visits(seed, duration_s).segments(self.regimes)
        rates_rps = self._rates_rps[regime] * factor[:, None]
        parts = [
            traffic.sample(
                np.random.SeedSequence(seed, spawn_key=(_STREAM, index + 1)),
                edges_s,
                rates_rps[:, index],
                duration_s,
            )
            for index, traffic in enumerate(self.traffic)
        ]
        return _merged(parts, self.tenants)

    def timeline(self, seed: int, duration_s: float) -> list[tuple[float, str]]:
        """When each visit to a regime begins in 0..duration_s (s), and the regime's name, in order.

        A regime that ends one cycle and begins the next is named twice.
        """
        visits = self._visits(seed, duration_s)
        return [
            (start_s, self.regimes[index].name)
            for start_s, index in zip(visits.edges_s[:-1].tolist(), visits.regime.tolist(), strict=True)
            if start_s < duration_s
        ]

    @property
    def mean_rates_rps(self) -> NDArray[np.float64]:
        """float64[k], long-run requests per second of each tenant, spikes included.

        Of a tenant with sessions it is the rate if no session reaches the longest context.
        """
        dwell_s = np.array([regime.mean_dwell_s for regime in self.regimes])
        factor = np.array([regime.mean_factor for regime in self.regimes])
        mean: NDArray[np.float64] = (dwell_s * factor) @ self._rates_rps / dwell_s.sum()
        return mean

    def scaled(self, factor: float) -> Scenario:
        """The same regimes with all rates multiplied by `factor` (> 0)."""
        if not (factor > 0 and isfinite(factor)):
            raise InputError(f"expected a factor > 0, found {factor}", field="scale")
        return replace(
            self,
            regimes=tuple(
                replace(regime, rates_rps=tuple(rate * factor for rate in regime.rates_rps))
                for regime in self.regimes
            ),
        )

    @cached_property
    def _rates_rps(self) -> NDArray[np.float64]:
        return np.array([regime.rates_rps for regime in self.regimes], np.float64)

    def _visits(self, seed: int, duration_s: float) -> Visits:
        if not (duration_s > 0 and isfinite(duration_s)):
            raise InputError(f"expected a number > 0, found {duration_s}", field="duration")
        expected = float(self.mean_rates_rps.sum()) * duration_s
        if expected > MAX_REQUESTS:
            raise InputError(
                f"some {expected:.3g} requests; at most {MAX_REQUESTS:,} are drawn", field="duration"
            )
        stream = np.random.SeedSequence(seed, spawn_key=(_STREAM, 0))
        return draw_visits(self.regimes, self.shuffled, stream, duration_s)


def _merged(parts: list[Workload], tenants: tuple[Tenant, ...]) -> Workload:
    """One workload of the requests of each tenant, their prefix ids kept apart."""
    arrival_s = np.concatenate([part.arrival_s for part in parts])
    order = np.argsort(arrival_s, kind="stable")
    tenant = np.repeat(np.arange(len(parts), dtype=np.int16), [len(part) for part in parts])
    block_tokens = max(part.prefix_block_tokens for part in parts)
    offsets, ids = np.zeros(1, np.int64), np.zeros(0, np.int64)
    if block_tokens:
        counts = [
            np.diff(part.prefix_offsets) if part.prefix_block_tokens else np.zeros(len(part), np.int64)
            for part in parts
        ]
        offsets = np.concatenate((offsets, np.cumsum(np.concatenate(counts))))
        ids = np.concatenate([part.prefix_ids * len(parts) + index for index, part in enumerate(parts)])
        offsets, ids = taken_blocks(offsets, ids, order)
    return Workload(
        arrival_s=arrival_s[order],
        prompt_tokens=np.concatenate([part.prompt_tokens for part in parts])[order],
        output_tokens=np.concatenate([part.output_tokens for part in parts])[order],
        tenant=tenant[order],
        tenants=tenants,
        prefix_block_tokens=block_tokens,
        prefix_offsets=offsets,
        prefix_ids=ids,
    )
