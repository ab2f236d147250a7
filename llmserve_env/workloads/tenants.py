"""Mixes of tenants: who sends which share of the requests, under which promises."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmserve_env.errors import InputError
from llmserve_env.workloads.lengths import LengthLaw, length_law
from llmserve_env.workloads.presets import preset, read_toml
from llmserve_env.workloads.workload import Tenant, Workload

_TENANT_KEYS = tuple(entry.name for entry in fields(Tenant) if entry.name != "name")
_KEYS = ("share", "slo", "lengths", *_TENANT_KEYS)
_STREAM = 2**31 + 1  # spawn key, apart from those of arrivals and lengths


@dataclass(frozen=True)
class TenantMix:
    """Tenants and their parts of a workload.

    Attributes:
        tenants: k tenants.
        shares: float64[k], parts of the requests, summing to 1.
        lengths: a tenant's own length law, or None: the workload's.
    """

    tenants: tuple[Tenant, ...]
    shares: NDArray[np.float64]
    lengths: tuple[LengthLaw | None, ...]

    def assign(self, workload: Workload, *, seed: int, own_lengths: bool) -> Workload:
        """Give each request a tenant at random, and where the mix says so that tenant's lengths.

        Args:
            workload: its prefix blocks stay as they are.
            seed: of the draw.
            own_lengths: whether the tenants' own length laws apply.
        """
        n = len(workload)
        root = np.random.SeedSequence(seed, spawn_key=(_STREAM,))
        draw = np.random.default_rng(root).random(n)
        tenant = np.searchsorted(np.cumsum(self.shares)[:-1], draw, side="right")
        prompt_tokens, output_tokens = workload.prompt_tokens.copy(), workload.output_tokens.copy()
        for index, law in enumerate(self.lengths):
            if own_lengths and law is not None:
                rows = np.flatnonzero(tenant == index)
                seed_of = np.random.SeedSequence(seed, spawn_key=(_STREAM, index))
                prompt_tokens[rows], output_tokens[rows] = law.sample(seed_of, len(rows))
        return replace(
            workload,
            tenant=tenant.astype(np.int16),
            tenants=self.tenants,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
        )


def tenant_mix(text: str) -> TenantMix:
    """The mix that a URI's `tenants=` names: a preset, or a TOML file with one table a tenant.

    Raises:
        InputError: no such preset or file, or an entry in it cannot be used.
    """
    is_file = text.endswith(".toml")
    entries = read_toml(Path(text)) if is_file else preset("tenants", text, field="tenants")
    place = text if is_file else None
    tenants, shares, lengths = [], [], []
    for name, entry in entries.items():
        try:
            tenant, share = _tenant(name, entry)
            lengths.append(length_law(entry["lengths"]) if "lengths" in entry else None)
        except InputError as error:
            raise InputError(error.reason, file=place, field=f"{name}.{error.field or 'lengths'}") from None
        tenants.append(tenant)
        shares.append(share)
    if not tenants:
        raise InputError("expected at least one table, one for each tenant", file=place, field="tenants")
    return TenantMix(tuple(tenants), np.array(shares) / sum(shares), tuple(lengths))


def _tenant(name: str, entry: Any) -> tuple[Tenant, float]:
    if not isinstance(entry, dict):
        raise InputError(f"expected a table, found {entry!r}", field="share")
    for key, value in entry.items():
        if key not in _KEYS:
            raise InputError(f"expected one of {', '.join(_KEYS)}", field=key)
        if key in ("slo", "lengths", "speculation_class"):
            if not isinstance(value, str):
                raise InputError(f"expected a name, found {value!r}", field=key)
        elif key == "priority":
            if type(value) is not int:
                raise InputError(f"expected a whole number, found {value!r}", field=key)
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise InputError(f"expected a number > 0, found {value!r}", field=key)
    share = float(entry.get("share", 1.0))
    if not np.isfinite(share):
        raise InputError(f"expected a finite number, found {share}", field="share")
    promises = preset("slos", entry["slo"], field="slo") if "slo" in entry else {}
    merged = {**promises, **entry}
    return Tenant(name=name, **{key: merged[key] for key in _TENANT_KEYS if key in merged}), share
