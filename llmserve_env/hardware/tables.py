"""Measured kernel times: a folder of CSV tables as LLMServingSim's profiler writes it.

    dense.csv         token-wise layers      layer, tokens, time_us
    per_sequence.csv  LM head and sampler    layer, sequences, time_us
    attention.csv     batches of attention   prefill_chunk, kv_prefill, n_decode, kv_decode, time_us
    skew.csv          unequal contexts       regime, n, pc, kvs, t_mean_us, t_max_us, t_skew_us
    meta.yaml         where and how          gpu, model, vllm_version, profiler_version, profiled_at

The last two are optional; meta.yaml may lie a folder up, where it serves several tp degrees. Times are of one
layer on one rank; further columns are ignored.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmserve_env.errors import InputError
from llmserve_env.files import TABLE_BYTES, read_text

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Skew:
    """Attention of mixed batches with unequal decode contexts.

    Attributes:
        sequences: [m] decoding sequences.
        prefill_tokens: [m] tokens of the prefill chunk.
        shortest: [m] the shortest context (tokens).
        mean_us: [m] time if all contexts were the mean.
        longest_us: [m] time if all were the longest.
        time_us: [m] time of the batch as it is. All three on one scale, whichever.
    """

    sequences: Array
    prefill_tokens: Array
    shortest: Array
    mean_us: Array
    longest_us: Array
    time_us: Array


@dataclass(frozen=True)
class KernelTables:
    """A folder's tables.

    Attributes:
        folder: where they lie.
        layers: layers by name: [a] times of one occurrence at `tokens` (us).
        tokens: [a] tokens, ascending.
        heads: heads by name: [b] times at `sequences` (us).
        sequences: [b] sequences, ascending.
        attention: [m, 4] prefill tokens, tokens in the cache before them, decoding sequences, their context.
        attention_us: [m] times.
        skew: None where not measured.
        meta: what meta.yaml says at its top level.
    """

    folder: Path
    layers: dict[str, Array]
    tokens: Array
    heads: dict[str, Array]
    sequences: Array
    attention: Array
    attention_us: Array
    skew: Skew | None
    meta: dict[str, str]

    @property
    def origin(self) -> str:
        """One line on where the times come from."""
        told = [
            f"{label} {self.meta[key]}"
            for key, label in (
                ("model", "of"),
                ("gpu", "on"),
                ("profiler_version", "profiler"),
                ("vllm_version", "vLLM"),
            )
            if key in self.meta
        ]
        day = [f"measured {self.meta['profiled_at'][:10]}"] if "profiled_at" in self.meta else []
        return ", ".join([f"kernel times {self.folder.resolve().name}", *told, *day])


def read_tables(folder: Path | str) -> KernelTables:
    """Read a folder of kernel times.

    Raises:
        InputError: a table is missing or cannot be used; names file, line and column.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            "expected a folder with dense.csv, attention.csv and per_sequence.csv", file=str(folder)
        )
    tokens, layers = _by_name(folder / "dense.csv", "tokens")
    sequences, heads = _by_name(folder / "per_sequence.csv", "sequences")
    axes = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
    _, numbers = _columns(folder / "attention.csv", (), (*axes, "time_us"))
    return KernelTables(
        folder=folder,
        layers=layers,
        tokens=tokens,
        heads=heads,
        sequences=sequences,
        attention=np.stack([numbers[axis] for axis in axes], axis=1),
        attention_us=numbers["time_us"],
        skew=_skew(folder / "skew.csv"),
        meta=_meta(folder / "meta.yaml") or _meta(folder.parent / "meta.yaml"),
    )


def _skew(path: Path) -> Skew | None:
    if not path.exists():
        return None
    texts, numbers = _columns(path, ("regime",), ("n", "pc", "kvs", "t_mean_us", "t_max_us", "t_skew_us"))
    mixed = np.array(texts["regime"]) == "mixed"
    return Skew(*(values[mixed] for values in numbers.values()))


def _by_name(path: Path, axis: str) -> tuple[Array, dict[str, Array]]:
    """Places that every layer was measured at, and each layer's times there (of several, the mean)."""
    texts, numbers = _columns(path, ("layer",), (axis, "time_us"))
    measured: dict[str, dict[float, list[float]]] = {}
    for layer, place, time in zip(texts["layer"], numbers[axis], numbers["time_us"], strict=True):
        measured.setdefault(layer, {}).setdefault(float(place), []).append(float(time))
    places = sorted(set.intersection(*(set(times) for times in measured.values())))
    if len(places) < 2:
        raise InputError(
            f"its {len(measured)} layers have {len(places)} values in common, expected 2 or more",
            file=str(path),
            field=axis,
        )
    times = {name: np.array([np.mean(found[place]) for place in places]) for name, found in measured.items()}
    return np.array(places), times


def _columns(
    path: Path, texts: tuple[str, ...], numbers: tuple[str, ...]
) -> tuple[dict[str, list[str]], dict[str, Array]]:
    """The named columns of a CSV file with a header; numbers are finite and >= 0."""
    file = str(path)
    found: dict[str, list[str]] = {name: [] for name in texts}
    values: dict[str, list[float]] = {name: [] for name in numbers}
    reader = csv.DictReader(io.StringIO(read_text(path, TABLE_BYTES), newline=""))
    try:
        header = reader.fieldnames or []
        for name in (*texts, *numbers):
            if name not in header:
                shown = f"{','.join(header)!r:.999}"
                raise InputError(f"no such column; the header is {shown}", file=file, field=name)
        for row in reader:
            for name in texts:
                found[name].append(row[name] or "")
            for name in numbers:
                values[name].append(_number(row[name], file, reader.line_num, name))
    except csv.Error as error:
        raise InputError(f"cannot be read: {error}", file=file) from error
    if not next(iter(values.values())):
        raise InputError("has no rows", file=file)
    return found, {name: np.array(column) for name, column in values.items()}


def _number(text: str | None, file: str, line: int, field: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise InputError(f"expected a number >= 0, found {text!r}", file=file, line=line, field=field)
    return value


def _meta(path: Path) -> dict[str, str]:
    """The `key: value` lines at the top level of a YAML file; nothing where there is none."""
    if not path.exists():
        return {}
    lines = read_text(path).splitlines()
    pairs = (line.split(":", 1) for line in lines if ":" in line and not line.startswith((" ", "#", "-")))
    return {key.strip(): value.strip().strip("'\"") for key, value in pairs}
