"""What time tells of upstreams and of the requests there: silence, answers that stop, time limits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from llmserve_env.live.servers.choice import FirstBytes, RetryBudget, another
from llmserve_env.live.servers.fault import Cause
from llmserve_env.live.servers.health import HELD_S, SILENT_S

if TYPE_CHECKING:
    from llmserve_env.live.gateway.admission.passage import Passage
    from llmserve_env.live.servers.upstreams import Upstream

LOG = logging.getLogger(__name__)


class Watch:
    """Looks at upstreams a few times a second.

    Args:
        upstreams: all of them.
        budget: bounds how many requests are moved from a silent upstream to another one.
        first_byte_timeout_s: time that an answer has to begin (s).
        idle_timeout_s: time that it may stop (s).
        still_s: as `Gateway` takes it.

    Attributes:
        first_byte_timeout_s: as given.
        idle_timeout_s: as given.
        still_s: as given.
        first_bytes: how long answers took to begin.
    """

    def __init__(
        self,
        upstreams: Sequence[Upstream],
        budget: RetryBudget,
        first_byte_timeout_s: float,
        idle_timeout_s: float,
        still_s: Callable[[Upstream], float | None],
    ) -> None:
        self.still_s = still_s
        self.first_bytes = FirstBytes()
        self._upstreams = upstreams
        self._budget = budget
        self.first_byte_timeout_s = first_byte_timeout_s
        self.idle_timeout_s = idle_timeout_s
        self._out: dict[Upstream, Cause] = {}

    def look(
        self,
        pool: Sequence[Upstream],
        waiting: Iterable[Passage],
        at_upstreams: Collection[Passage],
        now_s: float,
    ) -> None:
        """Tell the upstreams' health what is seen, and end or move what waits for too long.

        Args:
            pool: upstreams that requests may go to.
            waiting: requests in the queue.
            at_upstreams: requests at upstreams.
            now_s: time of the gateway's clock (s).
        """
        moving = {each for each in self._upstreams if self._listen(each, waiting, at_upstreams, now_s)}
        for passage in tuple(at_upstreams):
            self._look_after(passage, pool, passage.upstream in moving, now_s)
        self._tell()

    def _listen(
        self, upstream: Upstream, waiting: Iterable[Passage], at_upstreams: Collection[Passage], now_s: float
    ) -> bool:
        """Find out whether anything moves at an upstream; whether its counters do."""
        health, still_s = upstream.health, self.still_s(upstream)
        if still_s is not None and still_s < SILENT_S:
            health.moved(now_s)
            return True
        if upstream.running:
            quiet_s = now_s - max(health.came_s, health.busy_s)
            # Without counters that say so, an answer that takes its time to begin looks the same.
            patience_s = SILENT_S if still_s is not None else max(SILENT_S, 2 * self.first_bytes.slowest_s)
            if quiet_s < patience_s:
                return False
            if all(each.writing for each in at_upstreams if each.upstream is upstream):
                return False  # it is the clients who do not read
        elif still_s is None:
            return False
        health.silent(now_s)
        for passage in (*waiting, *at_upstreams):
            passage.excused |= passage.upstream is None or passage.upstream is upstream
        return False

    def _look_after(self, passage: Passage, pool: Sequence[Upstream], moving: bool, now_s: float) -> None:
        """Time limits of a request at an upstream.

        Where the upstream's counters move, it has reasons of its own to let an answer wait: it preempts.
        """
        if passage.cut is None or passage.upstream is None:
            return
        quiet_s = now_s - passage.since_s
        begun = passage.began or passage.writing
        if quiet_s > (self.idle_timeout_s if begun else self.first_byte_timeout_s):
            passage.silent = not passage.writing
            passage.cut()
            return
        health = passage.upstream.health
        if (
            quiet_s > SILENT_S
            and passage.began
            and not (moving or passage.writing or passage.stalled or passage.probe)
        ):
            passage.stalled = True
            health.failed(Cause.STALLED, now_s)
        if passage.answered or passage.retried or passage.moving or not health.out:
            return
        probe_s = max(HELD_S, 2 * self.first_bytes.slowest_s)
        if health.cause is Cause.SILENT or (passage.probe and quiet_s > probe_s):
            elsewhere = another(passage.pool(pool), (*passage.failed_at, passage.upstream), now_s)
            if elsewhere and self._budget.spend(now_s):
                passage.moving = True
                passage.cut()

    def _tell(self) -> None:
        """Say once that an upstream is out and why, and that it is back."""
        for upstream in self._upstreams:
            health = upstream.health
            before, cause = self._out.get(upstream), health.cause if health.out else None
            if cause is before:
                continue
            if cause is None:
                del self._out[upstream]
                LOG.warning("%s is back", upstream.shown_url)
            else:
                self._out[upstream] = cause
                LOG.warning("%s is out: %s", upstream.shown_url, cause.value)
