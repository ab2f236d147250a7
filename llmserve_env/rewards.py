"""What a window is worth: five parts, each earned by requests that met their SLO.

A request that ends within its tenant's TTFT and TPOT promises earns its tenant's weight as a share of the
weight of all requests of the episode; one that is late, given up, refused or unfinished earns nothing. Times
the number of windows, so that a reward is near 1 where everything is served:

    g = windows x sum over tenants of weight x requests in SLO / demand
    reward = g x (goodput + latency x headroom + memory x free KV + cost x idle GPU + quality x precision)

The weights (goodput to quality, `Task.reward`) sum to 1. Headroom is 1 - max(TTFT / SLO, TPOT / SLO) of the
request; free KV is 1 while at most `KV_LIMIT` of the blocks are held on average over the window and falls to
0 when all are; idle GPU is the share of engine time in which no batch ran; precision is that of the engine
that ended the request. **The score of an episode is the mean of its rewards**, so it lies in 0..1, and
learning the one is learning the other. Every part is earned by serving: nothing is gained by refusing,
delaying or idling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llmserve_env.compiled import entry

if TYPE_CHECKING:
    from collections.abc import Callable, Container

    from numpy.typing import NDArray

    from llmserve_env.tasks import Task

COMPONENTS = ("goodput", "latency", "memory", "cost", "quality")

KV_LIMIT = 0.9
"""Share of KV blocks held above which memory is under pressure (an assumption)."""


class Rewards:
    """Rewards of the windows of a task.

    Args:
        task: the task, which gives weights, tenants, and the size of the cell.
    """

    def __init__(self, task: Task) -> None:
        weights = task.reward
        self._parts = np.array([getattr(weights, name) for name in COMPONENTS])
        self._tenants = np.array([tenant.weight for tenant in task.tenants], float)
        self._quality = np.array(task.quality)
        self._engine_s = task.cell.engines * task.window_s
        self._windows = task.windows

    def demand(self, requests_by_tenant: NDArray[np.int64]) -> float:
        """Weight of all requests of an episode, from int64[tenant]."""
        return float((self._tenants * requests_by_tenant).sum())

    def of(
        self, windows: NDArray[np.void], demand: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Rewards of one window of each of n episodes.

        Args:
            windows: WINDOW[n].
            demand: float64[n], of the whole episode.

        Returns:
            components: float64[n, components], in the order of COMPONENTS; their sum is the reward.
            costs: float64[n], weight of requests that missed their SLO in this window, in the unit of g.
        """
        components, costs = np.empty((len(windows), len(COMPONENTS))), np.empty(len(windows))
        _fill(
            windows,
            demand,
            self._parts,
            self._tenants,
            self._quality,
            self._engine_s,
            self._windows,
            components,
            costs,
        )
        return components, costs

    @staticmethod
    def earning(windows: NDArray[np.void], unmeasured: Container[str]) -> NDArray[np.void]:
        """WINDOW[n] as `of` takes it: nothing is earned for memory while nobody tells how full it is.

        Args:
            windows: WINDOW[n].
            unmeasured: fields of an observation that the records do not tell.
        """
        if "kv_cache_occupancy" not in unmeasured:
            return windows
        known = windows.copy()
        known["mean_kv_occupancy"] = 1.0  # as if it were full
        return known

    def add(
        self,
        windows: NDArray[np.void],
        served: NDArray[np.bool_],
        components: NDArray[np.float64],
        totals: NDArray[np.float64],
        requests: NDArray[np.int64],
    ) -> NDArray[np.float64]:
        """Add one window to what the episodes have earned and to what became of their requests.

        Args:
            windows: WINDOW[n].
            served: bool[n], the episodes that the window is of; the others stay as they are.
            components: float64[n, components], of this window.
            totals: float64[n, components], parts of the score so far, changed in place.
            requests: int64[n, 4], arrived, completed, within the SLO, failed so far, changed in place.

        Returns:
            float64[n], rewards: the sums of the components.
        """
        rewards = np.zeros(len(windows))
        _add(windows, served, components, self._windows, totals, requests, rewards)
        return rewards


@entry("a few seconds")
def _add(digest: int) -> Callable[..., None]:
    """Compiled `Rewards.add`."""

    def _add(windows, served, components, count, totals, requests, rewards):  # type: ignore[no-untyped-def]
        digest  # noqa: B018 - a part of the cache's key
        for i in range(len(windows)):
            if not served[i]:
                continue
            window = windows[i]
            for part in range(components.shape[1]):
                totals[i, part] += components[i, part] / count
                rewards[i] += components[i, part]
            requests[i, 0] += window.arrived
            requests[i, 1] += window.completed
            for tenant in range(len(window.tenant_in_slo)):
                requests[i, 2] += window.tenant_in_slo[tenant]
            requests[i, 3] += window.failed + window.cancelled

    return _add


@entry("a few seconds")
def _fill(digest: int) -> Callable[..., None]:
    """Compiled `Rewards.of`."""

    def _fill(windows, demand, parts, tenants, quality, engine_s, count, components, costs):  # type: ignore[no-untyped-def]
        digest  # noqa: B018 - a part of the cache's key
        for i in range(len(windows)):
            window = windows[i]
            met = 0.0
            headroom = 0.0
            precision = 0.0
            missed = 0.0
            for tenant in range(len(tenants)):
                weight = tenants[tenant]
                in_slo = window.tenant_in_slo[tenant]
                met += weight * in_slo
                missed += weight * (window.tenant_completed[tenant] + window.tenant_failed[tenant] - in_slo)
                headroom += weight * window.tenant_headroom[tenant]
                for tier in range(len(quality)):
                    precision += weight * window.tier_in_slo[tier, tenant] * quality[tier]
            unit = count / demand[i] if demand[i] > 0.0 else 0.0
            pressure = (window.mean_kv_occupancy - KV_LIMIT) / (1.0 - KV_LIMIT)
            idle = 1.0 - window.busy_s / engine_s
            components[i, 0] = parts[0] * unit * met
            components[i, 1] = parts[1] * unit * headroom
            components[i, 2] = parts[2] * unit * met * min(max(1.0 - pressure, 0.0), 1.0)
            components[i, 3] = parts[3] * unit * met * min(max(idle, 0.0), 1.0)
            components[i, 4] = parts[4] * unit * precision
            costs[i] = unit * missed

    return _fill
