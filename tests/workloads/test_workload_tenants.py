"""Mixes of tenants: presets and files."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve_env.errors import InputError
from llmserve_env.workloads import open_workload, tenant_mix
from llmserve_env.workloads.presets import presets


@pytest.mark.parametrize("name", presets("tenants"))
def test_presets_hold_shares_and_promises(name):
    mix = tenant_mix(name)
    assert mix.shares.sum() == pytest.approx(1)
    workload = open_workload(f"poisson://?requests=20000&tenants={name}")
    assert workload.tenants == mix.tenants
    np.testing.assert_allclose(np.bincount(workload.tenant) / 20000, mix.shares, atol=0.01)


def test_promises_are_the_published_ones():
    premium, standard = tenant_mix("premium-standard").tenants
    assert (premium.ttft_slo_s, premium.tpot_slo_s, premium.priority) == (0.5, 0.03, 0)
    assert (standard.ttft_slo_s, standard.tpot_slo_s, standard.priority) == (2.0, 0.1, 1)
    assert premium.weight > standard.weight
    assert all(len(entry["source"]) > 20 for entry in presets("slos").values())


def test_tenants_leave_arrivals_alone_and_bring_their_lengths():
    plain = open_workload("poisson://?requests=3000")
    mixed = open_workload("poisson://?requests=3000&tenants=distserve-mix")
    assert np.array_equal(plain.arrival_s, mixed.arrival_s)
    summaries = mixed.tenant == [tenant.name for tenant in mixed.tenants].index("summarization")
    assert np.median(mixed.prompt_tokens[summaries]) == pytest.approx(2730, rel=0.1)
    named = open_workload("poisson://?requests=3000&tenants=distserve-mix&lengths=fixed:3,4")
    assert set(named.prompt_tokens) == {3}, "lengths that the URI names hold for all"


def test_sessions_keep_their_prompts():
    plain = open_workload("sessions://?requests=500")
    mixed = open_workload("sessions://?requests=500&tenants=distserve-mix")
    assert np.array_equal(plain.prompt_tokens, mixed.prompt_tokens)
    assert np.array_equal(plain.prefix_ids, mixed.prefix_ids)
    assert len(set(mixed.tenant)) == 3


def test_a_file_of_tenants(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        '[a]\nshare = 1\nttft_slo_s = 9.0\n[b]\nshare = 3\nslo = "mooncake"\nlengths = "fixed:5,6"\n'
    )
    mix = tenant_mix(str(path))
    assert mix.shares.tolist() == [0.25, 0.75]
    assert [tenant.ttft_slo_s for tenant in mix.tenants] == [9.0, 30.0]
    workload = open_workload(f"poisson://?requests=100&tenants={path}")
    assert set(workload.prompt_tokens[workload.tenant == 1]) == {5}


@pytest.mark.parametrize(
    ("text", "field", "reason"),
    [
        ("[a]\nshare = 0\n", "a.share", "expected a number > 0, found 0"),
        ("[a]\nshare = inf\n", "a.share", "expected a finite number"),
        ("[a]\nshare = true\n", "a.share", "expected a number > 0, found True"),
        ("[a]\nweight = nan\n", "a.weight", "expected a number > 0"),
        ("[a]\npriority = 0.5\n", "a.priority", "expected a whole number"),
        ('[a]\nslo = "none"\n', "a.slo", "expected one of mlperf"),
        ("[a]\nslo = 1\n", "a.slo", "expected a name"),
        ("[a]\nttft = 1.0\n", "a.ttft", "expected one of share, slo, lengths, weight"),
        ('[a]\nlengths = "none"\n', "a.lengths", "expected azure-conv"),
        ("a = 1\n", "a.share", "expected a table"),
        ("", "tenants", "at least one table"),
        ("[a\n", None, "cannot be read as TOML"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, field, reason):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        tenant_mix(str(path))
    assert (caught.value.file, caught.value.field) == (str(path), field)
    assert reason in caught.value.reason
