"""The gateway's queue: requests that wait for their turn."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter

from llmserve_env.live.gateway.admission.passage import Passage
from llmserve_env.live.gateway.admission.sharing import gives_way

_index = attrgetter("index")


class WaitingRoom:
    """Keeps waiting requests in order of arrival, those of each tenant by themselves.

    Args:
        priorities: priority of each tenant; lower is more urgent.
        max_sequences: sequences of all requests in it, at most.

    Attributes:
        sequences: sequences of all requests in it.
    """

    def __init__(self, priorities: Sequence[int], max_sequences: int) -> None:
        self._priorities = tuple(priorities)
        self._max_sequences = max_sequences
        self._queues: list[OrderedDict[Passage, None]] = [OrderedDict() for _ in priorities]
        # Queues of tenants that are alike, the most urgent first: with priorities, and without.
        self._alike = {
            True: [
                [queue for queue, of in zip(self._queues, priorities, strict=True) if of == priority]
                for priority in sorted(set(priorities))
            ],
            False: [self._queues],
        }
        self._held = [0] * len(self._queues)
        self.sequences = 0

    def __iter__(self) -> Iterator[Passage]:
        return (passage for queue in self._queues for passage in queue)

    def join(self, passage: Passage) -> None:
        """It waits, as the last of its tenant."""
        self._queues[passage.tenant][passage] = None
        self._count(passage, 1)

    def rejoin(self, passage: Passage) -> None:
        """It waits again, as the first of its tenant."""
        self.join(passage)
        self._queues[passage.tenant].move_to_end(passage, last=False)

    def leave(self, passage: Passage) -> None:
        """It waits no more, if it did."""
        if passage in self._queues[passage.tenant]:
            del self._queues[passage.tenant][passage]
            self._count(passage, -1)

    def in_order(self, by_priority: bool) -> Iterator[Passage]:
        """Those that wait, in the order of their turns, without those whose clients have gone away.

        Args:
            by_priority: the most urgent first; else by arrival.
        """
        for alike in self._alike[by_priority]:
            queues = [queue for queue in alike if queue]
            merged: Iterable[Passage] = queues[0] if len(queues) == 1 else heapq.merge(*queues, key=_index)
            for passage in merged:
                if passage.waits:
                    yield passage

    def crowded_out(self, by_priority: bool, newcomer: Passage) -> list[Passage]:
        """Those that give way, so that the room is not overfull.

        Args:
            by_priority: the most urgent tenants keep their places; else tenants are alike.
            newcomer: who joined last.

        Returns:
            The newest ones of the tenants that `gives_way` names, or the newcomer alone.
        """
        excess, found = self.sequences - self._max_sequences, list[Passage]()
        if excess <= 0:
            return found
        ranks, held = self._ranks(by_priority), list(self._held)
        newest = [reversed(queue) for queue in self._queues]
        while excess > 0:
            tenant = gives_way(held, ranks, newcomer.tenant)
            passage = next(newest[tenant])
            if passage is newcomer:
                return [newcomer]
            found.append(passage)
            held[tenant] -= passage.sequences
            excess -= passage.sequences
        return found

    def _ranks(self, by_priority: bool) -> tuple[int, ...]:
        return self._priorities if by_priority else (0,) * len(self._priorities)

    def _count(self, passage: Passage, sign: int) -> None:
        self._held[passage.tenant] += sign * passage.sequences
        self.sequences += sign * passage.sequences
