"""Which upstream gets the next request, and whether what failed may be tried elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from llmserve_env.live.servers.health import HARD

if TYPE_CHECKING:
    from llmserve_env.live.servers.upstreams import Upstream

MOST_OUT = 0.5
"""Share of a pool that may be out for what its requests said, rounded down, though one at least."""
RETRY_SHARE = 0.2
"""Retries for each request: Finagle's and Envoy's default."""
RETRIES_PER_S = 10.0
"""Retries that are free, as Finagle's; saved up for ten seconds."""
SAVED_S = 10.0


def choose(
    pool: Sequence[Upstream],
    has_room: Callable[[Upstream], bool],
    now_s: float,
    avoided: Collection[Upstream] = (),
) -> Upstream | None:
    """The upstream of a pool that is next; None while none has room.

    One that is to be probed goes first, then the least loaded of those that are well, ties in turn. Where all
    are out, the least bad one is tried. More than a half is never out for failed requests alone: of those
    beyond, some get what the others have no room for.

    Args:
        pool: upstreams to choose from.
        has_room: whether an upstream may take one more.
        now_s: time of the gateway's clock (s).
        avoided: upstreams that have failed the request, for which others are waited for.
    """
    fit = _fit(pool, now_s, avoided)
    if not fit:
        left = [each for each in pool if not each.health.draining]
        return min(filter(has_room, left), key=lambda each: each.health.badness(), default=None)
    chosen = min(filter(has_room, fit), key=_order, default=None)
    if chosen is None:
        out = [
            each
            for each in pool
            if each.health.out and each.health.cause not in HARD and not each.health.draining
        ]
        beyond = len(out) - max(1, int(MOST_OUT * len(pool)))
        if beyond > 0:
            out.sort(key=lambda each: each.health.badness())
            chosen = min(filter(has_room, out[:beyond]), key=_order, default=None)
    return chosen


def reachable(
    pool: Sequence[Upstream], now_s: float, avoided: Collection[Upstream] = ()
) -> Sequence[Upstream]:
    """Upstreams that may get a request now; where all are out, all that do not drain."""
    return _fit(pool, now_s, avoided) or [each for each in pool if not each.health.draining]


def _fit(pool: Sequence[Upstream], now_s: float, avoided: Collection[Upstream]) -> list[Upstream]:
    fit = [each for each in pool if each.health.takes(now_s)]
    if avoided:
        fit = [each for each in fit if each not in avoided and not each.health.out] or fit
    return fit


def another(pool: Sequence[Upstream], than: Collection[Upstream | None], now_s: float) -> bool:
    """Whether there is an upstream that is not out, apart from some."""
    return any(each not in than and not each.health.out and each.health.takes(now_s) for each in pool)


def by_load(upstream: Upstream) -> tuple[float, int]:
    """Order of upstreams that are well: the least loaded first, ties in turn."""
    return upstream.running / upstream.engines, upstream.turn


def _order(upstream: Upstream) -> tuple[bool, tuple[float, int]]:
    return not upstream.health.out, by_load(upstream)


class RetryBudget:
    """Bounds how many requests are sent a second time: a share of all, and a few a second.

    Args:
        now_s: time (s).
    """

    def __init__(self, now_s: float) -> None:
        self._saved = RETRIES_PER_S * SAVED_S
        self._at_s = now_s

    def earn(self) -> None:
        """A request came."""
        self._saved += RETRY_SHARE

    def spend(self, now_s: float) -> bool:
        """Whether a retry may be; if so, it is counted."""
        most = 2 * RETRIES_PER_S * SAVED_S
        self._saved = min(self._saved + (now_s - self._at_s) * RETRIES_PER_S, most)
        self._at_s = now_s
        if self._saved < 1:
            return False
        self._saved -= 1
        return True


class FirstBytes:
    """How long answers took to begin, lately: the slowest one of the last minutes."""

    SPAN_S = 300.0

    def __init__(self) -> None:
        self._began_s = 0.0
        self._before = self._now = 0.0

    def add(self, took_s: float, now_s: float) -> None:
        """An answer began after so long."""
        if now_s - self._began_s > self.SPAN_S:
            again = now_s - self._began_s < 2 * self.SPAN_S
            self._before, self._now, self._began_s = self._now if again else 0.0, 0.0, now_s
        self._now = max(self._now, took_s)

    @property
    def slowest_s(self) -> float:
        """The slowest (s); 0 where there is none."""
        return max(self._before, self._now)
