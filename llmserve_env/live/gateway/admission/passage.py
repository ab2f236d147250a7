"""A request on its way through the gateway, and its refusal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmserve_env.live.gateway.ledger import LiveRequest

if TYPE_CHECKING:
    from llmserve_env.live.servers.upstreams import Upstream


class Refused(Exception):
    """A request is not served.

    Args:
        status: HTTP status.
        message: message for its client.
        reason: in a few words, for counting.
        retry_after_s: when to try again, at the earliest (s; None: no word of it).
        param: field of the request that it is about; None for none.
    """

    def __init__(
        self,
        status: int,
        message: str,
        reason: str,
        retry_after_s: float | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.reason = reason
        self.retry_after_s = retry_after_s
        self.param = param


@dataclass(eq=False, slots=True)
class Passage(LiveRequest):
    """A request on its way through the gateway.

    Attributes:
        upstream: where it is, or is to go; None while it waits.
        turn: its turn has come when this is done, or it has failed.
        since_s: when it last got on: joined the queue, went to its upstream, got something from there (s).
        writing: whether its client is the one to be waited for.
        cut: how to end it from outside; None while it waits.
        silent: it was ended because nothing came from the upstream.
        displaced: it was ended because others need its place; what its client is told.
        on_answer: called before its client gets the first part of an answer.
        tries: upstreams that took no connection for it.
        sent_s: when it went to its upstream (s).
        began: whether something came from there.
        answered: whether its client got something.
        probe: whether it finds out if its upstream is well again.
        noted: whether its upstream's health knows what became of it there.
        stalled: whether its upstream's health knows that its answer stopped.
        failed_at: upstreams that failed it.
        retried: whether it was sent a second time for what failed.
        moving: it is taken from its upstream, to be sent to another one.
        places: upstreams that serve its model; None for all.
        overtaken: sequences of requests behind it that went first, to the upstream that is kept for it.
    """

    upstream: Upstream | None = None
    turn: asyncio.Future[None] | None = None
    since_s: float = 0.0
    writing: bool = False
    cut: Callable[[], object] | None = None
    silent: bool = False
    displaced: Refused | None = None
    on_answer: Callable[[], object] = lambda: None
    tries: int = 0
    sent_s: float = 0.0
    began: bool = False
    answered: bool = False
    probe: bool = False
    noted: bool = False
    stalled: bool = False
    failed_at: frozenset[Upstream] = frozenset()
    retried: bool = False
    moving: bool = False
    places: frozenset[Upstream] | None = None
    overtaken: int = 0

    def pool(self, pool: Sequence[Upstream]) -> Sequence[Upstream]:
        """Of a pool the upstreams that serve its model; where none of it does, all that do."""
        if self.places is None:
            return pool
        return [each for each in pool if each in self.places] or list(self.places)

    @property
    def waits(self) -> bool:
        """Whether it is in the queue, has not been refused there and its client has not gone away."""
        return not self.over and self.turn is not None and not self.turn.done()

    def refuse(self, refused: Refused) -> None:
        """Its turn will not come."""
        assert self.turn is not None
        self.turn.set_exception(refused)
        self.turn.exception()  # seen, also where nobody is left to see it
