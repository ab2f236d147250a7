"""KV blocks of an engine: the free queue, the prefix cache, and who holds what.

Blocks are touched only here.
"""

from __future__ import annotations

import numpy as np

from llmserve_env.compiled import hot, part
from llmserve_env.sim.state import BLOCK_TOKENS

_SPLITMIX = np.uint64(0x9E3779B97F4A7C15)


@hot
def blocks_for(tokens):
    """KV blocks that hold so many tokens."""
    return (tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS


@part
def table_find(s, e, key):
    """Position of a key in the hash table, or of the empty place where it belongs."""
    mask = s.table.shape[1] - 1
    position = np.int64((np.uint64(key) * _SPLITMIX) >> np.uint64(20)) & mask
    while s.table[e.row, position].key != -1 and s.table[e.row, position].key != key:
        position = (position + 1) & mask
    return position


@part
def table_delete(s, e, key):
    """Take a key out of the hash table; later ones of its run move up."""
    mask = s.table.shape[1] - 1
    hole = table_find(s, e, key)
    probe = (hole + 1) & mask
    while s.table[e.row, probe].key != -1:
        home = np.int64((np.uint64(s.table[e.row, probe].key) * _SPLITMIX) >> np.uint64(20)) & mask
        if ((probe - home) & mask) >= ((probe - hole) & mask):
            s.table[e.row, hole].key = s.table[e.row, probe].key
            s.table[e.row, hole].node = s.table[e.row, probe].node
            hole = probe
        probe = (probe + 1) & mask
    s.table[e.row, hole].key = -1


@part
def queue_compact(s, e):
    """Close the gaps that touched segments left in the ring; neighbours without an owner become one."""
    mask = s.queue.shape[1] - 1
    write = e.queue_head
    last_free = False
    for read in range(e.queue_head, e.queue_tail):
        length = s.queue[e.row, read & mask].length
        if length == 0:
            continue
        owner = s.queue[e.row, read & mask].owner
        if owner == -1 and last_free:
            s.queue[e.row, (write - 1) & mask].length += length
            continue
        s.queue[e.row, write & mask].owner = owner
        s.queue[e.row, write & mask].length = length
        if owner >= 0:
            s.outcomes[owner].segment = write & mask
        elif owner <= -2:
            s.nodes[e.row, -2 - owner].segment = write & mask
        last_free = owner == -1
        write += 1
    e.queue_tail = write


@part
def queue_push(s, e, owner, length):
    """Blocks become free; they are the last that an allocation will take."""
    mask = s.queue.shape[1] - 1
    if owner == -1 and e.queue_tail > e.queue_head:
        last = (e.queue_tail - 1) & mask
        if s.queue[e.row, last].owner == -1:
            s.queue[e.row, last].length += length
            return
    if e.queue_tail - e.queue_head > mask:
        queue_compact(s, e)
        if e.queue_tail - e.queue_head > mask:  # thousands of preempted requests: the newest loses its cache
            last = (e.queue_tail - 1) & mask
            if s.queue[e.row, last].owner >= 0:
                s.outcomes[s.queue[e.row, last].owner].segment = -1
            s.queue[e.row, last].owner = -1
            s.queue[e.row, last].length += length
            return
    position = e.queue_tail & mask
    s.queue[e.row, position].owner = owner
    s.queue[e.row, position].length = length
    if owner >= 0:
        s.outcomes[owner].segment = position
    elif owner <= -2:
        s.nodes[e.row, -2 - owner].segment = position
    e.queue_tail += 1


@hot
def queue_take(s, e, blocks):
    """Allocate blocks, least recently used first; what they cached is gone."""
    mask = s.queue.shape[1] - 1
    e.held += blocks
    while blocks > 0:
        position = e.queue_head & mask
        length = s.queue[e.row, position].length
        taken = min(length, blocks)
        owner = s.queue[e.row, position].owner
        if owner != -1:
            s.window.evictions += taken
            if owner <= -2 and taken > 0:
                node = -2 - owner
                table_delete(s, e, s.nodes[e.row, node].key)
                s.nodes[e.row, e.nodes_free].free = node
                e.nodes_free += 1
            elif owner >= 0 and taken == length:
                s.outcomes[owner].segment = -1
        s.queue[e.row, position].length = length - taken
        blocks -= taken
        if taken == length:
            e.queue_head += 1


@part
def prefix_blocks(s, request):
    """Full KV blocks of a prompt that have a hash."""
    hashed = (s.prefix_offsets[request + 1] - s.prefix_offsets[request]) * s.cell.blocks_per_id
    return min(hashed, np.int64(s.requests[request].prompt_tokens // BLOCK_TOKENS))


@part
def prefix_key(s, first, block):
    """Name of a prompt's block in the prefix cache; the prompt's hashes begin at `first`."""
    per_id = s.cell.blocks_per_id
    return s.prefix_ids[first + block // per_id] * per_id + block % per_id


@part
def share_blocks(s, e, slot, request, full_blocks):
    """Enter the prompt's blocks up to `full_blocks` into the prefix cache as they are computed."""
    q = s.slots[e.row]
    shared = np.int64(q.slot_shared[slot])
    first = s.prefix_offsets[request]
    limit = min(full_blocks, prefix_blocks(s, request))
    while shared < limit:
        key = prefix_key(s, first, shared)
        position = table_find(s, e, key)
        if s.table[e.row, position].key == key:
            # computed twice at once: keep the first copy, give the second back
            node = s.table[e.row, position].node
            if s.nodes[e.row, node].references == 0:
                s.queue[e.row, s.nodes[e.row, node].segment].length = 0
                e.held += 1
            s.nodes[e.row, node].references += 1
            e.held -= 1
            queue_push(s, e, np.int64(-1), np.int64(1))
        else:
            e.nodes_free -= 1
            node = s.nodes[e.row, e.nodes_free].free
            s.table[e.row, position].key = key
            s.table[e.row, position].node = node
            s.nodes[e.row, node].key = key
            s.nodes[e.row, node].references = 1
        shared += 1
    q.slot_shared[slot] = shared


@part
def free_blocks(s, e, slot, request, tokens, owner):
    """Give back what a sequence with `tokens` tokens in the cache holds, its last block first."""
    q = s.slots[e.row]
    shared = np.int64(q.slot_shared[slot])
    private = blocks_for(tokens) - shared
    if private > 0:
        e.held -= private
        queue_push(s, e, owner, private)
    first = s.prefix_offsets[request] if shared > 0 else 0
    for block in range(shared - 1, -1, -1):
        key = prefix_key(s, first, block)
        node = np.int64(s.table[e.row, table_find(s, e, key)].node)
        s.nodes[e.row, node].references -= 1
        if s.nodes[e.row, node].references == 0:
            e.held -= 1
            queue_push(s, e, -2 - node, np.int64(1))


@part
def cached_blocks(s, e, request, total):
    """Blocks of a waiting request that are still cached: (shared, of those unreferenced, private)."""
    shared = np.int64(0)
    idle = np.int64(0)
    private = np.int64(0)
    if not s.cell.prefix_cache:
        return shared, idle, private
    limit = (total - 1) // BLOCK_TOKENS
    count = np.int64(0)
    if s.cell.blocks_per_id > 0:
        first = s.prefix_offsets[request]
        count = prefix_blocks(s, request)
        stop = min(limit, count)
        while shared < stop:
            key = prefix_key(s, first, shared)
            position = table_find(s, e, key)
            if s.table[e.row, position].key != key:
                break
            if s.nodes[e.row, s.table[e.row, position].node].references == 0:
                idle += 1
            shared += 1
    segment = s.outcomes[request].segment
    if segment >= 0 and shared == min(count, limit):
        private = min(s.queue[e.row, segment].length, limit - shared)
    return shared, idle, private


@part
def hold_cached(s, e, request, hits):
    """Take what is still cached of a request that is admitted, as `cached_blocks` found it."""
    shared, idle, private = hits
    first = s.prefix_offsets[request] if shared > 0 else 0
    for block in range(shared):
        node = s.table[e.row, table_find(s, e, prefix_key(s, first, block))].node
        if s.nodes[e.row, node].references == 0:
            s.queue[e.row, s.nodes[e.row, node].segment].length = 0
        s.nodes[e.row, node].references += 1
    e.held += idle
    segment = s.outcomes[request].segment
    if segment >= 0:
        s.queue[e.row, segment].length -= private
        e.held += private
        disown(s, e, request)


@part
def disown(s, e, request):
    """What a preempted request left in the free queue is nobody's any more."""
    segment = s.outcomes[request].segment
    if segment >= 0:
        s.queue[e.row, segment].owner = -1
        s.outcomes[request].segment = -1


@hot
def free_room(e, others):
    """Blocks that sequences may still take beside `others` of them: a lone one may use the whole cache."""
    return (e.blocks if e.running - e.limbo_count <= others else e.block_cap) - e.held


@part
def reset_blocks(s, e):
    """Empty an engine's KV cache: all blocks of its precision free, nothing cached."""
    e.blocks = s.cost.blocks[e.tier]
    e.block_cap = np.int64(e.kv_fraction * e.blocks)
    e.held = 0
    e.queue_head = 0
    e.queue_tail = 1
    s.queue[e.row, 0].owner = -1
    s.queue[e.row, 0].length = e.blocks
    nodes = s.nodes.shape[1]
    e.nodes_free = nodes
    for i in range(nodes):
        s.nodes[e.row, i].free = nodes - 1 - i
        s.nodes[e.row, i].references = 0
    for i in range(s.table.shape[1]):
        s.table[e.row, i].key = -1
