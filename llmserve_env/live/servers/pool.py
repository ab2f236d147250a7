"""Which upstreams an action's requests go to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llmserve_env.controls import SPECS
from llmserve_env.schema import QuantizationTier

if TYPE_CHECKING:
    from llmserve_env.live.servers.upstreams import Upstream
    from llmserve_env.schema import ServeAction

_APPLIED = (
    "batch_cap",
    "kv_budget_fraction",
    "speculation_depth",
    "quantization_tier",
    "priority_routing",
    "admission_rate",
)
"""Controls that there is a way to apply before upstreams, wherever these allow it."""


def pool_of(
    action: ServeAction, upstreams: Sequence[Upstream]
) -> tuple[tuple[Upstream, ...], dict[str, str]]:
    """Upstreams that an action's requests go to, and the fields that there are none for."""
    pool = tuple(upstreams)
    found = {"prefill_decode_split": "an upstream has the roles that it was started with"}
    for name, spec in SPECS.items():
        known = name in _APPLIED or name in found or all(name in each.in_engine for each in pool)
        if not known and getattr(action, name) != spec.default:
            found[name] = "no way known to tell an upstream"
    for name, given in (("quantization_tier", "tier"), ("speculation_depth", "speculation")):
        value = getattr(action, name)
        same = tuple(each for each in pool if name in each.in_engine or getattr(each, given) == value)
        pool = same or pool
        if not same:
            said = value.value if isinstance(value, QuantizationTier) else value
            found[name] = f"no upstream is stated to have {given}={said}"
    return pool, found


def blind(
    action: ServeAction, pool: Sequence[Upstream], kv_usage: Callable[[Upstream], float | None]
) -> dict[str, str]:
    """The KV budget, where it is not known how full the caches of a pool are."""
    gated = (each for each in pool if "kv_budget_fraction" not in each.in_engine)
    if action.kv_budget_fraction == 1 or all(kv_usage(each) is not None for each in gated):
        return {}
    return {"kv_budget_fraction": "an upstream's KV cache usage is not known now"}
