"""Mixes of tenants: who sends which share of the requests, under which promises."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmserve_env.errors import InputError
from llmserve_env.files import read_toml
from llmserve_env.workloads.lengths import LengthLaw, length_law
from llmserve_env.workloads.parameters import is_number
from llmserve_env.workloads.presets import preset
from llmserve_env.workloads.workload import Tenant, Workload

_TENANT_KEYS = tuple(entry.name for entry in fields(Tenant) if entry.name != "name")
_MOST = 1e6  # of weights and seconds
_MOST_RETRIES = 100
_SHORTEST_WAIT = (
    1e-3  # of clients who try again (s): a shorter one would cost more to serve than the requests
)
_MATCHED = 5_000  # requests of the tenants with which those of a trace are compared
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
            seed: seed of the draw.
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

    def match(self, workload: Workload) -> Workload:
        """Give each request the tenant who sends such lengths.

        Of 5,000 requests that the tenants would send, by their shares and length laws, it is the tenant of
        the one that is nearest: by the ratios of prompts and of outputs. Requests keep their lengths.

        Args:
            workload: its prefix blocks stay as they are.

        Raises:
            InputError: a tenant has no length law of its own.
        """
        from scipy.spatial import KDTree

        logs, senders = [], []
        for index, (tenant, law) in enumerate(zip(self.tenants, self.lengths, strict=True)):
            if law is None:
                raise InputError("expected lengths, by which requests are matched", field=tenant.name)
            count = max(round(_MATCHED * self.shares[index]), 1)
            pairs = law.sample(np.random.SeedSequence(0, spawn_key=(_STREAM, index)), count)
            logs.append(np.log(np.stack(pairs, axis=1)))
            senders.append(np.full(count, index))
        found = np.log(np.stack([workload.prompt_tokens, workload.output_tokens], axis=1))
        nearest = KDTree(np.concatenate(logs)).query(found)[1]
        tenant_of = np.concatenate(senders)[nearest]
        return replace(workload, tenant=tenant_of.astype(np.int16), tenants=self.tenants)


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
            tenant, law = parse_tenant(name, entry, others=("share",))
            share = _share(entry)
        except InputError as error:
            raise InputError(error.reason, file=place, field=f"{name}.{error.field}") from None
        tenants.append(tenant)
        shares.append(share)
        lengths.append(law)
    if not tenants:
        raise InputError("expected at least one table, one for each tenant", file=place, field="tenants")
    return TenantMix(tuple(tenants), np.array(shares) / sum(shares), tuple(lengths))


def parse_tenant(name: str, entry: Any, *, others: tuple[str, ...] = ()) -> tuple[Tenant, LengthLaw | None]:
    """A tenant from its table, and its own length law if the table names one.

    Args:
        name: name of the tenant.
        entry: what TOML gave for it.
        others: further keys of the table, which the caller reads.

    Raises:
        InputError: names the key and what was expected.
    """
    keys = (*others, "slo", "lengths", *_TENANT_KEYS)
    if not isinstance(entry, Mapping):
        raise InputError(f"expected a table, found {entry!r}", field=keys[0])
    for key, value in entry.items():
        if key not in keys:
            raise InputError(f"expected one of {', '.join(keys)}", field=key)
        if key in others:
            continue
        if key in ("slo", "lengths", "speculation_class"):
            if not isinstance(value, str):
                raise InputError(f"expected a name, found {value!r}", field=key)
        elif key == "priority":
            if type(value) is not int:
                raise InputError(f"expected a whole number, found {value!r}", field=key)
        elif key == "retries":
            if type(value) is not int or not 0 <= value <= _MOST_RETRIES:
                raise InputError(f"expected a whole number in 0..{_MOST_RETRIES}, found {value!r}", field=key)
        elif not is_number(value) or not value > 0:
            raise InputError(f"expected a number > 0, found {value!r}", field=key)
        elif value > _MOST and not (key in ("patience_s", "deadline_s") and value == math.inf):
            raise InputError(f"expected at most {_MOST:g}, found {value!r}", field=key)
        elif key == "retry_after_s" and value < _SHORTEST_WAIT:
            raise InputError(f"expected at least {_SHORTEST_WAIT:g}, found {value!r}", field=key)
    promises = preset("slos", entry["slo"], field="slo") if "slo" in entry else {}
    merged = {**promises, **entry}
    tenant = Tenant(name=name, **{key: merged[key] for key in _TENANT_KEYS if key in merged})
    try:
        return tenant, length_law(entry["lengths"]) if "lengths" in entry else None
    except InputError as error:  # of a file of lengths the message keeps the place in it
        raise InputError(error.reason if error.file is None else str(error), field="lengths") from None


def _share(entry: Mapping[str, Any]) -> float:
    share = entry.get("share", 1.0)
    if not is_number(share) or not share > 0:
        raise InputError(f"expected a number > 0, found {share!r}", field="share")
    if not math.isfinite(share):
        raise InputError(f"expected a finite number, found {share}", field="share")
    return float(share)
