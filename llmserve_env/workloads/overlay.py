"""Stretches of one trace played at once: another load at its own pace, and other traffic for every seed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from llmserve_env.errors import InputError
from llmserve_env.workloads.generators.generate import MAX_REQUESTS
from llmserve_env.workloads.workload import Workload, taken_blocks

MAX_STRETCHES = 100_000
"""More would take seconds for each episode."""

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
        InputError: the trace is shorter than that, or the stretches hold too many requests.
    """
    n = len(trace)
    period_s = trace.duration_s * n / max(n - 1, 1)  # a mean gap after the last request
    if duration_s > period_s:
        raise InputError(
            f"expected a trace of {duration_s:g} s or more, found {period_s:.0f} s", field="overlay"
        )
    expected = stretches * n * duration_s / period_s if period_s > 0 else stretches * n
    if expected > MAX_REQUESTS:
        raise InputError(
            f"some {expected:.3g} requests; at most {MAX_REQUESTS:,} are played", field="overlay"
        )
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_STREAM,)))
    parts = [
        _stretch(trace.arrival_s, float(start_s), duration_s, period_s)
        for start_s in rng.uniform(0.0, period_s, stretches)
    ]
    index, arrival_s = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    stretch = np.repeat(np.arange(stretches), [len(part) for part, _ in parts])
    order = np.argsort(arrival_s, kind="stable")
    stretch, index, arrival_s = stretch[order], index[order], arrival_s[order]
    offsets, ids = trace.prefix_offsets, trace.prefix_ids
    if trace.prefix_block_tokens:
        ids = np.unique(ids, return_inverse=True)[1].astype(np.int64)
        offsets, ids = taken_blocks(offsets, ids, index)
        ids = ids * stretches + np.repeat(stretch, np.diff(offsets))
    return replace(
        trace,
        arrival_s=arrival_s,
        prompt_tokens=trace.prompt_tokens[index],
        output_tokens=trace.output_tokens[index],
        tenant=trace.tenant[index],
        prefix_offsets=offsets,
        prefix_ids=ids,
        request_ids=(),
    )


def _stretch(
    arrival_s: NDArray[np.float64], start_s: float, duration_s: float, period_s: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Which requests arrive in a stretch, in the trace's order, and when (s since its start)."""
    end_s, slack_s = start_s + duration_s, 1e-6 * period_s  # what the bounds round away, the times decide
    wrapped, low, high = np.searchsorted(
        arrival_s, (end_s - period_s + slack_s, start_s - slack_s, end_s + slack_s)
    )
    near = np.concatenate((np.arange(wrapped), np.arange(max(low, wrapped), high)))
    since_s = (arrival_s[near] - start_s) % period_s
    inside = since_s < duration_s
    return near[inside], since_s[inside]
