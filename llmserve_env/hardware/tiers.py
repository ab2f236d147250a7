"""INT8 and INT4 weights of any profile, from the factors in `data/tiers.toml`."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from llmserve_env.hardware.constants import constants
from llmserve_env.hardware.profile import Model, Record, Source, Tier, TierName, Tiers

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FILE = Path(__file__).parent / "data" / "tiers.toml"


class Factors(Record):
    """A weight precision on some GPUs.

    Attributes:
        name: the tier.
        format: what weights and activations are stored as.
        gpus: as the driver names them.
        bits: bits of a decoder weight, scales included.
        dense_tokens: int[F], tokens in an iteration.
        dense_factor: [F], what dense times are multiplied by there.
        assumption: whether the factors are another GPU's.
        source: where they come from.
    """

    name: TierName
    format: str
    gpus: tuple[str, ...]
    bits: Annotated[float, Field(gt=0, lt=16)]
    dense_tokens: tuple[PositiveInt, ...]
    dense_factor: tuple[PositiveFloat, ...]
    assumption: bool = False
    source: Source


@cache
def tier_factors() -> tuple[Factors, ...]:
    """The shipped factors. Cached."""
    tables = tomllib.loads(_FILE.read_text(encoding="utf-8"))["tier"]
    return tuple(Factors.model_validate(table) for table in tables)


def tiers_for(gpu: str, model: Model, bf16_source: str) -> Tiers:
    """The precisions of a model on a GPU: bf16, and those that factors are known for.

    Args:
        gpu: as the driver names it.
        model: whose decoder matrices are stored in fewer bits; embedding and LM head stay as they are.
        bf16_source: where the profile's bf16 times come from.
    """
    quality = constants().quality
    linear = linear_parameters(model)
    tiers = {"FP16": Tier(weight_bytes=model.weight_bytes, quality=quality["FP16"].score, source=bf16_source)}
    for factors in tier_factors():
        if gpu in factors.gpus:
            score = quality[factors.name]
            assumed = "assumption: " if factors.assumption else ""
            tiers[factors.name] = Tier(
                weight_bytes=model.weight_bytes - round(linear * (2 - factors.bits / 8)),
                quality=score.score,
                dense_tokens=factors.dense_tokens,
                dense_factor=factors.dense_factor,
                source=f"{factors.format}; {assumed}{factors.source}; quality: {score.source}",
            )
    return Tiers(**tiers)


def linear_parameters(model: Model) -> int:
    """Parameters of the decoder's matrices."""
    queries, keys = model.attention_heads * model.head_dim, model.kv_heads * model.head_dim
    attention = 2 * model.hidden_size * (queries + keys)
    return model.layers * (attention + 3 * model.hidden_size * model.intermediate_size)
