"""Who waits, who goes and who gives way, over arrivals of all kinds."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve_env.live.gateway.admission.passage import Refused
from llmserve_env.live.gateway.admission.sharing import gives_way
from llmserve_env.live.gateway.gateway import Gateway
from llmserve_env.live.servers.upstreams import Upstream
from llmserve_env.schema import ServeAction
from llmserve_env.workloads.workload import Tenant

PRIORITIES = (0, 1, 1, 2)
TENANTS = tuple(Tenant(name, priority=priority) for name, priority in zip("abcd", PRIORITIES, strict=True))
ROOM = 12

_of = st.integers(0, 200)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.integers(0, 3), st.sampled_from([1, 1, 1, 2, 3, 5, 9, 14])),
        st.tuples(st.just("complete"), _of, _of),
        st.tuples(st.just("give_up"), _of, _of),
        st.tuples(st.just("reject"), _of, _of),
        st.tuples(st.just("unreachable"), _of, _of),
        st.tuples(st.just("displace"), _of, _of),
        st.tuples(st.just("wait"), st.floats(0, 40), _of),
        st.tuples(st.just("apply"), st.sampled_from([1, 2, 4, 6]), st.booleans()),
    ),
    max_size=60,
)


class Model:
    """A gateway, and what is known of the requests that it was sent."""

    def __init__(self, routing):
        self.now_s = 1000.0
        self.gateway = Gateway(
            [Upstream("http://one"), Upstream("http://two", engines=2)],
            TENANTS,
            ServeAction(batch_cap=2, priority_routing=routing),
            max_waiting=ROOM,
            queue_timeout_s=60.0,
            clock=lambda: self.now_s,
        )
        self.passages, self.arrived, self.rejected = [], [0] * len(TENANTS), 0

    @property
    def routing(self):
        return self.gateway.action.priority_routing

    @property
    def waiting(self):
        return [each for each in self.passages if not each.over and each.upstream is None]

    @property
    def running(self):
        return [each for each in self.passages if not each.over and each.upstream is not None]

    def held(self, passages):
        return [sum(each.sequences for each in passages if each.tenant == i) for i in range(len(TENANTS))]

    def enter(self, tenant, sequences):
        """Its refusal, if it is refused."""
        try:
            self.passages.append(self.gateway.enter(tenant, 1, sequences=sequences))
        except Refused as refused:
            return refused
        return None

    def arrive(self, tenant, sequences):
        before, held = self.waiting, self.held(self.waiting)
        self.arrived[tenant] += sequences
        own = held[tenant] + sequences
        refused = self.enter(tenant, sequences)
        if refused is not None:
            assert (refused.status, refused.reason) == (429, "queue full")
            assert refused.retry_after_s
            assert before == self.waiting  # nobody lost a place in vain
            if self.routing:
                kept = [held[i] for i in range(len(TENANTS)) if PRIORITIES[i] <= PRIORITIES[tenant]]
                assert sum(kept) + sequences > ROOM  # never for the less urgent ones
            else:
                assert own > ROOM / len(TENANTS)
        lost = [each for each in before if each.over]
        for each in lost:
            assert each.turn.exception().reason == "displaced"
            if self.routing:
                assert each.priority >= PRIORITIES[tenant]
            else:
                assert held[each.tenant] > ROOM / len(TENANTS)
            if not self.routing or each.priority == PRIORITIES[tenant]:
                assert held[each.tenant] > own
            newer = [other for other in before if other.tenant == each.tenant and other.index > each.index]
            assert all(other.over for other in newer)

    def unreachable(self, passage):
        passage.tries = 0
        try:
            self.gateway.unreachable(passage)
        except Refused as refused:
            self.gateway.fail(passage, refused.reason)

    def play(self, event, first, second):
        if event == "arrive":
            self.arrive(first, second)
        elif event == "apply":
            self.gateway.apply(ServeAction(batch_cap=first, priority_routing=second))
        elif event == "wait":
            self.now_s += first
            self.gateway.tick()
            for each in self.waiting:  # what their clients' tasks do
                if not each.waits:
                    self.gateway.fail(each, "queue timeout")
        else:
            there = event in ("complete", "reject", "unreachable")
            among = self.running if there else [*self.running, *self.waiting]
            if among:
                passage = among[first % len(among)]
                if event == "complete":
                    self.gateway.complete(passage, 3)
                elif event == "reject":
                    self.rejected += passage.sequences
                    self.gateway.reject(passage, "http 400")
                elif event == "give_up":
                    self.gateway.fail(passage, "client went away", given_up=True)
                elif event == "unreachable":
                    self.unreachable(passage)
                elif passage.upstream is None:
                    self.gateway.displace(passage)

    def check(self, before):
        """What holds after each event; `before`: sequences at the upstreams before it."""
        gateway = self.gateway
        assert gateway.waiting == sum(self.held(self.waiting)) <= ROOM
        for upstream, had in zip(gateway.upstreams, before, strict=True):
            there = [each for each in self.running if each.upstream is upstream]
            assert upstream.running == sum(each.sequences for each in there)
            if upstream.running > had:
                assert upstream.running <= gateway.action.batch_cap * upstream.engines or len(there) == 1
        if waiting := self.waiting:
            rank = (lambda each: (each.priority, each.index)) if self.routing else lambda each: each.index
            first = min(waiting, key=rank)
            assert first.failed_at or gateway._free(first.sequences) is None  # nobody waits without need
        assert gateway._turn(self.now_s).next(gateway._room) is None
        for i, totals in enumerate(gateway.ledger.totals):
            assert totals.arrived == self.arrived[i]
            assert totals.in_flight == self.held([*self.waiting, *self.running])[i]
            assert totals.arrived == totals.outcomes.total() + totals.in_flight

    def run(self, events):
        for event in events:
            before = [each.running for each in self.gateway.upstreams]
            self.play(*event)
            self.check(before)
        while self.running:  # all of them get their turn
            self.gateway.complete(self.running[0], 1)
        assert not self.waiting
        record = self.gateway.window()
        assert (record.in_flight, record.arrived + self.rejected) == (0, sum(self.arrived))
        assert record.completed + record.failed == record.arrived
        assert sum(self.gateway.ledger.failures.values()) == record.failed + self.rejected


@given(st.booleans(), EVENTS)
def test_everybody_ends_once_and_nobody_gives_way_to_those_who_hold_more(routing, events):
    async def main():
        Model(routing).run(events)

    asyncio.run(main())


def filled(routing, *sent, batch_cap=1, max_waiting=6):
    """A gateway whose one upstream is full, and the requests (tenant, sequences) that it was sent then."""
    gateway = Gateway(
        [Upstream("http://up")],
        TENANTS,
        ServeAction(batch_cap=batch_cap, priority_routing=routing),
        max_waiting=max_waiting,
    )
    for _ in range(batch_cap):
        gateway.enter(0, 1)
    return gateway, [gateway.enter(tenant, 1, sequences=sequences) for tenant, sequences in sent]


def run(main):
    async def within():
        main()

    asyncio.run(within())


def test_the_urgent_take_the_places_of_the_newest_of_the_least_urgent():
    def main():
        gateway, sent = filled(True, (3, 1), (3, 1), (1, 1), (3, 1), (1, 1), (3, 1))
        urgent = [gateway.enter(0, 1) for _ in range(6)]
        assert [each.over for each in sent] == [True] * 6
        assert not any(each.over for each in urgent)
        with pytest.raises(Refused):
            gateway.enter(0, 1)
        with pytest.raises(Refused):
            gateway.enter(3, 1)
        record = gateway.window()
        assert record.tenant_failed.tolist() == [1, 2, 0, 5]
        assert (record.refused, record.failed, record.in_flight) == (8, 8, 7)
        assert gateway.ledger.failures == {"displaced": 6, "queue full": 2}

        gateway, sent = filled(True, (3, 1), (3, 1), (1, 1), (3, 1), (1, 1), (3, 1))
        for count, lost in enumerate([5, 3, 1, 0], start=1):
            gateway.enter(0, 1)
            assert sent[lost].over
            assert sum(each.over for each in sent) == count

    run(main)


def test_without_priorities_whoever_holds_most_gives_way():
    def main():
        gateway, flood = filled(False, *[(3, 1)] * 6)
        others = [gateway.enter(tenant, 1) for tenant in (0, 1, 1, 2)]
        assert [each.over for each in flood] == [False] * 2 + [True] * 4
        with pytest.raises(Refused):  # its share is no larger than the others'
            gateway.enter(1, 1)
        assert not any(each.over for each in others)

    run(main)


def test_nobody_loses_a_place_to_what_does_not_fit_anyhow():
    def main():
        gateway, sent = filled(True, (0, 4), (3, 2))
        with pytest.raises(Refused):
            gateway.enter(0, 1, sequences=3)
        assert not any(each.over for each in sent)
        assert gateway.enter(0, 1, sequences=2).waits
        assert sent[1].over

    run(main)


def test_a_request_that_comes_back_from_its_upstream_does_not_overfill_the_room():
    def main():
        gateway = Gateway(
            [Upstream("http://one"), Upstream("http://two")],
            TENANTS,
            ServeAction(batch_cap=1),
            max_waiting=2,
        )
        first, _, third, fourth = (gateway.enter(0, 1) for _ in range(4))
        gateway.unreachable(first)
        assert (gateway.waiting, third.waits, fourth.over) == (2, True, True)

    run(main)


# ------------------------------------------------------------------------------------------- many sequences


def test_the_cap_is_of_sequences():
    def main():
        gateway, (two, three) = filled(False, (0, 2), (0, 3), batch_cap=4, max_waiting=100)
        gateway.complete(next(iter(gateway._at_upstreams)), 1)
        assert (two.upstream, gateway.upstreams[0].running) == (None, 3)
        gateway.complete(next(iter(gateway._at_upstreams)), 1)
        assert [each.upstream is None for each in (two, three)] == [False, True]
        assert gateway.upstreams[0].running == 4
        record = gateway.window()
        assert (record.arrived, record.completed) == (9, 2)
        assert (record.running, record.waiting, record.in_flight) == (4, 3, 7)

    run(main)


def test_a_heavy_request_is_overtaken_by_as_much_as_it_weighs_and_then_goes():
    def main():
        gateway, (heavy, *light) = filled(False, (0, 3), *[(1, 1)] * 6, batch_cap=4, max_waiting=100)
        running = sorted(gateway._at_upstreams, key=lambda each: each.index)
        gone = []
        while heavy.upstream is None:  # one leaves, one comes: without end, were it not for its turn
            gateway.complete(running.pop(0), 1)
            gone += [each for each in light if each.upstream is not None and each not in gone]
            running += [each for each in gone if each not in running and not each.over]
            light.append(gateway.enter(1, 1))
            assert len(gone) <= 3
        assert len(gone) == 3
        assert gateway.upstreams[0].running <= 4

    run(main)


def test_no_less_urgent_request_overtakes_a_heavy_one_where_it_waits():
    def main():
        gateway, (heavy, less) = filled(True, (1, 2), (3, 1), batch_cap=2, max_waiting=100)
        gateway.complete(next(iter(gateway._at_upstreams)), 1)
        assert (heavy.upstream, less.upstream, gateway.upstreams[0].running) == (None, None, 1)
        equal = gateway.enter(2, 1)
        assert equal.upstream is not None
        gateway.complete(equal, 1)
        urgent = gateway.enter(0, 1)  # before it in any case
        assert (heavy.overtaken, urgent.upstream is None) == (1, False)

    run(main)


def test_one_upstream_is_kept_for_a_heavy_request_and_the_others_go_on():
    def main():
        upstreams = [Upstream("http://one"), Upstream("http://two")]
        gateway = Gateway(upstreams, TENANTS, ServeAction(batch_cap=4), max_waiting=100)
        for _ in range(8):
            gateway.enter(0, 1)
        heavy = gateway.enter(0, 1, sequences=4)
        light = [gateway.enter(1, 1) for _ in range(20)]
        for _ in range(40):  # the busiest upstream is the one that goes on
            there = [each for each in gateway._at_upstreams if each.upstream is upstreams[1]]
            gateway.complete(min(there, key=lambda each: each.index), 1)
            there = [each for each in gateway._at_upstreams if each.upstream is upstreams[0]]
            gateway.complete(min(there, key=lambda each: each.index), 1)
            if heavy.upstream is not None:
                break
        assert heavy.upstream is not None
        assert sum(each.upstream is None and not each.over for each in light) > 0  # not after all of them

    run(main)


def test_what_weighs_more_than_the_cap_goes_alone():
    def main():
        gateway, (heavy, behind) = filled(False, (0, 7), (1, 1), batch_cap=2, max_waiting=100)
        assert gateway.max_sequences == 2  # what a client may ask for; the cap may have fallen since
        for passage in sorted(gateway._at_upstreams, key=lambda each: each.index):
            gateway.complete(passage, 1)
        while behind.upstream is not None and not behind.over:
            gateway.complete(behind, 1)
        assert heavy.upstream is not None
        assert gateway.upstreams[0].running == 7
        assert gateway.enter(0, 1).waits

    run(main)


def test_a_heavy_request_that_failed_at_the_only_upstream_with_room_for_it_goes_to_another_one():
    def main():
        small, large = Upstream("http://small"), Upstream("http://large", engines=2)
        gateway = Gateway([small, large], TENANTS, ServeAction(batch_cap=2), clock=lambda: now_s[0])
        heavy = gateway.enter(0, 1, sequences=3)
        assert heavy.upstream is large
        gateway.enter(0, 1)
        gateway.unreachable(heavy)
        now_s[0] += 5.0
        gateway.tick()
        gateway.complete(next(each for each in gateway._at_upstreams if each is not heavy), 1)
        assert heavy.upstream is small

    now_s = [1000.0]
    run(main)


def test_those_behind_a_heavy_request_that_gives_way_go_at_once():
    def main():
        gateway, (heavy, light, lighter, behind) = filled(
            False, (3, 2), (1, 1), (1, 1), (1, 1), batch_cap=3, max_waiting=100
        )
        gateway.complete(next(iter(gateway._at_upstreams)), 1)
        gateway.complete(light, 1)
        gateway.complete(lighter, 1)
        assert (heavy.overtaken, behind.upstream, gateway.upstreams[0].running) == (2, None, 2)
        gateway.displace(heavy)
        assert (heavy.over, behind.upstream is None) == (True, False)

    run(main)


def test_who_gives_way():
    assert gives_way([3, 5, 1, 0], (0, 1, 2, 3), newcomer=0) == 2  # the least urgent that has anything
    assert gives_way([3, 5, 1, 0], (0, 0, 0, 0), newcomer=2) == 1  # the one that has most
    assert gives_way([4, 4], (0, 0), newcomer=0) == 0  # nobody for an equal
    assert gives_way([4, 4], (0, 0), newcomer=1) == 1
