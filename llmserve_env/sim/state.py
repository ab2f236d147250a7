"""Records that the kernel works on, and the limits that size them.

Time is an integer number of picoseconds: sums over stretches of iterations are then exact, so that the
kernel's closed forms equal a loop over iterations bit for bit on every machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llmserve_env.backend import MAX_TENANTS
from llmserve_env.schema import bounds

if TYPE_CHECKING:
    from numpy.typing import NDArray

PS_PER_S = 1_000_000_000_000
NEVER_PS = np.iinfo(np.int64).max // 2
"""Later than any time that is simulated (53 days)."""

MAX_RUNNING: int = bounds("batch_cap")["le"]
"""Sequences that one engine can run at once."""
MAX_BLOCKS = 1 << 24
"""KV blocks of one engine: 268 million tokens, a thousand times what one server of today holds."""
MAX_CLASSES = 4
"""Speculation classes in one workload."""
BLOCK_TOKENS = 16
"""Tokens in one KV block, vLLM's default."""
GAPS = 1024
"""Batches that an engine remembers for the worst token gap, a power of two."""
ACCEPT_ONE = 1 << 20
"""Fixed-point one of the accepted-token accumulators."""

MAX_DOUBLINGS = 4
"""How often a client doubles its wait before it tries again: 0.5 s to 8 s, as the OpenAI client's."""
MAX_TOKEN_PS = 1 << 59
"""Longest time between two tokens of the admission bucket (6.7 days)."""

# Request.status
PENDING, WAITING, RUNNING, TRANSFER, COMPLETED, FAILED, CANCELLED, RETRYING = range(8)
STATUS_NAMES = (
    "pending", "waiting", "running", "transfer", "completed", "failed", "cancelled", "retrying",
)  # fmt: skip

# Engine.role and Engine.condition
COLOCATED, PREFILL, DECODE = range(3)
UP, DRAINING, RELOADING = range(3)

REQUEST = np.dtype(
    [
        ("arrival_ps", np.int64),
        ("prompt_tokens", np.int32),
        ("output_tokens", np.int32),
        ("tenant", np.int32),
    ],
    align=True,
)

OUTCOME = np.dtype(
    [
        ("sent_ps", np.int64),  # when its current attempt was sent, or will be
        ("first_ps", np.int64),  # first token of that attempt, 0 before it
        ("finish_ps", np.int64),  # last token, or the time it failed; before, last token of one that is away
        ("worst_gap_ps", np.int64),  # longest time between two of its tokens so far
        ("generated", np.int32),  # tokens that survive a preemption or a transfer
        ("next", np.int32),  # next request in the same queue, -1 at its end
        ("segment", np.int32),  # where its freed blocks wait in the free queue, -1 when nowhere
        ("preemptions", np.uint16),
        ("status", np.int8),
        ("retries", np.int8),  # attempts after the first
    ],
    align=True,
)

ENGINE = np.dtype(
    [
        # what is asked of every engine at every event: one line of the cache or two
        ("next_ps", np.int64),  # when the scheduler decides next, NEVER_PS when idle
        ("leave_ps", np.int64),  # no client of a request that was started on goes away before
        ("waiting", np.int64),
        ("unfinished", np.int64),
        ("limbo_count", np.int64),  # finished in the batch in flight: resources not free yet
        ("limbo_ps", np.int64),  # when that batch ends
        ("condition", np.int64),
        ("role", np.int64),
        ("next_role", np.int64),
        ("soonest_ps", np.int64),  # no client of a request that was never admitted gives up before
        # and what only the engine's own decisions ask
        ("row", np.int64),  # its number in the batch: first index of slots, queue, nodes and table
        ("synchronous", np.int64),  # 1: decides when a batch has ended; 0: one batch ahead
        ("busy_ps", np.int64),  # end of the last batch that was scheduled
        # what the current action allows
        ("batch_cap", np.int64),
        ("block_cap", np.int64),
        ("depth", np.int64),
        ("priority", np.int64),
        ("token_budget", np.int64),
        ("tier", np.int64),
        ("reload_ps", np.int64),  # length of the reload that follows the drain
        ("next_tier", np.int64),
        ("forbidden", np.int64),  # changes of condition that were tried and are none: a fault of the kernel
        # longest batches, for the worst gap between a request's tokens
        ("batches", np.int64),  # scheduled so far
        ("gaps_head", np.int64),
        ("gaps_tail", np.int64),
        # blocks
        ("blocks", np.int64),
        ("kv_fraction", np.float64),
        ("held", np.int64),
        ("queue_head", np.int64),
        ("queue_tail", np.int64),
        ("nodes_free", np.int64),
        # running sequences
        ("admitted", np.int64),  # admissions so far
        ("running", np.int64),  # holds a slot: decoding, in prefill, or finishing in flight
        ("active", np.int64),  # decodes in the next batch
        ("kv_sum", np.int64),  # tokens in the KV cache of the active ones
        ("slots_free", np.int64),
        ("run_head", np.int64),
        ("run_tail", np.int64),
        ("partial", np.int64),  # slot whose prefill is unfinished, -1: none
        ("partial_done", np.int64),
        ("limbo_head", np.int64),  # first of what finished in the batch in flight
        ("limbo_blocks", np.int64),  # blocks that they alone hold
        # waiting requests
        ("resumed_head", np.int64),
        ("clock", np.int64, (MAX_CLASSES,)),  # tokens that a sequence of the class has gained so far
        ("accept", np.int64, (MAX_CLASSES,)),
        ("class_active", np.int64, (MAX_CLASSES,)),
        ("longest", np.int64, (MAX_CLASSES,)),  # largest (context - clock) of the class
        ("longest_known", np.int64, (MAX_CLASSES,)),
        ("heap_size", np.int64, (MAX_CLASSES,)),
        ("fresh_head", np.int32, (MAX_TENANTS,)),
        ("fresh_tail", np.int32, (MAX_TENANTS,)),
        ("merged", np.int32, (MAX_TENANTS,)),  # last request that a reroute put into the queue
    ],
    align=True,
)

SLOTS = np.dtype(
    [
        # longest batches, for the worst gap between a request's tokens
        ("gap_batch", np.int64, (GAPS,)),
        ("gap_ps", np.int64, (GAPS,)),
        # what decodes, by class
        (
            "crossing",
            np.int64,
            (MAX_CLASSES, BLOCK_TOKENS),
        ),  # sequences by the clock at which they need a block
        ("heap_key", np.int64, (MAX_CLASSES, MAX_RUNNING)),
        ("heap_slot", np.int32, (MAX_CLASSES, MAX_RUNNING)),
        ("free_slot", np.int32, (MAX_RUNNING,)),
        ("slot_request", np.int32, (MAX_RUNNING,)),
        ("slot_base", np.int64, (MAX_RUNNING,)),  # context when decoding began
        ("slot_start", np.int64, (MAX_RUNNING,)),  # class clock when decoding began
        ("slot_begin", np.int64, (MAX_RUNNING,)),  # batches scheduled when decoding began
        ("slot_order", np.int64, (MAX_RUNNING,)),  # admissions before it
        ("slot_generated", np.int32, (MAX_RUNNING,)),  # tokens generated before this admission
        ("slot_shared", np.int32, (MAX_RUNNING,)),  # leading blocks held as shared prefix nodes
        ("slot_class", np.int32, (MAX_RUNNING,)),
        ("slot_heap", np.int32, (MAX_RUNNING,)),
        ("slot_prev", np.int32, (MAX_RUNNING,)),
        ("slot_next", np.int32, (MAX_RUNNING,)),
        ("batch_slot", np.int32, (MAX_RUNNING,)),  # prefills that end in the batch being built
    ],
    align=True,
)
"""The places of an engine's running sequences: apart from ENGINE, which the cell looks at in every event."""

HISTOGRAM_BINS = 192
"""Bins of the window histograms: see `histogram_edges_s`."""

SUMS = np.dtype(
    [
        ("busy_ps", np.float64),
        ("sequence_ps", np.float64),  # running sequences integrated over busy time
        ("block_ps", np.float64),  # share of blocks held, integrated over busy time
        ("ttft_ps", np.float64),
        ("ttft_histogram", np.int64, (HISTOGRAM_BINS,)),
        ("gap_histogram", np.int64, (HISTOGRAM_BINS,)),
        ("tenant_ttft_ps", np.float64, (MAX_TENANTS,)),
    ],
    align=True,
)
"""What a window adds up, beside the counts of its WINDOW record, until means and percentiles are taken."""

CELL = np.dtype(
    [
        ("requests", np.int64),  # of its workload
        ("begun", np.int64),  # 0 until its first window
        ("next_request", np.int64),
        ("transfers", np.int64),  # KV transfers under way
        ("retrying", np.int64),  # requests whose client waits to send them again
        ("shortest_wait_ps", np.int64),  # of clients who time out and come back, NEVER_PS without any
        ("classes", np.int64),
        ("tenants", np.int64),
        ("ranks", np.int64),  # of the tenants under priority routing
        ("prefix_cache", np.int64),
        ("blocks_per_id", np.int64),  # KV blocks that one prefix hash stands for, 0 where prompts share none
        ("most_blocks", np.int64),  # a longer request is refused on arrival
        ("transfer_latency_ps", np.int64),
        ("transfer_ps_per_token", np.int64),
        ("draft_layers", np.float64),  # share of the dense time that one draft token takes
        ("draft_head", np.float64),  # LM heads that one draft token takes
        # the bucket in front of the queue
        ("token_ps", np.int64),  # between two tokens, 0 when everybody is let in
        ("burst_ps", np.int64),  # what the bucket holds, in time
        ("full_ps", np.int64),  # when it is full again
        # what the fleet is wanted to be, and what a change costs
        ("split", np.int64),
        ("feeding", np.int64),  # whether any engine prefills for others in this window, or may come to
        ("prefill_engines", np.int64),
        ("tier", np.int64),
        ("restart_ps", np.int64),
        ("load_ps", np.int64, (3,)),
        # what the cell can do, and how much it holds
        ("can_split", np.int64),
        ("has_tier", np.int64, (3,)),
        ("weight_bytes", np.float64, (3,)),  # of one engine
        ("block_bytes", np.float64),
        ("tenant_in_flight", np.int64, (MAX_TENANTS,)),
    ],
    align=True,
)


class Cost(NamedTuple):
    """Latency tables in picoseconds; first axis is the precision tier (FP16, INT8, INT4)."""

    dense_ps: NDArray[np.int64]  # [tier, tokens]
    head_ps: NDArray[np.int64]  # [tier, sequences]
    decode_kv: NDArray[np.int64]  # [knot] mean context
    decode_ps: NDArray[np.int64]  # [tier, sequences, knot]
    decode_slope: NDArray[np.int64]  # [tier, sequences, knot] ps per token of mean context
    prefill_chunk: NDArray[np.float64]
    prefill_kv: NDArray[np.float64]
    prefill_ps: NDArray[np.float64]  # [tier, chunk, kv]
    mixed_chunk: NDArray[np.float64]
    mixed_kv: NDArray[np.float64]
    mixed_ps: NDArray[np.float64]  # [tier, chunk, sequences, kv]
    mixed_skew: float
    blocks: NDArray[np.int64]  # [tier] KV blocks of one engine


TENANT = np.dtype(
    [
        ("patience_ps", np.int64),  # for a first admission, at most deadline_ps
        ("deadline_ps", np.int64),  # for the whole answer
        ("retries", np.int64),
        ("retry_after_ps", np.int64),
        ("rank", np.int64),  # lower is served first under priority routing
        ("speculation_class", np.int64),
        ("ttft_slo_ps", np.int64),
        ("tpot_slo_ps", np.int64),
    ],
    align=True,
)
"""What the scheduler knows of a tenant."""

SEGMENT = np.dtype([("owner", np.int32), ("length", np.int32)], align=True)
"""A run of free KV blocks.

The free queue goes from the least to the most recently used block in such runs: blocks freed together,
owned by nobody (-1), by a preempted request that may come back (its index), or by one cached prefix node
(-2 - node).
"""

NODE = np.dtype(
    [
        ("key", np.int64),
        ("segment", np.int64),  # where it waits in the free queue while nobody refers to it
        ("references", np.int32),
        ("free", np.int32),  # the stack of nodes that are not used: it has nothing to do with this node
    ],
    align=True,
)
"""A KV block in the prefix cache."""

PLACE = np.dtype([("key", np.int64), ("node", np.int32)], align=True)
"""A place of the prefix cache's hash table with open addressing; key -1: empty."""

TIMER = np.dtype([("time_ps", np.int64), ("request", np.int32)], align=True)
"""When a request is sent again, or its KV cache arrives."""


class Batch(NamedTuple):
    """All that the kernel works on, of n episodes with as many engines each."""

    engines: NDArray[np.void]  # ENGINE[episode, engine]
    slots: NDArray[np.void]  # SLOTS[episode * engines + engine], as are queue, nodes and table
    cells: NDArray[np.void]  # CELL[episode]
    windows: NDArray[np.void]  # WINDOW[episode]
    window_words: NDArray[np.int64]  # the same memory, [episode, word]
    sums: NDArray[np.void]  # SUMS[episode]
    sum_words: NDArray[np.int64]
    first: NDArray[np.int64]  # [episode + 1]: where the requests of each episode begin
    requests: NDArray[np.void]  # REQUEST[n], in order of arrival within an episode
    outcomes: NDArray[np.void]  # OUTCOME[n]
    tenants: NDArray[np.void]  # TENANT[tenant]
    accept: NDArray[np.int64]  # [class, depth] tokens per step, ACCEPT_ONE = 1
    queue: NDArray[np.void]  # SEGMENT[row, place], a ring
    nodes: NDArray[np.void]  # NODE[row, node]
    table: NDArray[np.void]  # PLACE[row, place]
    prefix_offsets: NDArray[np.int64]  # those of episode i begin at first[i] + i
    prefix_ids: NDArray[np.int64]
    transfers: NDArray[np.void]  # TIMER[n], as requests; none where there is one engine
    retries: NDArray[np.void]  # TIMER[n]; none where nobody comes back
    cost: Cost
    actions: NDArray[np.void]  # ACTION[episode], of the window that is served
    start_ps: NDArray[np.int64]  # [episode]: where that window starts
    until_ps: NDArray[np.int64]  # [episode]: where it ends; negative: the episode is left alone
    board: NDArray[np.int64]  # what the threads tell each other (kernel.serve)


class Service(NamedTuple):
    """What the kernel's functions are given of one episode."""

    engines: NDArray[np.void]  # ENGINE[engine]
    slots: NDArray[np.void]
    cell: NDArray[np.void]  # CELL
    window: NDArray[np.void]  # WINDOW, counted into
    sums: NDArray[np.void]  # SUMS
    requests: NDArray[np.void]
    outcomes: NDArray[np.void]
    tenants: NDArray[np.void]
    accept: NDArray[np.int64]
    queue: NDArray[np.void]
    nodes: NDArray[np.void]
    table: NDArray[np.void]
    prefix_offsets: NDArray[np.int64]
    prefix_ids: NDArray[np.int64]
    transfers: NDArray[np.void]
    retries: NDArray[np.void]
    cost: Cost


def histogram_edges_s() -> NDArray[np.float64]:
    """Lower edges of the histogram bins (s), float64[HISTOGRAM_BINS + 1].

    Eight equal bins in every octave from 2**-14 s (61 us): 7 to 12% wide; the last bin is open.
    """
    octave, part = np.divmod(np.arange(HISTOGRAM_BINS + 1), 8)
    return 2.0 ** (octave - 14.0) * (1 + part / 8)
