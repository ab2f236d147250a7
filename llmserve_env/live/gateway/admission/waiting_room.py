"""The gateway's queue: requests that wait for their turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from llmserve_env.live.gateway.admission.passage import Passage


class WaitingRoom:
    """Keeps waiting requests in order of arrival, each priority by itself.

    Who was refused while it waited, or whose client went away, waits no more; it is dropped in passing.

    Args:
        priorities: priorities that requests may have.
    """

    def __init__(self, priorities: Iterable[int]) -> None:
        self._queues: dict[int, deque[Passage]] = {priority: deque() for priority in sorted(set(priorities))}

    def __iter__(self) -> Iterator[Passage]:
        """Those that wait, and those refused whose clients have not been told; the most urgent first."""
        return (each for queue in self._queues.values() for each in queue if not each.over)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def join(self, passage: Passage) -> None:
        """It waits, as the last of its priority."""
        self._queues[passage.priority].append(passage)

    def rejoin(self, passage: Passage) -> None:
        """It waits again, as the first of its priority."""
        self._queues[passage.priority].appendleft(passage)

    def next(self, by_priority: bool) -> Passage | None:
        """Whose turn it is; None where nobody waits.

        Args:
            by_priority: the most urgent first; else by arrival.
        """
        for queue in self._queues.values():
            while queue and not queue[0].waits:
                queue.popleft()
        first = [queue[0] for queue in self._queues.values() if queue]
        if not first:
            return None
        return first[0] if by_priority else min(first, key=lambda passage: passage.index)

    def leave(self, passage: Passage) -> None:
        """It waits no more; it is the first of its priority."""
        assert self._queues[passage.priority][0] is passage
        self._queues[passage.priority].popleft()
