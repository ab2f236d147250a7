"""Stretches of one trace played at once: another load at its own pace, and other traffic for every seed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llmserve_env.errors import InputError
from llmserve_env.workloads.workload import Workload, taken_blocks

_STREAM = 2**31 + 3  # spawn key, apart from those of generators, mixes of tenants and scenarios


def overlaid(trace: Workload, stretches: int, *, seed: int, duration_s: float) -> Workload:
    """So many stretches of a trace at once, as if as many services like the recorded one were behind one.

    Each begins at a place of its own that the seed draws, and goes on from the trace's beginning after its
    end. Stretches share no prefix blocks with each other.

    Args:
        trace: is recorded; the requests' own names are dropped.
        stretches: how many.
        seed: seed of the places.
        duration_s: length of a stretch (s).

    Raises:
        InputError: the trace is shorter than that.
    """
    n = len(trace)
    period_s = trace.duration_s * n / max(n - 1, 1)  # a mean gap after the last request
    if duration_s > period_s:
        raise InputError(
            f"expected a trace of {duration_s:g} s or more, found {period_s:.0f} s", field="overlay"
        )
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_STREAM,)))
    starts_s = rng.uniform(0.0, period_s, stretches)
    arrival_s = (trace.arrival_s - starts_s[:, None]) % period_s
    stretch, index = np.nonzero(arrival_s < duration_s)
    order = np.argsort(arrival_s[stretch, index], kind="stable")
    stretch, index = stretch[order], index[order]
    offsets, ids = trace.prefix_offsets, trace.prefix_ids
    if trace.prefix_block_tokens:
        ids = np.unique(ids, return_inverse=True)[1].astype(np.int64)
        offsets, ids = taken_blocks(offsets, ids, index)
        ids = ids * stretches + np.repeat(stretch, np.diff(offsets))
    return replace(
        trace,
        arrival_s=arrival_s[stretch, index],
        prompt_tokens=trace.prompt_tokens[index],
        output_tokens=trace.output_tokens[index],
        tenant=trace.tenant[index],
        prefix_offsets=offsets,
        prefix_ids=ids,
        request_ids=(),
    )
