"""Regimes, and the order and times at which a seed visits them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Spikes:
    """Short, regular bursts of all tenants at once.

    Attributes:
        every_s: their period (s).
        length_s: length of each, below the period (s).
        factor: all rates are multiplied by it in a spike.
    """

    every_s: float
    length_s: float
    factor: float


@dataclass(frozen=True)
class Regime:
    """A stretch of time with a rate for each tenant.

    Attributes:
        name: unique within a scenario.
        dwell_s: shortest and longest stay, uniform between them (s).
        rates_rps: requests per second of each tenant, between spikes.
        spikes: None if it has none.
    """

    name: str
    dwell_s: tuple[float, float]
    rates_rps: tuple[float, ...]
    spikes: Spikes | None = None

    @property
    def mean_dwell_s(self) -> float:
        """Mean stay (s)."""
        return (self.dwell_s[0] + self.dwell_s[1]) / 2

    @property
    def mean_factor(self) -> float:
        """What its spikes multiply its rates by in the mean."""
        if self.spikes is None:
            return 1.0
        return 1 + (self.spikes.factor - 1) * self.spikes.length_s / self.spikes.every_s


@dataclass(frozen=True)
class Visits:
    """Stays in regimes, one after the other.

    Attributes:
        edges_s: float64[k + 1], ascending from 0; visit i lasts from edges_s[i] to edges_s[i + 1] (s).
        regime: int64[k], index of the regime.
        phase: float64[k], when in the visit its spikes come, as a part of their period, in 0..1.
    """

    edges_s: NDArray[np.float64]
    regime: NDArray[np.int64]
    phase: NDArray[np.float64]

    def segments(
        self, regimes: Sequence[Regime]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
        """Stretches of constant rates: the visits, cut where spikes begin and end.

        Returns:
            float64[s + 1] edges (s, non-decreasing), int64[s] regimes, float64[s] factors on their rates.
            The first stretch of a visit is always outside a spike, if need be with no length.
        """
        edges, regime, factor = [], [], []
        starts, ends = self.edges_s[:-1].tolist(), self.edges_s[1:].tolist()
        for start, end, index, phase in zip(
            starts, ends, self.regime.tolist(), self.phase.tolist(), strict=True
        ):
            spikes = regimes[index].spikes
            edges.append(np.array([start]))
            factors = np.ones(1)
            if spikes is not None:
                # One period early: a spike may be on when the visit begins.
                onsets = np.arange(start + (phase - 1) * spikes.every_s, end, spikes.every_s)
                sides = np.stack((onsets, onsets + spikes.length_s), axis=1).ravel()
                edges.append(np.clip(sides, start, end))
                factors = np.ones(len(sides) + 1)
                factors[1::2] = spikes.factor
            factor.append(factors)
            regime.append(np.full(len(factors), index))
        edges.append(self.edges_s[-1:])
        return np.concatenate(edges), np.concatenate(regime), np.concatenate(factor)


def draw_visits(
    regimes: Sequence[Regime], shuffled: bool, seed: np.random.SeedSequence, duration_s: float
) -> Visits:
    """Visits that cover 0..duration_s, in whole cycles; a longer duration only appends.

    Args:
        regimes: what is visited, each once a cycle.
        shuffled: each cycle in a random order; otherwise as listed, from a random one on.
        seed: seed of order, stays and spikes.
        duration_s: time to cover (s).
    """
    rng = np.random.default_rng(seed)
    shortest, longest = np.array([regime.dwell_s for regime in regimes]).T
    as_listed = np.roll(np.arange(len(regimes)), -int(rng.integers(len(regimes))))
    total, orders, dwells, phases = 0.0, [], [], []
    while total <= duration_s:
        order = rng.permutation(len(regimes)) if shuffled else as_listed
        stay, phase = rng.random((2, len(regimes)))
        orders.append(order)
        dwells.append(shortest[order] + stay * (longest - shortest)[order])
        phases.append(phase)
        total += float(dwells[-1].sum())
    edges_s = np.concatenate(([0.0], np.cumsum(np.concatenate(dwells))))
    return Visits(edges_s, np.concatenate(orders), np.concatenate(phases))
