"""`llmserve profiles`: the hardware and model profiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from llmserve_env.commands.shared.report import check_outputs
from llmserve_env.files import write_atomic
from llmserve_env.hardware import list_profiles, load_profile

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llmserve_env.hardware import Profile

_BATCHES = (1, 32, 128)
_CONTEXT = 1024
_PROMPT = 2048


def profiles(
    name: Annotated[str | None, tyro.conf.Positional] = None,
    *,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """List the shipped profiles, or show one with its sources.

    Decode times are of one iteration at a context of 1,024 tokens, the prefill time of one of 2,048 tokens,
    both with bf16 weights.

    Args:
        name: a shipped profile or the path of a .toml file; all shipped ones when left out.
        json_file: file for the figures, as JSON.
    """
    check_outputs({"json": json_file}, profile=name)
    chosen = [load_profile(each) for each in (list_profiles() if name is None else [name])]
    figures = [_figures(profile) for profile in chosen]
    if json_file is not None:
        write_atomic(json_file, json.dumps(figures, indent=2) + "\n")
    if name is None:
        _print_table(figures)
        return
    for label, value in figures[0].items():
        print(f"{label:<22} {', '.join(value) if isinstance(value, list) else value}")
    print()
    for place, source in _sources(chosen[0].model_dump(exclude_none=True)):
        print(f"[{place}] {source}")
    for note in chosen[0].notes:
        print(f"note: {note}")


def _figures(profile: Profile) -> dict[str, Any]:
    from llmserve_env.hardware.latency import compile_latency, iteration_time
    from llmserve_env.hardware.memory import kv_blocks

    arrays = compile_latency(profile)
    decode = {n: iteration_time(arrays, 0, [], n, n * _CONTEXT, _CONTEXT, n) for n in _BATCHES}
    return {
        "name": profile.name,
        "gpu": profile.gpu.name,
        "tp": profile.gpu.count,
        "model": profile.model.name,
        "tiers": list(profile.tier_names),
        "kv_tokens": kv_blocks(profile) * profile.engine.block_tokens,
        **{f"decode_ms_batch_{n}": _ms(seconds) for n, seconds in decode.items()},
        "prefill_ms_2048": _ms(iteration_time(arrays, 0, [(_PROMPT, 0)], 0, 0, 0, 1)),
    }


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 2)


def _print_table(figures: list[dict[str, Any]]) -> None:
    from llmserve_env.commands.shared.report import table

    header = ["profile", "GPU", "tp", "tiers", "KV tokens", *(f"decode {n}" for n in _BATCHES), "prefill"]
    rows = [
        [
            row["name"],
            row["gpu"],
            str(row["tp"]),
            " ".join(row["tiers"]),
            f"{row['kv_tokens']:,}",
            *(f"{row[f'decode_ms_batch_{n}']:.1f}" for n in _BATCHES),
            f"{row['prefill_ms_2048']:.1f}",
        ]
        for row in figures
    ]
    print(table(header, rows, left=4))
    print(f"\ndecode: ms of an iteration of 1, 32 or 128 sequences at {_CONTEXT:,} tokens of context")
    print(f"prefill: ms of an iteration with {_PROMPT:,} tokens of one prompt")


def _sources(table: dict[str, Any], place: str = "") -> Iterator[tuple[str, str]]:
    for key, value in table.items():
        if key == "source":
            yield place, value
        elif isinstance(value, dict):
            yield from _sources(value, f"{place}.{key}" if place else key)
