"""Who calls: tenants by their API key or by a header, from a TOML file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmserve_env.backend import MAX_TENANTS
from llmserve_env.errors import InputError, as_input_error
from llmserve_env.files import read_toml
from llmserve_env.workloads.workload import Tenant

if TYPE_CHECKING:
    pass

_PROMISED = ("priority", "weight", "ttft_slo_s", "tpot_slo_s")
_MODEL = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Caller(BaseModel):
    """A tenant of the gateway."""

    model_config = _MODEL

    name: str = Field(min_length=1)
    """As in measurements."""
    key: str | None = Field(None, min_length=1, repr=False)
    """Its API key: `Authorization: Bearer KEY`."""
    value: str | None = Field(None, min_length=1)
    """Of the header that names tenants. Without key and value the tenant is everybody else."""
    priority: int = 0
    """Lower is more urgent."""
    weight: float = Field(1.0, gt=0)
    """Worth of one of its requests relative to the others'."""
    ttft_slo_s: float = Field(Tenant.ttft_slo_s, gt=0)
    """Time to first token that it was promised (s)."""
    tpot_slo_s: float = Field(Tenant.tpot_slo_s, gt=0)
    """Time per output token that it was promised (s)."""


class _File(BaseModel):
    model_config = _MODEL

    header: str = "x-tenant"
    """Header whose value names the tenant."""
    tenants: list[Caller] = Field(min_length=1, max_length=MAX_TENANTS)


class Callers:
    """The callers that a gateway knows.

    Args:
        callers: with names, keys and values of their own; one at most is everybody else.
        header: whose value names the tenant of a request without a known key.

    Attributes:
        all: Tenant of each.

    Raises:
        InputError: two callers that cannot be told apart.
    """

    def __init__(
        self, callers: Iterable[Caller] = (Caller(name="default"),), header: str = "x-tenant"
    ) -> None:
        callers = tuple(callers)
        self.all = tuple(
            Tenant(
                each.name,
                weight=each.weight,
                ttft_slo_s=each.ttft_slo_s,
                tpot_slo_s=each.tpot_slo_s,
                priority=each.priority,
            )
            for each in callers
        )
        others = [each.key is None and each.value is None for each in callers]
        for field, found in (
            ("name", [each.name for each in callers]),
            ("key", [each.key for each in callers if each.key]),
            ("value", [each.value for each in callers if each.value]),
        ):
            if len(set(found)) != len(found):
                raise InputError("expected each tenant's own", field=f"tenants.{field}")
        if sum(others) > 1:
            raise InputError("expected one tenant at most without key and value", field="tenants")
        self._header = header.lower().encode()
        self._by_key = {_digest(each.key.encode()): i for i, each in enumerate(callers) if each.key}
        self._by_value = {each.value.encode(): i for i, each in enumerate(callers) if each.value}
        self._other = others.index(True) if any(others) else None

    def of(self, headers: Iterable[tuple[bytes, bytes]]) -> tuple[int | None, bool]:
        """Who sends a request with these headers (names in lower case).

        Returns:
            Index into `all`, None for nobody that is known; and whether the key told, which is then the
            gateway's and no business of an upstream.
        """
        found = self._other
        for name, value in headers:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                # By digest: how long a look-up takes tells nothing of a key.
                tenant = self._by_key.get(_digest(value[7:].strip()))
                if tenant is not None:
                    return tenant, True
            elif name == self._header:
                found = self._by_value.get(value, found)
        return found, False


def load_tenants(path: Path | str, of: Sequence[Tenant] | None = None) -> Callers:
    """Tenants of a TOML file: a table [[tenants]] each, with the fields of `Caller`, and `header`.

    Args:
        path: path of the file.
        of: a task's tenants, in the order in which the file's are taken: each must be there, by its name.
            What they were promised is the task's; a file that says something else is refused.

    Raises:
        InputError: names file and field, and never a key.
    """
    table = read_toml(path)
    try:
        file = _File.model_validate(table)
        return Callers(file.tenants if of is None else _matched(file.tenants, of), file.header)
    except ValidationError as error:
        refused = as_input_error(error)
        reason = error.errors()[0]["msg"] if "key" in (refused.field or "") else refused.reason
        raise InputError(reason, file=str(path), field=refused.field) from error
    except InputError as error:
        raise InputError(error.reason, file=str(path), field=error.field) from error


def task_tenants(of: Sequence[Tenant]) -> Callers:
    """A task's tenants without a file: each by its name in the header, a single one is everybody."""
    alone = len(of) == 1
    named = [Caller(name=each.name, value=None if alone else each.name) for each in of]
    return Callers(_matched(named, of))


def _matched(callers: Sequence[Caller], of: Sequence[Tenant]) -> list[Caller]:
    """The callers with what the task promises, in its order."""
    by_name = {each.name: each for each in callers}
    if len(by_name) != len(callers) or set(by_name) != {each.name for each in of}:
        raise InputError(
            f"expected the task's tenants, {', '.join(each.name for each in of)}; "
            f"found {', '.join(each.name for each in callers)}",
            field="tenants.name",
        )
    found = []
    for tenant in of:
        caller = by_name[tenant.name]
        promised = {name: getattr(tenant, name) for name in _PROMISED}
        for name in caller.model_fields_set & set(_PROMISED):
            if getattr(caller, name) != promised[name]:
                raise InputError(
                    f"the task has {promised[name]:g} for {tenant.name}, found {getattr(caller, name):g}: "
                    "leave it out",
                    field=f"tenants.{name}",
                )
        found.append(caller.model_copy(update=promised))
    return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
