"""Thresholds of the shield's rules."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from llmserve_env.controls import SPECS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PATH = Path(__file__).parent.parent / "data" / "shield.toml"

_MODEL = ConfigDict(extra="forbid", frozen=True)


def _safe(action: dict[str, Any]) -> dict[str, Any]:
    """Values of controls that restart nothing."""
    for name, value in action.items():
        if name not in SPECS or SPECS[name].declared.restarts:
            raise ValueError(f"{name}: expected a control whose change restarts no engine")
        SPECS[name].checked(value)
    return action


SafeAction = Annotated[dict[str, Any], AfterValidator(_safe)]
"""Values by control. What is left out stays as it is in force, as what restarts engines must."""


class ModeSettings(BaseModel):
    """How a mode begins and ends.

    Attributes:
        windows_enter: windows in a row that its cause must last.
        windows_leave: windows in a row that its end must last.
        most_windows: after which it stands down whether it has helped or not ...
        rest_windows: ... for so many windows.
        action: what it sets.
    """

    model_config = _MODEL

    windows_enter: int = Field(ge=1)
    windows_leave: int = Field(ge=1)
    most_windows: int = Field(ge=1)
    rest_windows: int = Field(ge=0)
    action: SafeAction


class RescueSettings(ModeSettings):
    """RESCUE: queue or memory past a limit. Until both have fallen below the lower ones.

    Attributes:
        waiting_enter: waiting requests (per engine).
        waiting_leave: the lower limit (per engine).
        kv_enter: share of KV blocks held.
        kv_leave: the lower limit.
    """

    waiting_enter: float = Field(gt=0)
    waiting_leave: float = Field(ge=0)
    kv_enter: float = Field(gt=0, le=1)
    kv_leave: float = Field(ge=0, le=1)


class PanicSettings(ModeSettings):
    """PANIC: SLO compliance over a moving window has collapsed. Shed and drain until it is back.

    Attributes:
        windows: length of the moving window (windows).
        least_requests: requests that must have ended in it.
        compliance_enter: share of them within the SLO, below which it begins.
        compliance_leave: share from which on it ends.
        admit_share: admission rate as a share of the completions in the moving window, where it is granted.
    """

    windows: int = Field(ge=1)
    least_requests: int = Field(ge=1)
    compliance_enter: float = Field(ge=0, le=1)
    compliance_leave: float = Field(ge=0, le=1)
    admit_share: float = Field(gt=0)


class VetoSettings(BaseModel):
    """VETO: no cut of capacity and no restart while the load rises.

    Attributes:
        windows: over which a rise is measured.
        rise: growth of the requests in flight that is one, as a share.
        release: share of that growth below which it is over.
        least_in_flight: requests in flight below which nothing is a rise (per engine).
        slow: median token gap, as a share of the tightest TPOT SLO, that excuses a cut of capacity.
        late: age of the oldest waiting request, as a share of the tightest TTFT SLO, that excuses a cut of
            the admission rate.
    """

    model_config = _MODEL

    windows: int = Field(ge=1)
    rise: float = Field(gt=0)
    release: float = Field(ge=0, le=1)
    least_in_flight: float = Field(ge=0)
    slow: float = Field(gt=0)
    late: float = Field(gt=0)


class ShieldSettings(BaseModel):
    """All thresholds; those of the package are in data/shield.toml, each with its reason.

    Attributes:
        rescue: queue or memory past a limit.
        panic: SLO compliance collapsed.
        veto: a cut while the load rises.
    """

    model_config = _MODEL

    rescue: RescueSettings
    panic: PanicSettings
    veto: VetoSettings


@lru_cache(maxsize=1)
def shield_settings() -> ShieldSettings:
    """The thresholds of data/shield.toml."""
    return ShieldSettings.model_validate(tomllib.loads(PATH.read_text(encoding="utf-8")))
