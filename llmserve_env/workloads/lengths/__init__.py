"""Laws of prompt and output length, by name, from a file, or fixed."""

from __future__ import annotations

import numpy as np

from llmserve_env.errors import InputError
from llmserve_env.workloads.lengths.empirical import EmpiricalLengths
from llmserve_env.workloads.lengths.fixed import FixedLengths
from llmserve_env.workloads.lengths.law import LengthLaw
from llmserve_env.workloads.lengths.mixture import LognormalMixture, MixtureLengths
from llmserve_env.workloads.lengths.quantiles import QuantileCurve, QuantileLengths
from llmserve_env.workloads.presets import preset, presets

__all__ = [
    "DEFAULT_LENGTHS",
    "EmpiricalLengths",
    "FixedLengths",
    "LengthLaw",
    "LognormalMixture",
    "MixtureLengths",
    "QuantileCurve",
    "QuantileLengths",
    "length_law",
]

DEFAULT_LENGTHS = "azure-conv"
"""Law of requests of which none is named."""

_FIXED = "fixed:"


def length_law(text: str, *, skip_bad_rows: bool = False) -> LengthLaw:
    """The law that a URI's `lengths=` names.

    Args:
        text: a preset's name, "fixed:PROMPT,OUTPUT", or the path of a trace or length table to draw from.
        skip_bad_rows: for a file, as in `load`.

    Raises:
        InputError: it is none of them, or the file cannot be used.
    """
    if text.startswith(_FIXED):
        parts = text[len(_FIXED) :].split(",")
        if len(parts) == 2 and all(part.isdecimal() and 1 <= int(part) < 2**31 for part in parts):
            return FixedLengths(int(parts[0]), int(parts[1]))
        raise InputError(f"expected fixed:PROMPT,OUTPUT in tokens >= 1, found {text!r}", field="lengths")
    if text in presets("lengths"):
        return _preset_law(text)
    if "/" in text or "\\" in text or "." in text:
        from llmserve_env.workloads.loaders import load_lengths

        return load_lengths(text, skip_bad_rows=skip_bad_rows)
    known = ", ".join(presets("lengths"))
    raise InputError(f"expected {known}, fixed:PROMPT,OUTPUT or a file, found {text!r}", field="lengths")


def _preset_law(name: str) -> LengthLaw:
    entry = preset("lengths", name, field="lengths")
    if entry["law"] == "mixture":
        prompt, output = (
            LognormalMixture(tuple(map(tuple, entry[side]["components"])), entry[side]["most"])
            for side in ("prompt", "output")
        )
        return MixtureLengths(prompt, output)
    probability = np.array(entry["probability"])
    return QuantileLengths(
        QuantileCurve(probability, np.array([entry["prompt"]], np.float64)),
        QuantileCurve(probability, np.array([entry["output"]], np.float64)),
        entry["score_correlation"],
    )
