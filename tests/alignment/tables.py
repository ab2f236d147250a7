"""The twin's own tables: what a profile and its tenants say, put into picoseconds one number at a time.

They have the shapes of the kernel's (`sim.state.Cost`, TENANT) and are made without it.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np

from llmserve_env.hardware.constants import constants
from llmserve_env.hardware.latency import compile_latency
from llmserve_env.hardware.memory import kv_blocks
from llmserve_env.sim.state import ACCEPT_ONE, NEVER_PS, PS_PER_S

PRECISIONS = ("FP16", "INT8", "INT4")


def whole_ps(seconds):
    return NEVER_PS if math.isinf(seconds) else round(seconds * PS_PER_S)


class Tables:
    """Latency of a profile; arrays of seconds are turned into picoseconds where they are asked for."""

    def __init__(self, profile):
        self.s = compile_latency(profile)
        self.decode_kv = [int(knot) for knot in self.s.decode_kv]
        self.prefill_chunk, self.prefill_kv = self.s.prefill_chunk.tolist(), self.s.prefill_kv.tolist()
        self.mixed_chunk, self.mixed_kv = self.s.mixed_chunk.tolist(), self.s.mixed_kv.tolist()
        self.mixed_skew = float(self.s.mixed_skew)
        self.blocks = [
            kv_blocks(profile, name if name in profile.tier_names else "FP16") for name in PRECISIONS
        ]

    def dense_ps(self, tier, tokens):
        return whole_ps(float(self.s.dense_s[tier, tokens]))

    def head_ps(self, tier, sequences):
        return whole_ps(float(self.s.head_s[tier, sequences]))

    def decode_ps(self, tier, sequences, knot):
        """More context never takes less time, whatever was measured."""
        return max(whole_ps(float(s)) for s in self.s.decode_s[tier, sequences, : knot + 1])

    def decode_slope(self, tier, sequences, knot):
        """Picoseconds for a token of mean context, from one knot to the next; past the last as before it."""
        knot = min(knot, len(self.decode_kv) - 2)
        grown = self.decode_ps(tier, sequences, knot + 1) - self.decode_ps(tier, sequences, knot)
        return round(grown / (self.decode_kv[knot + 1] - self.decode_kv[knot]))

    def prefill_ps(self, tier, chunk, kv):
        return float(self.s.prefill_s[tier, chunk, kv]) * PS_PER_S

    def mixed_ps(self, tier, chunk, sequences, kv):
        return float(self.s.mixed_s[tier, chunk, sequences, kv]) * PS_PER_S


def plain_tenants(tenants):
    """What the scheduler must know of each tenant, lists by tenant; `accept` by class and depth."""
    classes = sorted({tenant.speculation_class for tenant in tenants})
    urgencies = sorted({tenant.priority for tenant in tenants})
    known = constants().speculation
    return SimpleNamespace(
        patience_ps=[whole_ps(min(tenant.patience_s, tenant.deadline_s)) for tenant in tenants],
        deadline_ps=[whole_ps(tenant.deadline_s) for tenant in tenants],
        retries=[tenant.retries for tenant in tenants],
        retry_after_ps=[whole_ps(tenant.retry_after_s) for tenant in tenants],
        rank=[urgencies.index(tenant.priority) for tenant in tenants],
        ranks=len(urgencies),
        speculation_class=[classes.index(tenant.speculation_class) for tenant in tenants],
        accept=np.array(
            [[round(tokens * ACCEPT_ONE) for tokens in known[name].tokens_per_step] for name in classes]
        ),
    )
