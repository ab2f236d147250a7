"""A scenario from the table that TOML gives for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any

from llmserve_env.errors import InputError
from llmserve_env.workloads import parameters
from llmserve_env.workloads.generators.conversations import Conversations
from llmserve_env.workloads.lengths import DEFAULT_LENGTHS, length_law
from llmserve_env.workloads.parameters import is_number
from llmserve_env.workloads.scenario.regimes import Regime, Spikes
from llmserve_env.workloads.scenario.scenario import Scenario
from llmserve_env.workloads.scenario.traffic import Conversing, Independent, Traffic
from llmserve_env.workloads.tenants import parse_tenant
from llmserve_env.workloads.workload import Tenant

_ORDERS = ("shuffled", "cycle")
# Prefix blocks are those of the KV cache, 16 tokens: one workload has one block size.
_SESSION_KEYS = tuple(name for name in parameters.names(Conversations) if name != "block")
_SHORTEST_S = 1.0  # of stays and spike periods: shorter ones would cost more to draw than the requests
_LOWEST_SHAPE = 0.01  # as for gamma://


def parse_scenario(table: Mapping[str, Any]) -> Scenario:
    """The scenario that a table describes.

    Args:
        table: `order`, `tenants` and `regimes`, as docs/workloads.md shows them.

    Raises:
        InputError: an entry is unknown, missing or cannot be used; its field is the path to it, such as
            "tenants.chat.slo" or "regimes[0].dwell_s".
    """
    _check_keys(table, ("order", "tenants", "regimes"), required=("tenants", "regimes"))
    order = table.get("order", _ORDERS[0])
    if order not in _ORDERS:
        raise InputError(f"expected one of {', '.join(_ORDERS)}, found {order!r}", field="order")
    entries = table["tenants"]
    if not isinstance(entries, Mapping) or not entries:
        raise InputError("expected at least one table, one for each tenant", field="tenants")
    tenants, traffic = [], []
    for name, entry in entries.items():
        with _inside(f"tenants.{name}"):
            tenant, sent = _tenant(name, entry)
        tenants.append(tenant)
        traffic.append(sent)
    return Scenario(
        tenants=tuple(tenants),
        traffic=tuple(traffic),
        regimes=_regimes(table["regimes"], tuple(entries)),
        shuffled=order == "shuffled",
    )


def _tenant(name: str, entry: Any) -> tuple[Tenant, Traffic]:
    _check_table(entry)
    tenant, law = parse_tenant(name, entry, others=("shape", "sessions"))
    lengths = law or length_law(DEFAULT_LENGTHS)
    if "sessions" not in entry:
        shape = _number(entry, "shape", at_least=_LOWEST_SHAPE) if "shape" in entry else 1.0
        return tenant, Independent(lengths, shape)
    if "shape" in entry:
        raise InputError("expected none beside sessions, which begin as a Poisson process", field="shape")
    with _inside("sessions"):
        sessions = entry["sessions"]
        _check_keys(sessions, _SESSION_KEYS)
        for key, value in sessions.items():
            if not is_number(value):
                raise InputError(f"expected a number, found {value!r}", field=key)
        written = {key: parameters.written(value) for key, value in sessions.items()}
        return tenant, Conversing(lengths, parameters.read(Conversations, written))


def _regimes(entries: Any, tenants: tuple[str, ...]) -> tuple[Regime, ...]:
    if isinstance(entries, str) or not isinstance(entries, Sequence) or not entries:
        raise InputError("expected at least one [[regimes]] table", field="regimes")
    regimes: list[Regime] = []
    for index, entry in enumerate(entries):
        with _inside(f"regimes[{index}]"):
            regime = _regime(entry, tenants)
            if regime.name in [other.name for other in regimes]:
                raise InputError(f"expected a name of its own, found {regime.name!r} again", field="name")
        regimes.append(regime)
    return tuple(regimes)


def _regime(entry: Any, tenants: tuple[str, ...]) -> Regime:
    required = ("name", "dwell_s", "rates")
    _check_keys(entry, (*required, "spikes"), required=required)
    name, rates, dwell_s = entry["name"], entry["rates"], entry["dwell_s"]
    if not isinstance(name, str) or not name:
        raise InputError(f"expected a name, found {name!r}", field="name")
    if (
        not isinstance(dwell_s, (list, tuple))
        or len(dwell_s) != 2
        or not all(is_number(side) and isfinite(side) for side in dwell_s)
        or not _SHORTEST_S <= dwell_s[0] <= dwell_s[1]
    ):
        raise InputError(
            f"expected [shortest, longest] with {_SHORTEST_S:g} <= shortest <= longest, found {dwell_s!r}",
            field="dwell_s",
        )
    with _inside("rates"):
        _check_keys(rates, tenants)
        by_tenant = tuple(
            _number(rates, tenant, at_least=0) if tenant in rates else 0.0 for tenant in tenants
        )
    spikes = None
    if "spikes" in entry:
        with _inside("spikes"):
            spikes = _spikes(entry["spikes"])
    return Regime(name, (float(dwell_s[0]), float(dwell_s[1])), by_tenant, spikes)


def _spikes(entry: Any) -> Spikes:
    required = ("every_s", "length_s", "factor")
    _check_keys(entry, required, required=required)
    every_s = _number(entry, "every_s", at_least=_SHORTEST_S)
    length_s = _number(entry, "length_s", above=0)
    if length_s >= every_s:
        raise InputError(f"expected a number < every_s ({every_s:g}), found {length_s:g}", field="length_s")
    return Spikes(every_s, length_s, _number(entry, "factor", above=0))


def _number(
    table: Mapping[str, Any], key: str, *, above: float | None = None, at_least: float | None = None
) -> float:
    bounds, value = parameters.Bounds(key, "", above=above, at_least=at_least), table[key]
    if not is_number(value) or not bounds.admits(value):
        raise InputError(f"expected {bounds.expected('float')}, found {value!r}", field=key)
    return float(value)


def _check_keys(table: Any, known: Sequence[str], *, required: Sequence[str] = ()) -> None:
    _check_table(table)
    for key in table:
        if key not in known:
            raise InputError(f"unknown: expected one of {', '.join(known)}", field=key)
    for key in required:
        if key not in table:
            raise InputError("is missing", field=key)


def _check_table(entry: Any) -> None:
    if not isinstance(entry, Mapping):
        raise InputError(f"expected a table, found {entry!r}")


@contextmanager
def _inside(place: str) -> Iterator[None]:
    """Put the place of a table before the fields that are refused in it."""
    try:
        yield
    except InputError as error:
        field = place if error.field is None else f"{place}.{error.field}"
        raise InputError(error.reason, field=field) from None
