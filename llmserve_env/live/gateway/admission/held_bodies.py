"""Memory for the bodies of requests, shared by tenants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmserve_env.live.gateway.admission.passage import Refused
from llmserve_env.live.gateway.admission.sharing import gives_way


@dataclass(eq=False)
class HeldBody:
    """A request's body, as far as it is there.

    Attributes:
        tenant: index of who sends it.
        give_way: called when it has to make room for others: its request is to be refused.
        size: size of what has come (bytes).
        lost: it had to make room.
    """

    tenant: int
    give_way: Callable[[], object] = lambda: None
    size: int = 0
    lost: bool = False


class HeldBodies:
    """Counts the bodies that are held, from their first byte until their answers begin.

    Args:
        priorities: priority of each tenant; lower is more urgent.
        by_priority: whether the most urgent tenants keep their places now; else tenants are alike.
        max_bytes: bytes of all bodies, at most.

    Attributes:
        bytes: bytes of all bodies.
    """

    def __init__(self, priorities: Sequence[int], by_priority: Callable[[], bool], max_bytes: int) -> None:
        self._priorities = tuple(priorities)
        self._by_priority = by_priority
        self._max_bytes = max_bytes
        self._bodies: list[dict[HeldBody, None]] = [{} for _ in priorities]
        self._held = [0] * len(self._bodies)
        self.bytes = 0

    def grow(self, body: HeldBody, size: int) -> None:
        """More of it has come. Without room for it, the newest bodies of whom `gives_way` names give way.

        Args:
            body: which.
            size: size of what has come now (bytes).

        Raises:
            Refused: 429, it would have to give way itself. It is released.
        """
        if size == 0:
            return
        self._bodies[body.tenant][body] = None  # before, it held nothing that it could give
        self._count(body, size)
        ranks = self._priorities if self._by_priority() else (0,) * len(self._priorities)
        while self.bytes > self._max_bytes:
            newest = next(reversed(self._bodies[gives_way(self._held, ranks, body.tenant)]))
            if newest is body or body.size > self._max_bytes:
                self.release(body)
                raise Refused(429, "Too many requests wait here: try again later", "memory", 1.0)
            self.release(newest)
            newest.lost = True
            newest.give_way()

    def release(self, body: HeldBody) -> None:
        """It is held no more, if it was."""
        if body in self._bodies[body.tenant]:
            del self._bodies[body.tenant][body]
            self._count(body, -body.size)

    def _count(self, body: HeldBody, size: int) -> None:
        body.size += size
        self._held[body.tenant] += size
        self.bytes += size
