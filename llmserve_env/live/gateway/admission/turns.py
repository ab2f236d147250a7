"""Whose turn it is in the gateway's queue, and to which upstream it goes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from llmserve_env.live.servers.choice import choose, reachable

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

        One that waits for another upstream than those that have failed it keeps nobody waiting.
        """
        order = room.in_order(self._action.priority_routing)
        for passage in order:
            upstream = self.free(passage.sequences, passage.failed_at)
            if upstream is not None:
                return passage, upstream
            if not passage.failed_at:
                return self._overtaking(passage, order) if passage.sequences > 1 else None
        return None

    def free(self, sequences: int = 1, avoided: Collection[Upstream] = ()) -> Upstream | None:
        """The upstream that takes a request of so many sequences now; not one of those to be avoided."""
        need = self._need(sequences)
        return self._choose(lambda each: self._cap(each) - each.running >= need, avoided)

    def _overtaking(self, first: Passage, behind: Iterator[Passage]) -> tuple[Passage, Upstream] | None:
        """Who goes before the first in the queue, while there is room, but not for all of its sequences.

        One upstream is kept for the first. As many sequences as it has itself may go there before it, of no
        lower priority under priority routing, and then no more: so it waits for as much as it weighs, and
        nobody waits where there is room without need.
        """
        need, left = self._need(first.sequences), first.sequences - first.overtaken
        kept = choose(self._pool, lambda each: self._cap(each) >= need, self._now_s)
        seats = {each: self._cap(each) - each.running for each in self._pool if self._is_open(each)}
        if kept in seats:
            seats[kept] = min(seats[kept], left)
        if max(seats.values(), default=0) <= 0:
            return None
        for passage in behind:
            upstream = self._choose(
                partial(self._has_seat, seats, passage, kept, first.priority), passage.failed_at
            )
            if upstream is not None:
                first.overtaken += passage.sequences * (upstream is kept)
                return passage, upstream
        return None

    def _has_seat(
        self,
        seats: Mapping[Upstream, int],
        passage: Passage,
        kept: Upstream | None,
        priority: int,
        of: Upstream,
    ) -> bool:
        if of is kept and self._action.priority_routing and passage.priority != priority:
            return False
        return seats.get(of, 0) >= passage.sequences

    def _need(self, sequences: int) -> int:
        """Sequences that there must be room for: of what weighs more than the cap, an empty upstream's."""
        if sequences == 1:
            return 1
        return min(sequences, max(map(self._cap, reachable(self._pool, self._now_s)), default=sequences))

    def _choose(self, has_room: Callable[[Upstream], bool], avoided: Collection[Upstream]) -> Upstream | None:
        return choose(self._pool, lambda each: has_room(each) and self._is_open(each), self._now_s, avoided)

    def _is_open(self, upstream: Upstream) -> bool:
        """Whether it may be sent something, as far as its KV cache goes."""
        budget = self._action.kv_budget_fraction
        if budget >= 1 or "kv_budget_fraction" in upstream.in_engine:
            return True
        return (self._kv_usage(upstream) or 0.0) < budget

    def _cap(self, upstream: Upstream) -> int:
        return self._action.batch_cap * upstream.engines
