"""The scheduler written plainly: lists, loops over requests and over iterations, one object per KV block.

It shares nothing with the kernel but the constants of the records: its tables are its own (tables.py).
Where the kernel keeps totals, this steps every request through every batch.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from llmserve_env.sim.state import ACCEPT_ONE, NEVER_PS, PS_PER_S

from .tables import Tables

BLOCK = 16


def blocks_of(tokens):
    return -(-tokens // BLOCK)


@dataclass
class Block:
    content: object = None  # ("own", request, index) or ("node", key)
    references: int = 0


@dataclass(eq=False)
class Request:
    index: int
    arrival_ps: int
    prompt: int
    output: int
    tenant: int
    keys: list = field(default_factory=list)  # prefix cache key of each full block of the prompt
    generated: int = 0  # output tokens scheduled so far
    computed: int = 0  # tokens in the KV cache once the batches in flight have ended
    blocks: list = field(default_factory=list)
    shared: int = 0  # how many of them are prefix nodes
    first_ps: int = 0
    finish_ps: int = 0
    last_ps: int = 0  # its last token so far
    worst_gap_ps: int = 0
    preemptions: int = 0
    sent_ps: int = 0  # of its current try
    retries: int = 0
    status: str = "pending"
    queued_ps: int = 0
    transferred: bool = False

    @property
    def decoding(self):
        return self.computed >= self.prompt + self.resume_from

    resume_from: int = 0  # output tokens that the current prefill recomputes

    def __post_init__(self):
        self.sent_ps = self.arrival_ps


class Engine:
    def __init__(self, cell, blocks, role, tier):
        self.cell = cell
        self.role, self.tier = role, tier
        self.reset(blocks)
        self.running, self.resumed, self.fresh = [], [], []
        self.in_flight = []  # (end_ps, requests that end in it)
        self.accept = [0] * 4
        self.next_ps, self.busy_ps = NEVER_PS, 0
        self.condition = "up"
        self.assigned = []
        self.batch_cap, self.fraction, self.depth, self.priority = 256, 1.0, 0, False

    def reset(self, blocks):
        self.blocks = [Block() for _ in range(blocks)]
        self.free = deque(range(blocks))
        self.nodes = {}  # key -> block

    @property
    def held(self):
        return len(self.blocks) - len(self.free)

    @property
    def block_cap(self):
        return int(self.fraction * len(self.blocks))

    def room(self, blocks, others=1):
        alone = sum(r not in self.finishing for r in self.running) <= others
        return self.held + blocks <= (len(self.blocks) if alone else self.block_cap)

    # blocks

    def take(self, count):
        taken = []
        for _ in range(count):
            b = self.free.popleft()
            content = self.blocks[b].content
            if content is not None:
                self.cell.count["evictions"] += 1
                if content[0] == "node":
                    del self.nodes[content[1]]
            self.blocks[b].content = None
            self.blocks[b].references = 1
            taken.append(b)
        return taken

    def give_back(self, request, keep):
        for position in range(len(request.blocks) - 1, -1, -1):
            b = request.blocks[position]
            block = self.blocks[b]
            block.references -= 1
            if block.references == 0:
                if position >= request.shared:
                    block.content = ("own", request.index, position) if keep else None
                self.free.append(b)
        request.blocks, request.shared = [], 0

    def share(self, request):
        if not self.cell.prefix_cache:
            return
        for position in range(request.shared, min(request.computed // BLOCK, len(request.keys))):
            key = request.keys[position]
            mine = request.blocks[position]
            if key in self.nodes:
                b = self.nodes[key]
                if self.blocks[b].references == 0:
                    self.free.remove(b)
                self.blocks[b].references += 1
                request.blocks[position] = b
                self.blocks[mine].references = 0
                self.free.append(mine)
            else:
                self.nodes[key] = mine
                self.blocks[mine].content = ("node", key)
            request.shared = position + 1

    def cached(self, request, total):
        """Blocks that a waiting request would find again: (shared, private), as block ids."""
        if not self.cell.prefix_cache:
            return [], []
        limit = (total - 1) // BLOCK
        shared = []
        for key in request.keys[:limit]:
            if key not in self.nodes:
                break
            shared.append(self.nodes[key])
        private = []
        if len(shared) == min(len(request.keys), limit):
            own = {
                self.blocks[b].content[2]: b
                for b in self.free
                if self.blocks[b].content and self.blocks[b].content[:2] == ("own", request.index)
            }
            position = len(shared)
            while position in own and position < limit:
                private.append(own[position])
                position += 1
        return shared, private

    def disown(self, request):
        for block in self.blocks:
            if block.content and block.content[:2] == ("own", request.index):
                block.content = None

    # scheduling

    def preempt(self):
        victims = [r for r in self.running if not self.over(r)]
        if self.priority:
            rank = self.cell.tenants.rank
            worst = max(rank[r.tenant] for r in victims)
            victims = [r for r in victims if rank[r.tenant] == worst]
        victim = victims[-1]
        self.running.remove(victim)
        self.disown(victim)
        self.give_back(victim, keep=self.cell.prefix_cache)
        victim.computed, victim.resume_from = 0, victim.generated
        victim.transferred = False
        victim.preemptions += 1
        victim.status = "waiting"
        self.resumed.insert(0, victim)
        self.cell.count["preemptions"] += 1
        return victim

    def over(self, request):
        return request.generated >= request.output or (self.role == "prefill" and request.decoding)

    def leaves_ps(self, r):
        """When the client of a request that is here goes away; never once its last token is scheduled."""
        tenants = self.cell.tenants
        if r in self.running and self.over(r):
            return NEVER_PS
        untouched = r in self.fresh and not r.transferred
        limit = int((tenants.patience_ps if untouched else tenants.deadline_ps)[r.tenant])
        if limit >= NEVER_PS:
            return NEVER_PS
        return max(r.sent_ps + limit, r.queued_ps if r in self.fresh else 0)

    def expire(self, now_ps):
        for leave_ps, _, r in sorted((self.leaves_ps(r), r.index, r) for r in self.assigned):
            if leave_ps >= NEVER_PS or leave_ps > now_ps:
                break
            if r in self.running:
                self.release(leave_ps)
                self.running.remove(r)
                self.give_back(r, keep=False)
            else:
                (self.fresh if r in self.fresh else self.resumed).remove(r)
                self.disown(r)
            self.assigned.remove(r)
            self.cell.count["timeouts"] += 1
            self.cell.end_try(r, leave_ps)

    def release(self, now_ps):
        """What ended in batches that are over by now gives back what it held."""
        for batch in [b for b in self.in_flight if b[0] <= now_ps]:
            self.in_flight.remove(batch)
            for r in [r for r in self.running if r in batch[1]]:
                self.running.remove(r)
                self.give_back(r, keep=False)
                self.assigned.remove(r)

    def waiting_order(self):
        fresh = sorted(self.fresh, key=lambda r: (r.queued_ps, r.index))
        if self.condition == "draining":
            fresh = []
        order = self.resumed + fresh
        if self.priority:
            order.sort(key=lambda r: self.cell.tenants.rank[r.tenant])
        return order

    def tokens_of_step(self, tenant, depth):
        if depth == 0:
            return 1
        c = self.cell.tenants.speculation_class[tenant]
        return (self.accept[c] + int(self.cell.tenants.accept[c, depth])) >> 20

    def decide(self, until_ps):
        now = self.next_ps
        if self.condition == "reloading":
            self.condition = "up"
            self.role, self.tier = self.next_role, self.next_tier
            self.reset(int(self.cell.cost.blocks[self.tier]))
        self.expire(now)
        self.release(now)

        self.finishing = [r for r in self.running if self.over(r)]  # in the batch in flight
        active = [r for r in self.running if r.decoding and r not in self.finishing]
        depth = self.depth
        depth = min(depth, self.cell.budget // max(len(active), 1) - 1)
        budget = self.cell.budget
        preempted = False

        decodes, chunks = [], []
        for r in active:  # in order of admission
            if r not in self.running:
                continue
            step = self.tokens_of_step(r.tenant, depth)
            need = blocks_of(r.computed + step) - len(r.blocks)
            while r in self.running and not self.room(need):
                self.preempt()
                preempted = True
            if r in self.running:
                r.blocks += self.take(need)
                decodes.append((r, step))
        decodes = [d for d in decodes if d[0] in self.running]
        budget -= len(decodes) * (1 + depth)

        for r in [r for r in self.running if not r.decoding]:
            total = r.prompt + r.resume_from
            chunk = min(total - r.computed, budget)
            if chunk <= 0:
                continue
            need = blocks_of(r.computed + chunk) - len(r.blocks)
            while r in self.running and not self.room(need):
                self.preempt()
                preempted = True
            if r in self.running:
                chunks.append((r, chunk, r.computed))
                r.blocks += self.take(need)
                r.computed += chunk
                self.share(r)
                budget -= chunk
        decodes = [d for d in decodes if d[0] in self.running]

        unfinished_prefill = any(not r.decoding for r in self.running)
        joined = False
        while (
            not preempted
            and not unfinished_prefill
            and budget > 0
            and len(self.running) < self.batch_cap
            and self.waiting_order()
        ):
            r = self.waiting_order()[0]
            total = r.prompt + r.generated
            if r.transferred:
                step = self.tokens_of_step(r.tenant, depth)
                if budget < 1 + depth or not self.room(max(blocks_of(total), blocks_of(total - 1 + step)), 0):
                    break
                self.fresh.remove(r)
                self.running.append(r)
                r.status, r.transferred = "running", False
                r.blocks = self.take(blocks_of(total))
                r.computed, r.resume_from = total - 1, 0
                budget -= 1 + depth
                joined = True
                decodes.append((r, self.tokens_of_step(r.tenant, depth)))
                # its first step may need more than the one block that it has room for under speculation
                more = blocks_of(r.computed + decodes[-1][1]) - len(r.blocks)
                assert more <= 0 or depth
                r.blocks += self.take(max(more, 0))
                continue
            shared, private = self.cached(r, total)
            idle = sum(self.blocks[b].references == 0 for b in shared)
            if not self.room(blocks_of(total) - len(shared) + idle, 0):
                break
            (self.resumed if r in self.resumed else self.fresh).remove(r)
            self.running.append(r)
            r.status = "running"
            for b in shared + private:
                if self.blocks[b].references == 0:
                    self.free.remove(b)
                self.blocks[b].references += 1
            for b in private:
                self.blocks[b].content = None
            self.disown(r)
            r.blocks, r.shared = shared + private, len(shared)
            cached = len(r.blocks) * BLOCK
            self.cell.count["cached_tokens"] += cached
            r.resume_from = r.generated
            chunk = min(total - cached, budget)
            chunks.append((r, chunk, cached))
            r.blocks += self.take(blocks_of(cached + chunk) - len(r.blocks))
            r.computed = cached + chunk
            self.share(r)
            budget -= chunk
            unfinished_prefill = not r.decoding

        if not decodes and not chunks:
            self.rest(until_ps)
            return
        self.run(decodes, chunks, depth, joined)

    def rest(self, until_ps):
        limit = min([until_ps, *(self.leaves_ps(r) for r in self.assigned)])
        if self.busy_ps > self.next_ps:
            self.next_ps = self.busy_ps
        elif self.condition == "draining" and not self.running:
            self.condition = "reloading"
            self.next_ps += self.reload_ps
        elif (self.fresh or self.resumed) and limit < NEVER_PS:
            self.next_ps = max(limit, self.next_ps + 1)
        else:
            self.next_ps = NEVER_PS

    def run(self, decodes, chunks, depth, joined):
        count = self.cell.count
        ending = [r for r, _, _ in chunks if r.decoding]
        contexts = [r.computed for r, _ in decodes]
        duration = duration_ps(
            self.cell.cost, self.tier, contexts, [c[1:] for c in chunks], len(ending), depth, self.cell.draft
        )
        start = max(self.next_ps, self.busy_ps)
        end = start + duration
        over = []
        for r, step in decodes:
            r.computed += step
            r.generated += step
            count["output_tokens"] += min(step, r.output - (r.generated - step))
            r.worst_gap_ps = max(r.worst_gap_ps, end - r.last_ps)
            r.last_ps = end
            if r.generated >= r.output:
                over.append(r)
        for r in ending:
            r.generated += 1
            if r.first_ps:
                r.worst_gap_ps = max(r.worst_gap_ps, end - r.last_ps)
            r.last_ps = end
            count["output_tokens"] += 1
            if r.first_ps == 0:
                r.first_ps = end
            if self.over(r):
                over.append(r)
        for r in over:
            if r.generated >= r.output:
                r.status, r.finish_ps = "completed", end
                count["completed"] += 1
            else:
                r.status = "transfer"
                self.cell.transfers.append((end + self.cell.transfer_ps(r), r))
        if depth:
            for c in range(len(self.cell.tenants.accept)):
                self.accept[c] = (self.accept[c] + int(self.cell.tenants.accept[c, depth])) % ACCEPT_ONE
        self.in_flight.append((end, over))
        self.next_ps, self.busy_ps = end if self.cell.synchronous else start, end
        count["iterations"] += 1
        count["prefill_tokens"] += sum(c for _, c, _ in chunks)
        count["busy_ps"] += duration

    @property
    def feeds(self):
        role = self.next_role if self.condition == "reloading" else self.role
        return role == "prefill"

    def advance(self, until_ps):
        while self.next_ps < until_ps:
            self.decide(until_ps)

    def enqueue(self, request, now_ps):
        request.queued_ps = now_ps
        request.transferred = request.status == "transfer"
        if not request.transferred:
            request.status = "waiting"
        self.fresh.append(request)
        self.assigned.append(request)
        if self.next_ps == NEVER_PS:
            self.next_ps = max(now_ps, self.busy_ps)

    def load(self, now_ps):
        gone = {r for end, over in self.in_flight if end <= now_ps for r in over}
        return sum(r not in gone for r in self.assigned)


class Cell:
    """Engines behind a router; `windows` is a list of (action, seconds as ps)."""

    def __init__(
        self,
        requests,
        tenants,
        cost: Tables,
        *,
        engines,
        prefill_engines,
        budget,
        prefix_cache,
        action,
        transfer,
        draft,
        restart_ps,
        load_ps,
        burst_ps,
        synchronous,
        longest=NEVER_PS,
        sequences=None,
    ):
        self.requests, self.tenants, self.cost = requests, tenants, cost
        self.synchronous = synchronous
        self.longest, self.sequences = longest, sequences  # of a context; running, whatever an action says
        for r in requests:
            r.output = min(r.output, max(longest - r.prompt, 1))
        self.budget, self.prefix_cache, self.prefill_engines = budget, prefix_cache, prefill_engines
        self.transfer, self.draft, self.restart_ps, self.load_ps = transfer, draft, restart_ps, load_ps
        self.count = dict.fromkeys(
            (
                "arrived",
                "completed",
                "failed",
                "cancelled",
                "preemptions",
                "iterations",
                "prefill_tokens",
                "cached_tokens",
                "output_tokens",
                "evictions",
                "refused",
                "retries",
                "timeouts",
                "busy_ps",
            ),
            0,
        )
        self.transfers, self.next_request = [], 0
        self.burst_ps, self.owed_ps, self.counted_ps = burst_ps, 0, 0  # of the bucket in front of the queue
        self.engines = [
            Engine(self, int(cost.blocks[action["tier"]]), self.role_of(i, action["split"]), action["tier"])
            for i in range(engines)
        ]

    def role_of(self, index, split):
        if not split:
            return "colocated"
        return "prefill" if index < self.prefill_engines else "decode"

    def transfer_ps(self, request):
        return self.transfer[0] + self.transfer[1] * request.prompt

    def route(self, now_ps, transferred):
        for e in self.engines:
            e.expire(now_ps)

        def badness(e):
            role = e.role if e.condition == "up" else e.next_role
            wrong = role == ("prefill" if transferred else "decode")
            return wrong, e.condition != "up", e.load(now_ps)

        return min(self.engines, key=badness)

    def switch(self, action, now_ps):
        if any(e.condition != "up" for e in self.engines):
            return
        for i, e in enumerate(self.engines):
            role = self.role_of(i, action["split"])
            if (e.role, e.tier) == (role, action["tier"]):
                continue
            e.condition = "draining"
            e.next_role, e.next_tier = role, action["tier"]
            e.reload_ps = self.restart_ps + (
                int(self.load_ps[action["tier"]]) if e.tier != action["tier"] else 0
            )
            if e.next_ps == NEVER_PS:
                e.next_ps = max(now_ps, e.busy_ps)
            if len(self.engines) > 1:
                for r in sorted(e.fresh, key=lambda r: (r.queued_ps, r.index)):
                    e.fresh.remove(r)
                    e.assigned.remove(r)
                    queued_ps = r.queued_ps
                    self.route(now_ps, r.transferred).enqueue(r, now_ps)
                    r.queued_ps = queued_ps
            return

    def advance(self, until_ps):
        while True:
            for e in self.engines:
                while e.next_ps < until_ps and e.feeds:
                    e.decide(until_ps)
            ready_ps, _, r = min(((t, r.index, r) for t, r in self.transfers), default=(NEVER_PS, 0, None))
            stop_ps = min(ready_ps, until_ps)
            for e in self.engines:
                if not e.feeds:
                    e.advance(stop_ps)
            if ready_ps < until_ps:
                ready_ps, _, r = min((t, r.index, r) for t, r in self.transfers)
                self.transfers.remove((ready_ps, r))
                self.route(ready_ps, True).enqueue(r, ready_ps)
            elif all(t >= until_ps for t, _ in self.transfers):
                return

    def end_try(self, r, now_ps):
        r.first_ps = r.last_ps = r.worst_gap_ps = r.generated = r.computed = r.resume_from = 0
        r.transferred = False
        if r.retries < self.tenants.retries[r.tenant]:
            r.sent_ps = now_ps + int(self.tenants.retry_after_ps[r.tenant]) * min(2**r.retries, 16)
            r.retries += 1
            r.status = "retrying"
        else:
            r.status, r.finish_ps = "failed", now_ps
            self.count["failed"] += 1

    def lets_in(self, r, now_ps, action):
        if action["rate"] is None:
            return True
        token_ps = min(round(PS_PER_S / action["rate"]), 1 << 59)
        self.owed_ps = max(self.owed_ps - (now_ps - self.counted_ps), 0)
        self.counted_ps = now_ps
        holds_ps = self.burst_ps
        if action["priority"]:
            ranks = self.tenants.ranks
            holds_ps = holds_ps * (ranks - int(self.tenants.rank[r.tenant])) // ranks
        if self.owed_ps + token_ps > max(holds_ps, token_ps):
            return False
        self.owed_ps += token_ps
        return True

    def next_leave_ps(self, after_ps):
        """When the next client goes away."""
        moments = [e.leaves_ps(r) for e in self.engines for r in e.assigned]
        return min([m for m in moments if m > after_ps], default=NEVER_PS)

    def serve(self, action, start_ps, until_ps):
        for e in self.engines:
            e.batch_cap, e.fraction = self.sequences or action["batch_cap"], action["fraction"]
            e.depth, e.priority = action["depth"], action["priority"]
        self.switch(action, start_ps)
        for e in self.engines:
            if e.next_ps == NEVER_PS and (e.fresh or e.resumed):
                e.next_ps = max(start_ps, e.busy_ps)
        now_ps = start_ps - 1
        while True:
            to_send = [r for r in self.requests if r.status in ("pending", "retrying")]
            r = min(to_send, key=lambda r: (r.sent_ps, r.index), default=None)
            leave_ps = self.next_leave_ps(now_ps)
            ready_ps = min((t for t, _ in self.transfers), default=NEVER_PS)  # gone before it is there, maybe
            stop_ps = min(leave_ps, max(ready_ps, now_ps + 1))
            if stop_ps < until_ps and (r is None or stop_ps <= r.sent_ps):
                now_ps = stop_ps
                self.advance(now_ps)
                for e in self.engines:
                    e.expire(now_ps)
                continue
            if r is None or r.sent_ps >= until_ps:
                break
            if r.status == "retrying":
                self.count["retries"] += 1
            else:
                self.count["arrived"] += 1
                too_many = blocks_of(r.prompt + r.output + 8) > int(min(self.cost.blocks))
                if too_many or r.prompt >= self.longest:
                    r.status, r.finish_ps = "cancelled", r.arrival_ps
                    self.count["cancelled"] += 1
                    continue
            if not self.lets_in(r, r.sent_ps, action):
                self.count["refused"] += 1
                self.end_try(r, r.sent_ps)
                continue
            now_ps = max(now_ps, r.sent_ps)
            self.advance(r.sent_ps)
            self.route(r.sent_ps, False).enqueue(r, r.sent_ps)
        self.advance(until_ps)
        for e in self.engines:
            e.expire(until_ps - 1)


def segment(knots, x):
    k = 0
    while k < len(knots) - 2 and x >= knots[k + 1]:
        k += 1
    return k


def duration_ps(cost: Tables, tier, contexts, chunks, ending, depth, draft):
    """Duration of one batch from the latency tables, decodes given by their contexts before it."""
    n = len(contexts)
    prefill = sum(chunk for chunk, _ in chunks)
    time = cost.dense_ps(tier, n * (1 + depth) + prefill) + cost.head_ps(tier, n * (1 + depth) + ending)
    kv = sum(contexts) + n
    if chunks:
        floor = cost.prefill_ps(tier, 0, 0)
        total = 0.0
        for chunk, cached in chunks:
            i, j = segment(cost.prefill_chunk, float(chunk)), segment(cost.prefill_kv, float(cached))
            u = (chunk - cost.prefill_chunk[i]) / (cost.prefill_chunk[i + 1] - cost.prefill_chunk[i])
            v = (cached - cost.prefill_kv[j]) / (cost.prefill_kv[j + 1] - cost.prefill_kv[j])
            u = max(u, 0.0)
            (a, b), (c, d) = ([cost.prefill_ps(tier, x, y) for y in (j, j + 1)] for x in (i, i + 1))
            low, high = a + u * (c - a), b + u * (d - b)
            total += max(max(low + v * (high - low), 0.0) - floor, 0.0)
        attention = floor + total
        if n:
            mean = kv / n
            context = mean + min(1.0, cost.mixed_skew / n) * (max(contexts) + 1 - mean)
            i, j = segment(cost.mixed_chunk, float(prefill)), segment(cost.mixed_kv, context)
            u = (prefill - cost.mixed_chunk[i]) / (cost.mixed_chunk[i + 1] - cost.mixed_chunk[i])
            v = (context - cost.mixed_kv[j]) / (cost.mixed_kv[j + 1] - cost.mixed_kv[j])
            u = min(max(u, 0.0), 1.0)
            (a, b), (c, d) = ([cost.mixed_ps(tier, x, n, y) for y in (j, j + 1)] for x in (i, i + 1))
            low, high = a + u * (c - a), b + u * (d - b)
            attention += max(low + v * (high - low), 0.0)
        time += round(float(attention))
    else:
        k = segment(cost.decode_kv, kv / n)
        slope = cost.decode_slope(tier, n, k)
        time += cost.decode_ps(tier, n, k) + slope * (kv - cost.decode_kv[k] * n) // n
    if depth and n:
        time += round(depth * (draft[0] * cost.dense_ps(tier, n) + draft[1] * cost.head_ps(tier, n)))
    return time
