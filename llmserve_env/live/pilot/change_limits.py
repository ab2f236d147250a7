"""Limits on how much one decision changes what is in force."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, RootModel, model_validator

from llmserve_env.controls import CONTROLS, SPECS
from llmserve_env.schema import ServeAction

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PATH = Path(__file__).parents[1] / "data" / "limits.toml"

_MODEL = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
_HIGHEST_RATE = SPECS["admission_rate"].high


class Factor(BaseModel):
    """Of a control that is multiplied or divided."""

    model_config = _MODEL

    most_factor: float = Field(gt=1)
    """By which one decision raises or lowers it, at most."""


class Step(BaseModel):
    """Of a control that is added to."""

    model_config = _MODEL

    most_step: float = Field(gt=0)
    """By which one decision raises or lowers it, at most."""


class Pause(BaseModel):
    """Of a control whose change costs."""

    model_config = _MODEL

    least_windows: int = Field(ge=1)
    """From one change to the next."""


_KINDS: dict[str, type[BaseModel]] = {"log": Factor, "linear": Step, "whole": Step, "choice": Pause}
"""The limit of a control, by its scale."""


class ChangeLimits(RootModel[dict[str, Factor | Step | Pause]]):
    """By control; a control without one changes freely. Those of the package are in data/limits.toml."""

    model_config = ConfigDict(frozen=True)

    root: dict[str, Factor | Step | Pause] = {}

    @model_validator(mode="before")
    @classmethod
    def _of_controls(cls, limits: Any) -> Any:
        """Each limit as the kind that its control has."""
        if not isinstance(limits, dict):
            return limits
        for name in limits:
            if name not in SPECS:
                raise ValueError(f"{name}: expected some of {', '.join(SPECS)}")
        return {
            name: _KINDS[SPECS[name].declared.scale].model_validate(limit) for name, limit in limits.items()
        }

    def held(
        self, wanted: ServeAction, in_force: ServeAction, age: Mapping[str, int], asked_rate: float
    ) -> tuple[ServeAction, dict[str, str]]:
        """What comes into force in place of what is wanted.

        Args:
            wanted: the configuration.
            in_force: the one that it follows.
            age: windows since each control last changed; those that never did may be missing.
            asked_rate: requests per second that clients sent in the last window, for which an admission rate
                of None stands.

        Returns:
            The configuration, and what was held back by field, in words.
        """
        values: dict[str, Any] = {}
        held: dict[str, str] = {}
        for name in CONTROLS:
            limit, old, new = self.root.get(name), getattr(in_force, name), getattr(wanted, name)
            if limit is None or new == old:
                continue
            if isinstance(limit, Pause):
                since = age.get(name)
                if since is not None and since < limit.least_windows:
                    values[name] = old
                    held[name] = f"{_said(new)} held back: changed {since} window{'s' * (since != 1)} ago"
                continue
            if name == "admission_rate":
                assert isinstance(limit, Factor)
                kept = _rate(new, old, limit.most_factor, asked_rate)
            elif old is None or new is None:
                continue
            else:
                low, high = (
                    (old / limit.most_factor, old * limit.most_factor)
                    if isinstance(limit, Factor)
                    else (old - limit.most_step, old + limit.most_step)
                )
                if isinstance(new, int):
                    low, high = math.ceil(low), math.floor(high)
                    # A limit never stops a control for good.
                    low, high = min(low, old - 1), max(high, old + 1)
                kept = type(new)(round(min(max(new, low), high), 9))
            if kept != new:
                values[name] = kept
                held[name] = f"{_said(old)} to {_said(kept)}, not {_said(new)}"
        return (wanted.model_copy(update=values), held) if held else (wanted, {})


@lru_cache(maxsize=1)
def shipped_limits() -> ChangeLimits:
    """The limits of data/limits.toml."""
    return ChangeLimits.model_validate(tomllib.loads(PATH.read_text(encoding="utf-8")))


def _rate(new: float | None, old: float | None, factor: float, asked_rate: float) -> float | None:
    """An admission rate between its bounds: None is the rate that was asked for, and lets more in later."""
    if old is None:
        low = asked_rate / factor
        return new if new is None or new >= low else min(low, _HIGHEST_RATE)
    if new is None:
        return None if asked_rate <= old * factor else min(old * factor, _HIGHEST_RATE)
    return min(max(new, old / factor), old * factor)


def _said(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(getattr(value, "value", value))
