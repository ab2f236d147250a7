"""Whose turn it is in the gateway's queue, and to which upstream it goes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from llmserve_env.live.servers.choice import by_load, choose, reachable

if TYPE_CHECKING:
    from llmserve_env.live.gateway.admission.passage import Passage
    from llmserve_env.live.gateway.admission.waiting_room import WaitingRoom
    from llmserve_env.live.servers.upstreams import Upstream
    from llmserve_env.schema import ServeAction


class Turns:
    """The rules of a moment.

    Args:
        pool: upstreams that requests may go to.
        action: action in force.
        kv_usage: share of an upstream's KV cache that is in use; None where it is not known.
        now_s: time of the gateway's clock (s).
    """

    def __init__(
        self,
        pool: Sequence[Upstream],
        action: ServeAction,
        kv_usage: Callable[[Upstream], float | None],
        now_s: float,
    ) -> None:
        self._pool = pool
        self._action = action
        self._kv_usage = kv_usage
        self._now_s = now_s

    def next(self, room: WaitingRoom) -> tuple[Passage, Upstream] | None:
        """Whose turn it is, and where it goes: the first in the queue, once there is room for it.

        One that waits for another upstream than those that have failed it keeps nobody waiting, and one that
        waits for those that serve its model keeps nobody waiting who goes elsewhere.

        For one for which there is room, but not for all of its sequences, an upstream is kept. As many
        sequences as it has itself may go there before it, of no lower priority under priority routing, and
        then no more. So it waits for as much as it weighs, and nobody waits where there is room without need.
        """
        kept: dict[Upstream, Passage] = {}
        blocked: set[tuple[object, ...]] = set()
        for passage in room.in_order(self._action.priority_routing):
            kind = (passage.sequences, passage.places, passage.failed_at, passage.priority)
            if kind in blocked:
                continue
            if passage.sequences == 1 and not (kept or passage.failed_at) and passage.places is None:
                upstream = self.free()
            else:
                upstream = self._free(passage, kept)
            if upstream is not None:
                if upstream in kept:
                    kept[upstream].overtaken += passage.sequences
                return passage, upstream
            blocked.add(kind)
            if passage.failed_at:
                continue
            if passage.sequences > 1:
                self._keep_one(passage, kept)
            elif passage.places is None:
                return None  # those behind are no easier to place
        return None

    def free(self, sequences: int = 1) -> Upstream | None:
        """The upstream that takes a request of so many sequences now, whatever its model."""
        if sequences == 1 and all(each.health.well for each in self._pool):
            # Then `choose` has all to choose from, finds none to probe and none that is out.
            room = [each for each in self._pool if each.running < self._cap(each) and self._is_open(each)]
            return room[0] if len(room) == 1 else min(room, key=by_load, default=None)
        need = self._need(sequences, self._pool)
        return self._choose(self._pool, lambda each: self._cap(each) - each.running >= need)

    def _free(self, passage: Passage, kept: Mapping[Upstream, Passage]) -> Upstream | None:
        """The upstream that takes a request now; not one that has failed it."""
        pool = passage.pool(self._pool)
        need = self._need(passage.sequences, pool, passage.failed_at)

        def has_room(upstream: Upstream) -> bool:
            seats, first = self._cap(upstream) - upstream.running, kept.get(upstream)
            if first is not None:
                seats = min(seats, first.sequences - first.overtaken)
                if self._action.priority_routing and passage.priority != first.priority:
                    return False
            return seats >= need

        return self._choose(pool, has_room, passage.failed_at)

    def _keep_one(self, passage: Passage, kept: dict[Upstream, Passage]) -> None:
        """Keep an upstream for a request that waits for room for all of its sequences."""
        pool = passage.pool(self._pool)
        need = self._need(passage.sequences, pool)
        upstream = choose(pool, lambda each: self._cap(each) >= need and each not in kept, self._now_s)
        if upstream is not None:
            kept[upstream] = passage

    def _need(self, sequences: int, pool: Sequence[Upstream], avoided: Collection[Upstream] = ()) -> int:
        """Sequences that there must be room for: of what weighs more than the cap, an empty upstream's."""
        if sequences == 1:
            return 1
        return min(sequences, max(map(self._cap, reachable(pool, self._now_s, avoided)), default=sequences))

    def _choose(
        self,
        pool: Sequence[Upstream],
        has_room: Callable[[Upstream], bool],
        avoided: Collection[Upstream] = (),
    ) -> Upstream | None:
        return choose(pool, lambda each: has_room(each) and self._is_open(each), self._now_s, avoided)

    def _is_open(self, upstream: Upstream) -> bool:
        """Whether it may be sent something, as far as its KV cache goes."""
        budget = self._action.kv_budget_fraction
        if budget >= 1 or "kv_budget_fraction" in upstream.in_engine:
            return True
        return (self._kv_usage(upstream) or 0.0) < budget

    def _cap(self, upstream: Upstream) -> int:
        return self._action.batch_cap * upstream.engines
