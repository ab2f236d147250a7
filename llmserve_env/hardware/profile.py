"""Profiles: one GPU (or several, by tensor parallelism) with one model, every number with its source.

A profile is a TOML file. `docs/hardware.md` explains the timing model that its `[latency]` figures belong to.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from llmserve_env.errors import InputError, as_input_error
from llmserve_env.files import read_text, write_atomic
from llmserve_env.schema import QuantizationTier

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TIERS: tuple[str, ...] = tuple(tier.value for tier in QuantizationTier)
"""Precision tiers in the order of the first axis of every latency array."""

if TYPE_CHECKING:
    TierName = str
else:
    TierName = Literal[TIERS]

_SHIPPED = Path(__file__).parent / "profiles"


def _ascending(knots: tuple[int, ...]) -> tuple[int, ...]:
    if any(a >= b for a, b in pairwise(knots)):
        raise ValueError("expected strictly ascending numbers")
    return knots


Source = Annotated[str, Field(min_length=1)]
Counts = Annotated[tuple[PositiveInt, ...], Field(min_length=2), AfterValidator(_ascending)]
Contexts = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=2), AfterValidator(_ascending)]
Times = tuple[NonNegativeFloat, ...]


class Record(BaseModel):
    """Base of a profile's tables: immutable, hashable, no unknown keys, no infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Gpu(Record):
    """The GPUs of one engine.

    Attributes:
        name: as the driver reports it.
        count: GPUs that share the model by tensor parallelism.
        memory_bytes: memory of one GPU, as the driver reports it to a process.
        source: where the memory size comes from.
    """

    name: str
    count: PositiveInt = 1
    memory_bytes: PositiveInt
    source: Source


class Model(Record):
    """The model that the engine serves.

    Attributes:
        name: its public name.
        layers: decoder layers.
        hidden_size: width of the residual stream.
        attention_heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        intermediate_size: width of the MLP.
        vocab_size: tokens in the vocabulary.
        tied_embeddings: whether the LM head is the embedding.
        weight_bytes: all GPUs together, bf16.
        kv_bytes_per_token: bytes of the KV cache, all layers and GPUs together.
        max_model_len: longest context, prompt and answer together (tokens); None: not known, no limit.
        source: where the figures come from.
    """

    name: str
    layers: PositiveInt
    hidden_size: PositiveInt
    attention_heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    intermediate_size: PositiveInt
    vocab_size: PositiveInt
    tied_embeddings: bool
    weight_bytes: PositiveInt
    kv_bytes_per_token: PositiveInt
    max_model_len: PositiveInt | None = None
    source: Source


class Engine(Record):
    """Settings of the engine, under vLLM's names, and the memory that it keeps from the KV cache.

    Attributes:
        block_tokens: tokens in one KV block.
        max_num_seqs: default limit of running sequences.
        max_num_batched_tokens: default token budget of an iteration.
        gpu_memory_utilization: share of the GPU's memory that the engine may use.
        reserved_bytes_per_gpu: part of that share that is neither weights nor KV cache (activations,
            workspace, graphs).
        kv_blocks: blocks of the bf16 engine as a real one reported them (`num_gpu_blocks`); None: computed.
        async_scheduling: whether it decides a batch while the one before runs, as vLLM does on GPUs.
        source: where these come from.
    """

    block_tokens: PositiveInt = 16
    max_num_seqs: PositiveInt
    max_num_batched_tokens: PositiveInt
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    reserved_bytes_per_gpu: Annotated[int, Field(ge=0)]
    kv_blocks: PositiveInt | None = None
    async_scheduling: bool = True
    source: Source


class RegimeError(Record):
    """How far a fit is from the measurements that it was made from.

    Attributes:
        median_percent: median absolute error, weighted by time (%).
        p90_percent: its 90th percentile (%).
    """

    median_percent: NonNegativeFloat
    p90_percent: NonNegativeFloat


class FitError(Record):
    """Error by regime; None where the regime was not fitted to measurements."""

    dense: RegimeError | None = None
    head: RegimeError | None = None
    decode: RegimeError | None = None
    prefill: RegimeError | None = None
    mixed: RegimeError | None = None


class Latency(Record):
    """Knots of the timing model: times in microseconds for the whole model on one rank, bf16.

    Attributes:
        source: where the times come from.
        dense_tokens: int[A], tokens in an iteration.
        dense_us: [A], all token-wise layers, without all-reduce and host overhead.
        head_sequences: int[B], sequences that emit a token.
        head_us: [B], LM head and sampler.
        decode_sequences: int[N], sequences of a pure decode batch.
        decode_kv_tokens: int[K], their mean context.
        decode_us: [N][K], attention of all layers.
        prefill_chunk_tokens: int[C], tokens of a prefill chunk.
        prefill_kv_tokens: int[J], tokens before it that are already in the cache.
        prefill_us: [C][J], attention of all layers.
        mixed_chunk_tokens: int[Cm], all prefill tokens of a mixed batch.
        mixed_sequences: int[Nm], its decoding sequences.
        mixed_kv_tokens: int[Km], their effective context.
        mixed_us: [Cm][Nm][Km], what they add to the attention of the prefill alone, all layers.
        mixed_skew: sequences' worth by which the longest context of a mixed batch raises the effective one.
        fit_error: error of the fit by regime.
    """

    source: Source
    dense_tokens: Counts
    dense_us: Times
    head_sequences: Counts
    head_us: Times
    decode_sequences: Counts
    decode_kv_tokens: Contexts
    decode_us: tuple[Times, ...]
    prefill_chunk_tokens: Counts
    prefill_kv_tokens: Contexts
    prefill_us: tuple[Times, ...]
    mixed_chunk_tokens: Counts
    mixed_sequences: Counts
    mixed_kv_tokens: Contexts
    mixed_us: tuple[tuple[Times, ...], ...]
    mixed_skew: NonNegativeFloat
    fit_error: FitError = FitError()

    @model_validator(mode="after")
    def _shapes(self) -> Latency:
        for times, axes in LATENCY_AXES.items():
            _check_shape(getattr(self, times), [(axis, len(getattr(self, axis))) for axis in axes], times)
        return self


LATENCY_AXES = {
    "dense_us": ("dense_tokens",),
    "head_us": ("head_sequences",),
    "decode_us": ("decode_sequences", "decode_kv_tokens"),
    "prefill_us": ("prefill_chunk_tokens", "prefill_kv_tokens"),
    "mixed_us": ("mixed_chunk_tokens", "mixed_sequences", "mixed_kv_tokens"),
}
"""The knots along each axis of each table of times."""


def _check_shape(values: Sequence[Any], axes: list[tuple[str, int]], name: str) -> None:
    (axis, expected), *rest = axes
    if len(values) != expected:
        raise ValueError(f"{name} has {len(values)} entries along {axis}, which has {expected}")
    if rest:
        for index, row in enumerate(values):
            _check_shape(row, rest, f"{name}[{index}]")


class Link(Record):
    """What joins the GPUs of a tensor-parallel engine.

    Attributes:
        latency_us: latency of one all-reduce of nothing (us).
        bandwidth_gb_per_s: bandwidth of each GPU in one direction (GB/s).
        source: where these come from.
    """

    latency_us: NonNegativeFloat
    bandwidth_gb_per_s: PositiveFloat
    source: Source


class Tier(Record):
    """A weight precision.

    Attributes:
        weight_bytes: bytes of the weights, all GPUs together.
        quality: score on benchmarks relative to bf16.
        dense_tokens: int[F], tokens in an iteration.
        dense_factor: [F], what dense times are multiplied by there.
        head_factor: what LM head times are multiplied by.
        source: where these come from.
    """

    weight_bytes: PositiveInt
    quality: Annotated[float, Field(gt=0, le=1)] = 1.0
    dense_tokens: Annotated[tuple[PositiveInt, ...], Field(min_length=1), AfterValidator(_ascending)] = (1,)
    dense_factor: tuple[PositiveFloat, ...] = (1.0,)
    head_factor: PositiveFloat = 1.0
    source: Source

    @model_validator(mode="after")
    def _shapes(self) -> Tier:
        _check_shape(self.dense_factor, [("dense_tokens", len(self.dense_tokens))], "dense_factor")
        return self


class Tiers(Record):
    """The weight precisions that the profile has figures for; FP16 stands for bf16."""

    FP16: Tier
    INT8: Tier | None = None
    INT4: Tier | None = None


class Server(Record):
    """What a real server takes beside its iterations; of a profile that was calibrated on one.

    Attributes:
        request_us: time of a request outside the engine: HTTP, both ways. The simulator, which serves at the
            engine's door, leaves it out; `llmserve compare` adds it to TTFT and end-to-end latency.
        step_us: between two iterations: scheduling, outputs. Contained in `dense_us`.
        sequence_us: what each sequence adds to that. Contained in `head_us`.
        source: where these come from.
    """

    request_us: NonNegativeFloat
    step_us: NonNegativeFloat
    sequence_us: NonNegativeFloat
    source: Source


class Profile(Record):
    """All that the simulator knows about hardware and model.

    Attributes:
        name: name of the profile, such as "rtx4090-llama-3.1-8b".
        notes: assumptions that a reader should know of.
        gpu: the GPUs.
        model: the model.
        engine: the engine's settings.
        link: between the GPUs; None for one GPU.
        tiers: weight precisions.
        latency: the timing model's knots.
        server: what a real server takes beside its iterations; None where no server was measured.
    """

    name: Annotated[str, Field(min_length=1)]
    notes: tuple[str, ...] = ()
    gpu: Gpu
    model: Model
    engine: Engine
    link: Link | None = None
    tiers: Tiers
    latency: Latency
    server: Server | None = None

    @model_validator(mode="after")
    def _linked(self) -> Profile:
        if self.gpu.count > 1 and self.link is None:
            raise ValueError(f"gpu.count is {self.gpu.count}: a [link] table is needed")
        return self

    def tier(self, name: TierName) -> Tier | None:
        """Figures of a precision; None where the profile lacks it."""
        tier: Tier | None = getattr(self.tiers, name)
        return tier

    @property
    def tier_names(self) -> tuple[TierName, ...]:
        """The precisions that it has."""
        return tuple(name for name in TIERS if self.tier(name) is not None)


def list_profiles() -> list[str]:
    """Names of the shipped profiles, sorted."""
    return sorted(path.stem for path in _SHIPPED.glob("*.toml"))


def load_profile(profile: str | Path) -> Profile:
    """Read a profile.

    Args:
        profile: name of a shipped one, or the path of a TOML file (ends in .toml).

    Raises:
        InputError: there is none of that name, or the file cannot be used; names the file and the field.
    """
    path = Path(profile)
    if path.suffix != ".toml":
        if str(profile) not in list_profiles():
            raise InputError(
                f"unknown profile '{profile}': expected one of {', '.join(list_profiles())}, "
                "or the path of a .toml file",
                field="profile",
            )
        path = _SHIPPED / f"{profile}.toml"
    return parse_profile(read_text(path), file=str(path))


def parse_profile(text: str, file: str) -> Profile:
    """Make a profile from TOML text; `file` is what an InputError names."""
    try:
        return Profile.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"at line (\d+)", str(error))
        raise InputError(f"is not TOML: {error}", file=file, line=int(at[1]) if at else None) from error
    except ValidationError as error:
        raise as_input_error(error, file) from error


def save_profile(profile: Profile, path: Path | str) -> None:
    """Write a profile as TOML, atomically."""
    write_atomic(path, profile_toml(profile))


def profile_toml(profile: Profile) -> str:
    """The profile as TOML: `parse_profile` of it is the same profile."""
    lines = [
        "# Times in microseconds, contexts in tokens; docs/hardware.md explains the timing model.",
        *_table((), profile.model_dump(exclude_none=True)),
    ]
    return "\n".join(lines) + "\n"


def _table(path: tuple[str, ...], values: dict[str, Any]) -> Iterable[str]:
    own = {key: value for key, value in values.items() if not isinstance(value, dict)}
    if own:
        if path:
            yield f"\n[{'.'.join(path)}]"
        yield from (f"{key} = {_toml(value)}" for key, value in own.items())
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _table((*path, key), value)


def _toml(value: Any, indent: str = "") -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    if isinstance(value, float):
        short = f"{value:.6g}"
        return short if float(short) == value else repr(value)
    if isinstance(value, int):
        return str(value)
    items = [_toml(item, indent + "  ") for item in value]
    line = f"[{', '.join(items)}]"
    if not value or not isinstance(value[0], (tuple, str)):
        return line if len(line) <= 110 else _wrapped(items, indent)
    return "[\n" + "".join(f"{indent}  {item},\n" for item in items) + f"{indent}]"


def _wrapped(items: list[str], indent: str) -> str:
    rows = [items[start : start + 12] for start in range(0, len(items), 12)]
    return "[\n" + "".join(f"{indent}  {', '.join(row)},\n" for row in rows) + f"{indent}]"
