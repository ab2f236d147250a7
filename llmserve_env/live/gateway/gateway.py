"""What a gateway decides: who is let in, who waits, who goes where; and what it measures.

It knows nothing of HTTP: `proxy.Proxy` brings it the requests. All of it runs in one event loop's thread.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from llmserve_env.backend import WindowRecord
from llmserve_env.errors import InputError
from llmserve_env.live.gateway.admission.passage import Passage, Refused
from llmserve_env.live.gateway.admission.token_bucket import TokenBucket
from llmserve_env.live.gateway.admission.turns import Turns
from llmserve_env.live.gateway.admission.waiting_room import WaitingRoom
from llmserve_env.live.gateway.ledger import Ledger, LiveRequest
from llmserve_env.live.gateway.relay.watch import Watch
from llmserve_env.live.servers.choice import RetryBudget, another, choose
from llmserve_env.live.servers.fault import Cause, fault_of
from llmserve_env.live.servers.health import EJECTED_S, UP, State
from llmserve_env.live.servers.pool import blind, pool_of
from llmserve_env.schema import QuantizationTier, ServeAction
from llmserve_env.workloads.workload import Tenant

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmserve_env.live.servers.upstreams import Upstream

_TIERS = list(QuantizationTier)
_SILENT = Cause.SILENT  # looked up for every token


class Gateway:
    """Lets requests in, queues them, hands them to upstreams, and keeps account.

    A request weighs as many sequences as engines run for it, wherever requests are counted: at the batch cap,
    in the token bucket, in the queue and in its records.

    Of an action it applies `batch_cap` (sequences at each engine of an upstream), `kv_budget_fraction`
    (nothing is sent to an upstream whose KV cache is as full), `admission_rate` (the simulator's token bucket
    before the queue), `priority_routing` (order of the queue, share of the bucket, and the priority that vLLM
    is told), and `quantization_tier` and `speculation_depth` where there are upstreams of them. What is at an
    upstream when an action comes stays there. What the engines of an upstream apply themselves
    (`Upstream.in_engine`) is left to them, but for the batch cap, which is kept before them, too.

    Args:
        upstreams: one or more.
        tenants: who sends requests.
        action: action in force from the start.
        max_waiting: sequences in the queue, at most. Where it is full, `WaitingRoom` says who gives way.
        max_sequences: sequences of a request, at most (None: as many as the batch cap in force lets run at
            the largest upstream). What weighs more than that cap goes to an upstream that is empty.
        queue_timeout_s: a request that waited so long is refused (s).
        idle_timeout_s: a request is ended when nothing more came from its upstream, or its client took
            nothing, for so long (s).
        first_byte_timeout_s: a request is ended, or sent elsewhere, when nothing at all came from its
            upstream for so long (s; default: as the idle timeout). An answer that is not streamed begins with
            its end.
        kv_usage: share of an upstream's KV cache that is in use, None where it is not known now: nothing is
            held back then.
        still_s: time for which the counters of an upstream that runs something have stood still, None where
            that is not known, or nothing runs there (s).
        clock: clock of all times here (s).

    Attributes:
        action: action in force.
        kv_usage: as given.
        clock: as given.
        idle_timeout_s: as given.
        ledger: counts, by sequences.
        retries: requests that were sent a second time, by the cause of the first failure.

    Raises:
        InputError: no upstream, or a bound that is not positive.

    Example:
        >>> gateway = Gateway([Upstream("http://127.0.0.1:8101")])
        >>> not_applied = gateway.apply(ServeAction(batch_cap=8, priority_routing=True))
        >>> record = gateway.window()  # what happened since the last call
    """

    def __init__(
        self,
        upstreams: Sequence[Upstream],
        tenants: Sequence[Tenant] = (Tenant(),),
        action: ServeAction = ServeAction(),  # noqa: B008 - immutable
        *,
        max_waiting: int = 1000,
        max_sequences: int | None = None,
        queue_timeout_s: float = 60.0,
        idle_timeout_s: float = 300.0,
        first_byte_timeout_s: float | None = None,
        kv_usage: Callable[[Upstream], float | None] = lambda upstream: None,
        still_s: Callable[[Upstream], float | None] = lambda upstream: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not upstreams:
            raise InputError("expected one or more", field="upstream")
        if first_byte_timeout_s is None:
            first_byte_timeout_s = idle_timeout_s
        for name, value in (
            ("max_waiting", max_waiting),
            ("max_sequences", math.inf if max_sequences is None else max_sequences),
            ("queue_timeout_s", queue_timeout_s),
            ("idle_timeout_s", idle_timeout_s),
            ("first_byte_timeout_s", first_byte_timeout_s),
        ):
            if not value > 0:
                raise InputError(f"expected more than 0, found {value}", field=name)
        self.upstreams = tuple(upstreams)
        self.tenants = tuple(tenants)
        self.ledger = Ledger(self.tenants, sum(each.engines for each in self.upstreams))
        priorities = [tenant.priority for tenant in self.tenants]
        self._room = WaitingRoom(priorities, max_waiting)
        self._bucket = TokenBucket(priorities)
        self._max_sequences = max_sequences
        self._queue_timeout_s = queue_timeout_s
        self.idle_timeout_s = idle_timeout_s
        self.kv_usage = kv_usage
        self.clock = clock
        self._numbers = count()
        self._in_flight: set[Passage] = set()
        self._at_upstreams: set[Passage] = set()
        self._turns = count()
        self._begun_s = self._window_s = clock()
        self._budget = RetryBudget(self._begun_s)
        self._watch = Watch(self.upstreams, self._budget, first_byte_timeout_s, idle_timeout_s, still_s)
        self.retries: Counter[Cause] = Counter()
        self.ledger.open(self._begun_s)
        self.apply(action)

    def apply(self, action: ServeAction) -> dict[str, str]:
        """Put an action into force.

        Returns:
            Fields that cannot be applied now, with the reason.
        """
        self.action = action
        self._pool, self._not_here = pool_of(action, self.upstreams)
        self.dispatch()
        return self.not_applied

    def cannot_apply(self, action: ServeAction) -> dict[str, str]:
        """Fields of an action that could not be applied now, with the reason."""
        pool, found = pool_of(action, self.upstreams)
        return found | blind(action, pool, self.kv_usage)

    @property
    def not_applied(self) -> dict[str, str]:
        """Fields of the action in force that have no effect now, with the reason."""
        return self._not_here | blind(self.action, self._pool, self.kv_usage)

    def window(self) -> WindowRecord:
        """What happened since the last call: latencies as clients saw them, from arrival at the gateway."""
        window, ttft, gaps = self.close_window()
        self.open_window()
        return WindowRecord.of(window, len(self.tenants), ttft, gaps, self.not_applied)

    def close_window(
        self, start_s: float | None = None, end_s: float | None = None
    ) -> tuple[NDArray[np.void], NDArray[np.int64], NDArray[np.int64]]:
        """End the window; until `open_window` no time counts as busy.

        Args:
            start_s: what the record says of its start (s; default: since the gateway began).
            end_s: end that the record states, likewise (s).

        Returns:
            WINDOW, and the histograms of times to first token and of gaps as in `WindowRecord`.
        """
        now_s = self.clock()
        window, ttft, gaps = self.ledger.close(
            now_s,
            self._window_s - self._begun_s if start_s is None else start_s,
            now_s - self._begun_s if end_s is None else end_s,
            self._in_flight,
        )
        self._window_s = now_s
        self._look(window)
        return window, ttft, gaps

    def open_window(self) -> None:
        """Begin a window."""
        self.ledger.open(self.clock())

    def blank(self) -> NDArray[np.void]:
        """WINDOW of a gateway that has done nothing."""
        window = self.ledger.blank()
        self._look(window)
        return window

    def _look(self, window: NDArray[np.void]) -> None:
        """Fill in what the upstreams are now."""
        up = [each for each in self.upstreams if self.state(each) in UP]
        window["engines_up"] = sum(each.engines for each in up)
        for each in up:
            if each.tier is not None:
                window["engines_tier"][_TIERS.index(each.tier)] += each.engines
        usages = [usage for each in self.upstreams if (usage := self.kv_usage(each)) is not None]
        window["kv_occupancy"] = np.mean(usages) if usages else 0.0

    def listen_to(self, still_s: Callable[[Upstream], float | None]) -> None:
        """Judge by counters from now on whether anything moves at upstreams; `still_s` as given at first."""
        self._watch.still_s = still_s

    @property
    def waiting(self) -> int:
        """Sequences of the requests in the queue."""
        return self._room.sequences

    @property
    def in_flight(self) -> int:
        """Requests that are not over."""
        return len(self._in_flight)

    @property
    def max_sequences(self) -> int:
        """Sequences of a request, at most, now."""
        if self._max_sequences is not None:
            return self._max_sequences
        return self.action.batch_cap * max(each.engines for each in self.upstreams)

    def state(self, upstream: Upstream) -> State:
        """What is to be expected of an upstream now."""
        return upstream.health.state(self.clock())

    def enter(
        self,
        tenant: int,
        prompt_tokens: int,
        arrival_s: float | None = None,
        *,
        sequences: int = 1,
        places: frozenset[Upstream] | None = None,
    ) -> Passage:
        """A request has arrived.

        Args:
            tenant: index of who sent it.
            prompt_tokens: about.
            arrival_s: when it was due, from which its latencies count (s of the clock; default: now).
            sequences: sequences that an engine runs for it.
            places: upstreams that serve its model (default: all).

        Raises:
            Refused: 429, at the admission rate or with a full queue.
        """
        now_s = self.clock()
        self._budget.earn()
        due_s = now_s if arrival_s is None else arrival_s
        priority = self.tenants[tenant].priority
        passage = Passage(next(self._numbers), tenant, priority, due_s, sequences, since_s=now_s)
        passage.places = places
        self._in_flight.add(passage)
        self.ledger.arrived(passage, prompt_tokens)
        by_priority = self.action.priority_routing
        drawn = (self.action.admission_rate, sequences, priority, by_priority, now_s)
        wait_s = self._bucket.wait_s(*drawn)
        if wait_s > 0:
            raise self._refused(passage, "admission rate", "Too many requests: try again later", wait_s)
        passage.turn = asyncio.get_running_loop().create_future()
        self._room.join(passage)
        self.dispatch()
        crowded_out = self._room.crowded_out(by_priority, passage)
        if passage in crowded_out:
            raise self._refused(passage, "queue full", "Too many requests wait here: try again later", 1.0)
        self._bucket.take(*drawn)
        if crowded_out:
            self._displace(crowded_out)
        return passage

    def displace(self, passage: Passage) -> None:
        """It gives way to others: its answer has not begun."""
        self._displace([passage])

    def _displace(self, passages: Iterable[Passage]) -> None:
        displaced = Refused(429, "Others need its place here: try again later", "displaced", 1.0)
        for passage in passages:
            if passage.waits:
                self._end(passage)
                self.ledger.refused(passage, self.clock(), displaced.reason)
                passage.refuse(displaced)
            elif not passage.over:
                passage.displaced = displaced
                if passage.cut is not None:
                    passage.cut()
        self.dispatch()  # those behind one that took many places

    def dispatch(self) -> None:
        """Hand waiting requests over while there is room."""
        if not self._room.sequences:  # mostly
            return
        now_s = self.clock()
        turns = self._turn(now_s)
        while self._room.sequences and (found := turns.next(self._room)) is not None:
            passage, upstream = found
            self._room.leave(passage)
            passage.upstream, passage.since_s, passage.sent_s = upstream, now_s, now_s
            passage.tier = None if upstream.tier is None else _TIERS.index(upstream.tier)
            passage.probe = upstream.health.sent(now_s, idle=not upstream.running)
            passage.began = passage.noted = passage.stalled = False
            upstream.running += passage.sequences
            upstream.turn = next(self._turns)
            self._at_upstreams.add(passage)
            self.ledger.sent(passage, now_s)
            assert passage.turn is not None
            passage.turn.set_result(None)

    def priority_of(self, passage: Passage) -> int:
        """What vLLM is told of its priority."""
        return passage.priority if self.action.priority_routing else 0

    def unreachable(self, passage: Passage) -> None:
        """Its upstream takes no connections: it waits again, first of its kind, for another one.

        Raises:
            Refused: 503, there is none.
        """
        now_s = self.clock()
        self._note(passage, "upstream down", now_s)
        passage.tries += 1
        pool = passage.pool(self._pool)
        if passage.tries >= len(pool) or not another(pool, passage.failed_at, now_s):
            raise Refused(503, "No upstream can be reached", "upstream down", EJECTED_S)
        self._return(passage, now_s)

    def again(self, passage: Passage, reason: str, retry_after_s: float | None = None) -> bool:
        """Its upstream failed it before its client got anything: it waits for another one, if that may be.

        It may once, within the retry budget, where there is another one that is not out.

        Args:
            passage: which.
            reason: what happened.
            retry_after_s: time for which the upstream asked to be left alone (s).

        Returns:
            Whether it waits; if not, `fail` or `reject` it.
        """
        now_s = self.clock()
        self._note(passage, reason, now_s, retry_after_s)
        cause = fault_of(reason).cause
        if passage.over or passage.answered or cause is None:
            return False
        if not passage.moving:
            elsewhere = another(passage.pool(self._pool), passage.failed_at, now_s)
            if passage.retried or not elsewhere or not self._budget.spend(now_s):
                return False
        passage.moving, passage.retried = False, True
        self.retries[cause] += 1
        self._return(passage, now_s)
        return True

    def _return(self, passage: Passage, now_s: float) -> None:
        """It waits again, as the first of its priority."""
        self._leave(passage)
        self.ledger.returned(passage, now_s)
        passage.turn = asyncio.get_running_loop().create_future()
        passage.cut, passage.since_s = None, now_s
        self._room.rejoin(passage)
        self.dispatch()
        self._displace(self._room.crowded_out(self.action.priority_routing, passage))

    def held_back(self, passage: Passage) -> bool:
        """Whether its answer is held back until its upstream has proven itself: another one could answer."""
        if not passage.probe or passage.retried:
            return False
        than = (*passage.failed_at, passage.upstream)
        return another(passage.pool(self._pool), than, self.clock())

    def proven(self, passage: Passage) -> None:
        """Its answer has come so far that its upstream is well."""
        if passage.probe and passage.upstream is not None:
            passage.upstream.health.succeeded(self.clock(), probe=True)
            passage.probe = False

    def got(self, passage: Passage, steps: int = 0, sequences: Sequence[int] = ()) -> None:
        """Something came from its upstream, with so many pieces of its answer.

        Args:
            passage: which.
            steps: pieces that came.
            sequences: index of the sequence of each; all are of one where there are none.
        """
        now_s = passage.since_s = self.clock()
        upstream = passage.upstream
        # Bytes alone may be a proxy's, to keep a connection open; and a probe's first ones prove nothing.
        if steps and upstream is not None and not passage.probe:
            health = upstream.health
            health.came_s = now_s
            if health.cause is _SILENT:
                health.came(now_s)
        if not passage.began:
            passage.began = True
            self._watch.first_bytes.add(now_s - passage.sent_s, now_s)
        if sequences:
            for sequence in sequences:
                self.ledger.step(passage, now_s, sequence)
        elif steps:
            self.ledger.step(passage, now_s, count=steps)

    def complete(self, passage: Passage, tokens: int | None) -> None:
        """Its answer is complete; `tokens` as its upstream counts them, None where it does not."""
        if not passage.over:
            now_s = self.clock()
            if passage.upstream is not None and not passage.noted:
                passage.noted = True
                health = passage.upstream.health
                health.succeeded(now_s, probe=passage.probe)
                health.came_s = now_s
            self.ledger.completed(passage, now_s, tokens)
            self._end(passage)
            self.dispatch()

    def fail(self, passage: Passage, reason: str, *, given_up: bool = False) -> None:
        """It will have no complete answer; `given_up`: because its client went away."""
        self._over(passage, reason, self.ledger.given_up if given_up else self.ledger.failed)

    def reject(self, passage: Passage, reason: str) -> None:
        """Its upstream refused it for a mistake of its client: it is nobody's failure, and was no demand."""
        self._over(passage, reason, self.ledger.rejected)

    def _over(self, passage: Passage, reason: str, note: Callable[[LiveRequest, float, str], None]) -> None:
        if not passage.over:
            now_s = self.clock()
            self._note(passage, reason, now_s)
            note(passage, now_s, reason)
            self._end(passage)
            self.dispatch()

    def _note(self, passage: Passage, reason: str, now_s: float, retry_after_s: float | None = None) -> None:
        """Tell its upstream's health, once, what became of it there."""
        upstream = passage.upstream
        if upstream is None or passage.noted:
            return
        passage.noted = True
        cause = fault_of(reason).cause
        if cause is None:
            upstream.health.left(probe=passage.probe)
            return
        passage.failed_at |= {upstream}
        upstream.health.failed(cause, now_s, probe=passage.probe, retry_after_s=retry_after_s)

    def tick(self) -> None:
        """What time brings, to be called a few times a second: time limits, silence, room in KV caches."""
        now_s = self.clock()
        for passage in self._room:
            if now_s - passage.since_s > self._queue_timeout_s and passage.waits:
                passage.refuse(Refused(503, "It waited too long for its turn", "queue timeout", 1.0))
        self._watch.look(self._pool, self._room, self._at_upstreams, now_s)
        self.dispatch()

    def _refused(self, passage: Passage, reason: str, message: str, wait_s: float) -> Refused:
        """It is not let in."""
        self.ledger.refused(passage, self.clock(), reason)
        self._end(passage)
        return Refused(429, message, reason, wait_s)

    def aside(
        self, places: frozenset[Upstream] | None, avoided: Collection[Upstream] = ()
    ) -> Upstream | None:
        """An upstream for a request that takes no place in a batch; None where none is to be asked.

        Args:
            places: upstreams that serve its model; None for all.
            avoided: upstreams that were tried.
        """
        pool = [each for each in self.upstreams if places is None or each in places]
        upstream = choose(pool, lambda each: each not in avoided, self.clock(), avoided)
        if upstream is not None:
            upstream.turn = next(self._turns)
        return upstream

    def lost(self, upstream: Upstream, reason: str) -> None:
        """An upstream failed a request that takes no place in a batch."""
        if (cause := fault_of(reason).cause) is not None:
            upstream.health.failed(cause, self.clock())

    def _turn(self, now_s: float) -> Turns:
        return Turns(self._pool, self.action, self.kv_usage, now_s)

    def _free(self, sequences: int = 1) -> Upstream | None:
        """The upstream that takes a request of so many sequences now."""
        return self._turn(self.clock()).free(sequences)

    def _end(self, passage: Passage) -> None:
        """It is over."""
        self._leave(passage)
        self._in_flight.discard(passage)

    def _leave(self, passage: Passage) -> None:
        """It is neither in the queue nor at an upstream any more."""
        self._room.leave(passage)
        if passage in self._at_upstreams:
            self._at_upstreams.remove(passage)
            assert passage.upstream is not None
            passage.upstream.running -= passage.sequences
        passage.upstream = None
