"""A generator's requests for a duration or a number."""

from __future__ import annotations

import numpy as np

from llmserve_env.errors import InputError
from llmserve_env.workloads.generators.generator import Generator
from llmserve_env.workloads.lengths import LengthLaw
from llmserve_env.workloads.workload import Workload

MAX_REQUESTS = 100_000_000
"""A larger workload would not fit into memory."""


def generate(
    generator: Generator,
    lengths: LengthLaw,
    *,
    seed: int = 0,
    duration_s: float | None = None,
    requests: int | None = None,
    silent: bool = False,
) -> Workload:
    """Draw a workload.

    Args:
        generator: when requests arrive, and in sessions what they share.
        lengths: their lengths.
        seed: the same one gives the same requests, bit for bit.
        duration_s: time to cover (s); None: the generator's own default.
        requests: stop after this many; without `duration_s` cover as long as they take.
        silent: whether a time in which nothing arrives, or less than was asked for, is a workload, rather
            than refused.

    Raises:
        InputError: nothing arrives in that time, or too much, or the generator ends before so many requests.
    """
    if requests is None or duration_s is not None:
        duration_s = min(generator.DURATION_S, generator.longest_s) if duration_s is None else duration_s
        expected = generator.mean_rate_rps * duration_s
        if expected > MAX_REQUESTS:
            raise InputError(
                f"some {expected:.3g} requests; at most {MAX_REQUESTS:,} are drawn", field="duration"
            )
        workload = generator.sample(seed, duration_s, lengths)
    else:
        rate_rps = generator.mean_rate_rps
        duration_s = min((1.2 * requests + 20) / rate_rps if rate_rps else np.inf, generator.longest_s)
        workload = generator.sample(seed, duration_s, lengths)
        while len(workload) < requests:
            if duration_s >= generator.longest_s:
                if silent:
                    break
                raise InputError(
                    f"expected at most {len(workload)}, which is all there are", field="requests"
                )
            duration_s = min(2 * duration_s, generator.longest_s)
            workload = generator.sample(seed, duration_s, lengths)
    if len(workload) == 0 and not silent:
        raise InputError(f"no request arrives in {duration_s:g} s", field="duration")
    return workload if requests is None else workload.take(np.arange(min(requests, len(workload))))
