"""Tenants of a task before a gateway: who they are by a file, what they were promised by the task."""

from __future__ import annotations

import pytest

from llmserve_env.errors import InputError
from llmserve_env.live.gateway.callers import load_tenants, task_tenants
from llmserve_env.workloads.workload import Tenant

OF = (
    Tenant("chat", weight=3.0, ttft_slo_s=0.5, tpot_slo_s=0.05, priority=0),
    Tenant("batch", weight=1.0, ttft_slo_s=9.0, tpot_slo_s=0.5, priority=1),
)


def write(tmp_path, *tables):
    path = tmp_path / "tenants.toml"
    path.write_text("\n".join(f"[[tenants]]\n{table}" for table in tables), encoding="utf-8")
    return path


def of(known, name, value):
    return known.of([(name, value)])


def test_a_file_says_who_they_are_in_any_order(tmp_path):
    known = load_tenants(
        write(tmp_path, 'name = "batch"', 'name = "chat"\nkey = "k"\nttft_slo_s = 0.5'), of=OF
    )
    assert [(each.name, each.weight, each.ttft_slo_s, each.priority) for each in known.all] == [
        ("chat", 3.0, 0.5, 0),
        ("batch", 1.0, 9.0, 1),
    ]
    assert of(known, b"authorization", b"Bearer k") == (0, True)
    assert of(known, b"x-other", b"") == (1, False)


@pytest.mark.parametrize(
    ("tables", "field", "told"),
    [
        (['name = "chat"'], "tenants.name", "expected the task's tenants, chat, batch; found chat"),
        (
            ['name = "chat"', 'name = "batch"\nvalue = "b"', 'name = "x"\nvalue = "x"'],
            "tenants.name",
            "found",
        ),
        (['name = "chat"', 'name = "chat"\nkey = "k"', 'name = "batch"\nkey = "l"'], "tenants.name", "found"),
        (
            ['name = "chat"\nkey = "k"\nweight = 4.0', 'name = "batch"'],
            "tenants.weight",
            "has 3 for chat, found 4",
        ),
    ],
)
def test_a_file_of_other_tenants_or_promises_is_refused(tmp_path, tables, field, told):
    with pytest.raises(InputError, match=told) as caught:
        load_tenants(write(tmp_path, *tables), of=OF)
    assert (caught.value.field, caught.value.file) == (field, str(tmp_path / "tenants.toml"))


def test_without_a_file_the_header_has_their_names():
    known = task_tenants(OF)
    assert of(known, b"x-tenant", b"batch") == (1, False)
    assert of(known, b"x-tenant", b"nobody") == (None, False)
    assert of(task_tenants(OF[:1]), b"x-tenant", b"whoever") == (0, False)
