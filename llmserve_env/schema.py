"""The contract: what an agent may set, in every world (simulated, served over HTTP, live)."""

from __future__ import annotations

from enum import Enum

from pydantic import BaseModel, ConfigDict, Field


class QuantizationTier(str, Enum):
    """Precision of the weights: 16 bits, 8 bits, 4 bits weight-only."""

    FP16 = "FP16"
    INT8 = "INT8"
    INT4 = "INT4"


class ServeAction(BaseModel):
    """Configuration of the service for the next window.

    Attributes:
        batch_cap: running sequences per engine; lowering it drains, it never preempts.
        kv_budget_fraction: share of an engine's KV blocks that running requests may hold; the rest keeps the
            prefix cache. Lowering it stops admissions and then preempts.
        speculation_depth: draft tokens per step, 0 for none.
        quantization_tier: precision of the weights. A change drains an engine and loads other weights.
        prefill_decode_split: prefill and decode in pools of their own. A change drains and restarts engines.
        priority_routing: requests of more urgent tenants are admitted first and preempted last.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_cap: int = Field(256, ge=1, le=512)
    kv_budget_fraction: float = Field(1.0, ge=0.1, le=1.0)
    speculation_depth: int = Field(0, ge=0, le=8)
    quantization_tier: QuantizationTier = QuantizationTier.FP16
    prefill_decode_split: bool = False
    priority_routing: bool = False
