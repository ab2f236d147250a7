"""Fixed scenarios whose outcomes tests/golden records: a change in dynamics shows in its diff."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np

from llmserve_env.hardware import load_profile
from llmserve_env.schema import ServeAction
from llmserve_env.sim.simulator import SimulatorBatch
from llmserve_env.workloads import open_workload

from .cells import COUNTS, small

FOLDER = Path(__file__).resolve().parents[1] / "golden"


def _split():
    return ServeAction(prefill_decode_split=True)


# name: (profile, blocks of a smaller memory or None, workload, cell, actions and windows in s)
SCENARIOS = {
    "colocated": (
        "h100-llama-3.1-8b",
        None,
        "gamma://?rate=12&duration=120&seed=1",
        {},
        [(ServeAction(), 10.0)] * 12,
    ),
    "memory-pressure": (
        "rtx4090-llama-3.1-8b",
        600,
        "poisson://?rate=4&duration=120&seed=2&tenants=premium-standard",
        {},
        [(ServeAction(), 20.0), (ServeAction(kv_budget_fraction=0.5, priority_routing=True), 40.0),
         (ServeAction(batch_cap=8), 30.0)],
    ),
    "sessions": (
        "rtx4090-llama-3.1-8b",
        None,
        "sessions://?rate=6&duration=120&think=8&seed=3",
        {"engines": 2},
        [(ServeAction(), 60.0), (ServeAction(kv_budget_fraction=0.4), 60.0)],
    ),
    "split": (
        "h200-llama-3.1-8b",
        None,
        "poisson://?rate=20&duration=60&seed=4",
        {"engines": 3, "prefill_engines": 1, "action": _split()},
        [(_split(), 30.0), (ServeAction(), 240.0)],
    ),
    "speculation": (
        "a100-llama-3.1-8b",
        None,
        "gamma://?rate=8&duration=60&seed=5&tenants=distserve-mix",
        {"engines": 2},
        [(ServeAction(speculation_depth=depth), 12.0) for depth in (0, 1, 3, 8, 5)],
    ),
    "precision": (
        "h100x4-llama-3.1-70b",
        None,
        "poisson://?rate=3&duration=400&seed=6",
        {"engines": 2},
        [(ServeAction(quantization_tier=tier), 130.0) for tier in ("FP16", "INT8", "INT4")],
    ),
}  # fmt: skip


def play(name):
    """Serve a scenario to its end: a digest of every outcome, and figures that a reader can judge."""
    profile, blocks, uri, cell, windows = SCENARIOS[name]
    profile = load_profile(profile)
    if blocks:
        profile = small(blocks, profile)
    batch = SimulatorBatch(profile, [open_workload(uri)], **cell)
    totals = dict.fromkeys(COUNTS, 0)
    for action, window_s in [*windows, (windows[-1][0], math.inf)]:
        record = batch.serve_each([action], window_s)[0]
        for count in COUNTS:
            totals[count] += getattr(record, count)
    digest = hashlib.sha256()
    for field in ("first_ps", "finish_ps", "preemptions", "status"):
        digest.update(np.ascontiguousarray(batch.outcomes[field]).tobytes())
    outcomes = batch.outcomes_of(0)
    figures = {
        f"{measure}_s_{label}": round(float(np.nanpercentile(getattr(outcomes, f"{measure}_s"), q)), 6)
        for measure in ("ttft", "tpot", "e2e")
        for label, q in (("p50", 50), ("p99", 99))
    }
    return {"workload": uri, "outcomes_sha256": digest.hexdigest(), **totals, **figures}
