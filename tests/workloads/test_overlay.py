"""Traces in another's place: stretches that differ by seed, tenants by the lengths that they send."""

from __future__ import annotations

import numpy as np
import pytest
import trace_samples

from llmserve_env.errors import InputError
from llmserve_env.tasks import load_task
from llmserve_env.workloads import Workload, open_workload
from llmserve_env.workloads.overlay import overlaid

TRACE = Workload(
    arrival_s=np.arange(100.0),  # a request a second
    prompt_tokens=np.arange(1, 101),
    output_tokens=np.full(100, 7),
    tenant=np.zeros(100),
    prefix_block_tokens=16,
    prefix_offsets=np.arange(101),
    prefix_ids=np.full(100, 3),
)


def test_a_stretch_goes_on_from_the_beginning_after_the_end():
    for seed in range(20):
        part = overlaid(TRACE, 1, seed=seed, duration_s=100.0)
        first = int(part.prompt_tokens[0])
        assert part.prompt_tokens.tolist() == [*range(first, 101), *range(1, first)]
        assert part.arrival_s[0] < 1
        assert np.allclose(np.diff(part.arrival_s), 1.0)


def test_stretches_differ_by_seed_and_from_each_other():
    parts = [overlaid(TRACE, 3, seed=seed, duration_s=20.0) for seed in range(5)]
    assert {len(part) for part in parts} == {60}
    assert len({part.prompt_tokens.tobytes() for part in parts}) == 5
    assert len(set(parts[0].prompt_tokens[:3])) == 3
    again = overlaid(TRACE, 3, seed=0, duration_s=20.0)
    assert again.prompt_tokens.tobytes() == parts[0].prompt_tokens.tobytes()


def test_stretches_share_no_prefixes_with_each_other():
    part = overlaid(TRACE, 2, seed=0, duration_s=20.0)
    assert np.unique(part.prefix_ids, return_counts=True)[1].tolist() == [20, 20]


def test_a_trace_shorter_than_a_stretch_is_refused():
    with pytest.raises(InputError, match="expected a trace of 101 s or more, found 100 s"):
        overlaid(TRACE, 1, seed=0, duration_s=101.0)


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    rows = [f"{i},{i + 1},5" for i in range(100)]
    path.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows]))
    return path


def test_a_task_plays_other_stretches_for_other_seeds(trace):
    task = load_task("static_workload", workload=f"trace://{trace}?scale=2&overlay=2", horizon_s=10.0)
    parts = [task.requests(seed) for seed in range(4)]
    assert {len(part) for part in parts} == {40}
    assert len({part.prompt_tokens.tobytes() for part in parts}) == 4
    assert max(part.arrival_s[-1] for part in parts) < 10
    whole = open_workload(f"trace://{trace}?overlay=2&seed=1&duration=10")
    assert (
        whole.prompt_tokens.tolist()
        != open_workload(f"trace://{trace}?overlay=2&duration=10").prompt_tokens.tolist()
    )


def test_a_task_begins_anywhere_in_a_table_of_clients(tmp_path):
    path = tmp_path / "clients.csv"
    head = trace_samples.SERVEGEN.split("\n")[0]
    path.write_text("\n".join([head, *(f"0,{600 * i},{1 + i},1,Gamma,1,1" for i in range(20))]))
    uri = f"servegen://{path}?lengths=fixed:5,6"
    rates = {len(load_task("static_workload", workload=uri).requests(seed)) / 300 for seed in range(30)}
    assert min(rates) < 5 < 15 < max(rates)
    fixed = load_task("static_workload", workload=f"{uri}&start=6000")
    assert {round(len(fixed.requests(seed)) / 300) for seed in range(4)} == {11}


def test_requests_go_to_who_sends_such_lengths(tmp_path, trace):
    mix = tmp_path / "mix.toml"
    mix.write_text('[short]\nlengths = "fixed:10,5"\nshare = 9\n[long]\nlengths = "fixed:900,5"\nshare = 1\n')
    workload = open_workload(f"trace://{trace}?tenants={mix}&assign=lengths")
    assert workload.prompt_tokens.tolist() == list(range(1, 101)), "they keep their own lengths"
    middle = 94.9  # 9.49 times the short ones, the long ones 9.48 times it
    assert (workload.tenant == (workload.prompt_tokens > middle)).all()
    longer = open_workload(
        f"servegen://{_clients(tmp_path)}?lengths=fixed:200,5&tenants={mix}&assign=lengths"
    )
    assert set(longer.prompt_tokens) == {200}
    assert set(longer.tenant) == {1}
    with pytest.raises(InputError, match="expected shares or lengths") as caught:
        open_workload(f"trace://{trace}?tenants={mix}&assign=both")
    assert caught.value.field == "assign"
    with pytest.raises(InputError, match="expected lengths, by which"):
        open_workload(f"trace://{trace}?tenants=standard&assign=lengths")


def _clients(tmp_path):
    path = tmp_path / "clients.csv"
    path.write_text(trace_samples.SERVEGEN)
    return path
