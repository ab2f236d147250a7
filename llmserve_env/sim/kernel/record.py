"""The WINDOW record: what is set at its beginning, and what is written into it at its end.

The mechanisms count straight into the record; sums that only its end needs are in SUMS.
"""

from __future__ import annotations

import math

import numpy as np

from llmserve_env.compiled import part
from llmserve_env.sim.kernel.lifecycle import role, settled, tier
from llmserve_env.sim.state import COLOCATED, HISTOGRAM_BINS, MAX_TOKEN_PS, NEVER_PS, PS_PER_S, WAITING


@part
def apply(s, action):
    """Set what the next window runs under; what this cell cannot do stays as it is."""
    cap = np.int64(action.batch_cap)
    if s.cell.sequences > 0:
        cap = s.cell.sequences
    cap = min(cap, s.engines[0].token_budget)
    for i in range(len(s.engines)):
        e = s.engines[i]
        e.batch_cap = cap
        e.kv_fraction = action.kv_budget_fraction
        e.block_cap = np.int64(action.kv_budget_fraction * e.blocks)
        e.depth = action.speculation_depth
        e.priority = action.priority_routing
    if s.cell.has_tier[action.quantization_tier]:
        s.cell.tier = action.quantization_tier
    if s.cell.can_split or action.prefill_decode_split == 0:
        s.cell.split = action.prefill_decode_split
    s.cell.token_ps = 0  # everybody is let in
    if action.admission_rate < np.inf:
        s.cell.token_ps = np.int64(np.rint(min(PS_PER_S / action.admission_rate, float(MAX_TOKEN_PS))))


@part
def quantile_s(histogram, total, q):
    """Quantile of a histogram of durations, linear within a bin (s); nan if it is empty."""
    if total == 0:
        return np.nan
    wanted = q * total
    below = 0
    for i in range(HISTOGRAM_BINS):
        count = histogram[i]
        if count > 0 and below + count >= wanted:
            width = math.ldexp(0.125, (i >> 3) - 14)
            low = math.ldexp(1.0 + (i & 7) / 8.0, (i >> 3) - 14)
            return low + width * (wanted - below) / count
        below += count
    return np.nan


@part
def record_gauges(s, until_ps):
    """Write what is true at the window's end."""
    w = s.window
    waiting = np.int64(s.cell.transfers)
    running = np.int64(0)
    limbo = np.int64(0)
    held = np.int64(0)
    blocks = np.int64(0)
    oldest_ps = until_ps
    memory = 0.0
    for i in range(len(s.engines)):
        e = s.engines[i]
        waiting += e.waiting
        running += e.running
        # what has ended by the window's end no longer runs, though the engine frees it at its next decision
        if e.limbo_ps <= until_ps:
            running -= e.limbo_count
        limbo += e.running - e.limbo_count
        held += e.held
        blocks += e.blocks
        memory += s.cell.weight_bytes[tier(e)] + s.cell.block_bytes * e.held
        w.engines_tier[tier(e)] += 1
        w.engines_up += settled(e)
        w.engines_split += role(e) != COLOCATED
        for tenant in range(s.cell.tenants):
            request = np.int64(e.fresh_head[tenant])
            while request >= 0 and s.outcomes[request].status != WAITING:  # in transfer
                request = np.int64(s.outcomes[request].next)
            if request >= 0:
                oldest_ps = min(oldest_ps, s.outcomes[request].sent_ps)
    w.in_flight = waiting + limbo + s.cell.retrying
    w.retrying = s.cell.retrying
    w.waiting = waiting
    w.running = running
    w.oldest_wait_s = (until_ps - oldest_ps) / PS_PER_S
    w.kv_occupancy = held / blocks
    w.gpu_memory_gb = memory / 1e9
    for tenant in range(s.cell.tenants):
        w.tenant_in_flight[tenant] = s.cell.tenant_in_flight[tenant]


@part
def record_sums(s):
    """Write what follows from the window's sums: means, percentiles, totals over precisions."""
    w = s.window
    busy_ps = max(s.sums.busy_ps, 1.0)
    w.busy_s = s.sums.busy_ps / PS_PER_S
    w.mean_running = s.sums.sequence_ps / busy_ps
    w.mean_kv_occupancy = s.sums.block_ps / busy_ps
    first_tokens = w.first_tokens
    w.mean_ttft_s = s.sums.ttft_ps / first_tokens / PS_PER_S if first_tokens > 0 else np.nan
    w.p50_ttft_s = quantile_s(s.sums.ttft_histogram, first_tokens, 0.5)
    w.p99_ttft_s = quantile_s(s.sums.ttft_histogram, first_tokens, 0.99)
    steps = np.int64(0)
    for i in range(HISTOGRAM_BINS):
        steps += s.sums.gap_histogram[i]
    w.p50_gap_s = quantile_s(s.sums.gap_histogram, steps, 0.5)
    w.p99_gap_s = quantile_s(s.sums.gap_histogram, steps, 0.99)
    for tenant in range(s.cell.tenants):
        w.tenant_ttft_s[tenant] = s.sums.tenant_ttft_ps[tenant] / PS_PER_S
        for i in range(w.tier_in_slo.shape[0]):
            w.tenant_in_slo[tenant] += w.tier_in_slo[i, tenant]


@part
def record(s, start_ps, until_ps):
    """End the WINDOW record of what was served from `start_ps` to `until_ps`."""
    s.window.start_s = start_ps / PS_PER_S
    s.window.end_s = until_ps / PS_PER_S if until_ps < NEVER_PS else np.inf
    record_gauges(s, until_ps)
    record_sums(s)
