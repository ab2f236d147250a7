"""Walk the kernel's records and recompute, from its lists, every total that it keeps."""

from __future__ import annotations

from collections import Counter

import numpy as np

from llmserve_env.sim.state import (
    BLOCK_TOKENS,
    CANCELLED,
    COMPLETED,
    FAILED,
    MAX_RUNNING,
    PENDING,
    PREFILL,
    RETRYING,
    RUNNING,
    TRANSFER,
    UP,
    WAITING,
)


def _blocks(tokens):
    return -(-int(tokens) // BLOCK_TOKENS)


def _walk(first, after):
    """The members of a linked list, which must end."""
    found = []
    while first >= 0:
        assert first not in found
        found.append(int(first))
        first = after[first]
    return found


def check(batch):
    """Check all cells of a batch; between two windows every one of these holds."""
    for episode in range(len(batch.cells)):
        low = batch._first[episode]
        high = low + batch.cells["requests"][episode]
        places = Counter()
        for index in range(batch.engines.shape[1]):
            places.update(_Engine(batch, episode, index).check())
        out, cell = batch.outcomes[low:high], batch.cells[episode]
        flying = int(cell["transfers"])
        if flying:
            heap = batch.transfers[low : low + flying].tolist()
            assert all(heap[(i - 1) // 2] <= heap[i] for i in range(1, flying))
            places.update(int(request) for _, request in heap)
        status = out["status"]
        away = int(cell["retrying"])
        if away:
            heap = batch.retries[low : low + away].tolist()
            assert all(heap[(i - 1) // 2] <= heap[i] for i in range(1, away))
            assert all(out["sent_ps"][request] == time_ps for time_ps, request in heap)
            assert sorted(request for _, request in heap) == np.flatnonzero(status == RETRYING).tolist()
        assert away == (status == RETRYING).sum()
        alive = np.flatnonzero((status == WAITING) | (status == RUNNING) | (status == TRANSFER))
        assert places == Counter(alive.tolist()), "each unfinished request is in exactly one place"
        seen = int(cell["next_request"])
        assert (status[:seen] != PENDING).all()
        assert (status[seen:] == PENDING).all()


def emitted_tokens(batch):
    """Output tokens that each request has been given so far, scheduled batches included; int64[n]."""
    tokens = batch.outcomes["generated"].astype(np.int64)
    for episode in range(len(batch.cells)):
        low = batch._first[episode]
        for index in range(batch.engines.shape[1]):
            engine = _Engine(batch, episode, index)
            for slot in engine.run:
                grown = engine.clock[engine.e["slot_class"][slot]] - engine.e["slot_start"][slot] + 1
                grown = 0 if slot == engine.e["partial"] else grown
                tokens[low + engine.e["slot_request"][slot]] = engine.e["slot_generated"][slot] + grown
    return tokens


class _Engine:
    def __init__(self, batch, episode, index):
        self.batch = batch
        self.g = episode * batch.engines.shape[1] + index
        self.e = {name: batch.engines[episode, index][name] for name in batch.engines.dtype.names}
        self.e |= {name: batch.slots[self.g][name] for name in batch.slots.dtype.names}
        assert self.e["row"] == self.g
        assert self.e["forbidden"] == 0, "no condition was to change in a way that the table does not know"
        self.low = batch._first[episode]
        self.high = self.low + batch.cells["requests"][episode]
        self.episode = episode
        self.out, self.req = batch.outcomes[self.low : self.high], batch.requests[self.low : self.high]
        self.clock = self.e["clock"]
        self.run = _walk(self.e["run_head"], self.e["slot_next"])
        self.limbo = _walk(self.e["limbo_head"], self.e["slot_next"]) if self.e["limbo_count"] else []

    def check(self):
        """Returns the requests that it holds or queues."""
        self.slots()
        self.totals()
        self.heaps()
        self.blocks()
        self.deadlines()
        running = [int(self.e["slot_request"][slot]) for slot in self.run]
        assert (self.out["status"][running] == RUNNING).all()
        return running + self.queues()

    def slots(self):
        e = self.e
        free = e["free_slot"][: e["slots_free"]].tolist()
        assert sorted(free + self.run + self.limbo) == list(range(MAX_RUNNING))
        assert e["running"] == len(self.run) + len(self.limbo)
        assert len(self.limbo) == e["limbo_count"]
        assert (e["run_tail"] if self.run else -1) == (self.run[-1] if self.run else -1)
        for before, slot in zip([-1, *self.run], self.run, strict=False):
            assert e["slot_prev"][slot] == before
        orders = [int(e["slot_order"][slot]) for slot in self.run]
        assert orders == sorted(orders), "running sequences stand in order of admission"
        if e["partial"] >= 0:
            assert e["partial"] in self.run
            request = e["slot_request"][e["partial"]]
            assert (
                0 < e["partial_done"] < self.req["prompt_tokens"][request] + e["slot_generated"][e["partial"]]
            )

    def context(self, slot):
        if slot in self.limbo:
            return int(self.e["slot_base"][slot])
        if slot == self.e["partial"]:
            return int(self.e["partial_done"])
        return int(
            self.e["slot_base"][slot] - self.e["slot_start"][slot] + self.clock[self.e["slot_class"][slot]]
        )

    def totals(self):
        e = self.e
        active = [slot for slot in self.run if slot != e["partial"]]
        assert e["active"] == len(active)
        assert e["kv_sum"] == sum(self.context(slot) for slot in active)
        counts = np.zeros_like(e["crossing"])
        longest = {}
        for slot in active:
            c, context = e["slot_class"][slot], self.context(slot)
            counts[c, (self.clock[c] - context) % BLOCK_TOKENS] += 1  # the clock at which it fills a block
            longest[c] = max(longest.get(c, 0), context)
            request = e["slot_request"][slot]
            done = context - self.req["prompt_tokens"][request]
            assert done == e["slot_generated"][slot] + self.clock[c] - e["slot_start"][slot]
        assert (counts == e["crossing"]).all()
        assert (counts.sum(1) == e["class_active"]).all()
        for c, context in longest.items():
            assert not e["longest_known"][c] or e["longest"][c] + self.clock[c] == context

    def heaps(self):
        e = self.e
        members = []
        for c in range(len(e["heap_size"])):
            size = e["heap_size"][c]
            keys, slots = e["heap_key"][c, :size], e["heap_slot"][c, :size]
            members += slots.tolist()
            assert all(keys[(i - 1) // 2] <= keys[i] for i in range(1, size))
            assert e["slot_heap"][slots].tolist() == list(range(size))
            assert (e["slot_class"][slots] == c).all()
            left = self.req["output_tokens"][e["slot_request"][slots]] - 1 - e["slot_generated"][slots]
            if e["role"] == PREFILL:
                left = 0
            assert (keys == e["slot_start"][slots] + left).all()
        assert sorted(members) == sorted(slot for slot in self.run if slot != e["partial"])

    def keys(self, slot):
        """Keys of the prefix nodes that a slot holds."""
        batch, request = self.batch, int(self.e["slot_request"][slot])
        if not self.e["slot_shared"][slot]:
            return []
        first = batch.prefix_offsets[self.low + self.episode + request]
        size = int(batch.cells["blocks_per_id"][self.episode])
        ids = batch.prefix_ids
        return [int(ids[first + b // size]) * size + b % size for b in range(self.e["slot_shared"][slot])]

    def blocks(self):
        e, queue, records = self.e, self.batch.queue[self.g], self.batch.nodes[self.g]
        places = self.batch.table[self.g]
        table = places["key"]
        nodes = dict(places[table >= 0].tolist())
        references = Counter()
        private = 0
        for slot in self.run + self.limbo:
            keys = self.keys(slot)
            references.update(nodes[key] for key in keys)
            own = _blocks(self.context(slot)) - len(keys)
            assert own >= 0
            private += own
        used = sorted(nodes.values())
        unused = records["free"][: e["nodes_free"]].tolist()
        assert sorted(used + unused) == list(range(len(records)))
        for key, node in nodes.items():
            assert records["key"][node] == key
            assert records["references"][node] == references[node]
        assert e["held"] == private + len(references), "held blocks are those of running sequences"

        # the free queue holds all others
        mask = len(queue) - 1
        free = 0
        waits = {}
        assert e["queue_tail"] - e["queue_head"] <= mask + 1
        for position in range(e["queue_head"], e["queue_tail"]):
            owner, length = queue[position & mask].tolist()
            assert length >= 0
            free += length
            if length and owner != -1:
                assert owner not in waits
                waits[owner] = position & mask
                assert owner >= 0 or length == 1
        assert free + e["held"] == e["blocks"]
        idle = {-2 - node for node in used if not references[node]}
        assert {owner for owner in waits if owner < 0} == idle, "idle prefix nodes wait in the free queue"
        for owner, position in waits.items():
            home = self.out["segment"][owner] if owner >= 0 else records["segment"][-2 - owner]
            assert home == position
        self.owners = {owner for owner in waits if owner >= 0}
        # an open-addressed table must find every key from its home
        for key in nodes:
            position = (((key * 0x9E3779B97F4A7C15) % 2**64) >> 20) & (len(table) - 1)
            while table[position] != key:
                assert table[position] != -1
                position = (position + 1) & (len(table) - 1)

    def deadlines(self):
        """No client goes away before the engine looks; one whose last token is scheduled does not."""
        limits = self.batch.tenants["deadline_ps"]
        for slot in self.run:
            request, c = self.e["slot_request"][slot], self.e["slot_class"][slot]
            if (
                slot != self.e["partial"]
                and self.e["heap_key"][c, self.e["slot_heap"][slot]] <= self.clock[c]
            ):
                continue
            leave_ps = int(self.out["sent_ps"][request]) + int(limits[self.req["tenant"][request]])
            assert self.e["leave_ps"] <= leave_ps

    def queues(self):
        e, out = self.e, self.out
        resumed = _walk(e["resumed_head"], out["next"])
        assert (out["status"][resumed] == WAITING).all()
        assert (out["preemptions"][resumed] > 0).all()
        fresh = []
        for tenant in range(len(e["fresh_head"])):
            queue = _walk(e["fresh_head"][tenant], out["next"])
            assert not queue or queue[-1] == e["fresh_tail"][tenant]
            assert (self.req["tenant"][queue] == tenant).all()
            fresh += queue
        assert np.isin(out["status"][fresh], (WAITING, TRANSFER)).all()
        assert e["waiting"] == len(resumed) + len(fresh)
        assert e["unfinished"] == e["waiting"] + e["running"]
        assert self.owners <= set(resumed), "only preempted requests may find blocks of their own again"
        for request in resumed:
            position = int(out["segment"][request])
            assert position < 0 or self.batch.queue["owner"][self.g, position] == request
        if e["condition"] == UP and e["role"] == PREFILL:
            assert (out["status"][fresh] != TRANSFER).all()
        assert not np.isin(out["status"][resumed + fresh], (COMPLETED, FAILED, CANCELLED)).any()
        return resumed + fresh
