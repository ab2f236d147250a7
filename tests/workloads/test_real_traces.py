"""The public traces themselves: every loader on its real file, measured against what is published of it."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve_env.workloads import describe, load, load_lengths, open_workload
from llmserve_env.workloads.generators.servegen import read_client_lengths, read_windows

pytestmark = pytest.mark.needs_shared


def agrees(found: float, published: float, digits: int = 2) -> bool:
    """Equal once rounded to the published digits, one unit of the last digit aside."""
    unit = 10.0 ** (np.floor(np.log10(abs(published))) - digits + 1)
    return abs(found - published) <= 1.01 * unit


def rounded(lengths) -> list[int]:
    """Mean, p50, p90, p99 and max in whole tokens."""
    return [round(value) for value in (lengths.mean, lengths.p50, lengths.p90, lengths.p99, lengths.max)]


def test_azure_conversations(shared_data):
    workload, report = load(shared_data / "traces/AzureLLMInferenceTrace_conv.csv")
    facts = describe(workload)
    assert report.rows == report.requests == 19366
    assert int(facts.duration_s) == 3501
    assert facts.traffic == "steady"
    assert agrees(facts.rate_rps, 5.53, 3)
    assert agrees(facts.gap_cv, 1.09, 3)
    for scale, dispersion, peak in zip(facts.scales, (1.4, 3.9, 16), (2.9, 1.8, 1.5), strict=True):
        assert agrees(scale.dispersion, dispersion)
        assert agrees(scale.peak_to_mean, peak)
    prompt, output = facts.prompt, facts.output
    assert rounded(prompt) == [1155, 1020, 2734, 4142, 14050]  # p90 is 2734.5, published as 2735
    assert rounded(output) == [211, 129, 424, 601, 1000]
    assert facts.length_correlation == pytest.approx(-0.11, abs=0.005)


def test_mooncake_conversations(shared_data):
    path = shared_data / "traces/mooncake_conversation_trace.jsonl.gz"
    exact, report = load(path, jitter_s=0)
    facts = describe(exact)
    assert report.requests == 12031
    assert agrees(facts.rate_rps, 3.40, 3)
    for scale, dispersion, peak in zip(facts.scales[1:], (2.1, 2.9), (2.0, 1.2), strict=True):
        assert agrees(scale.dispersion, dispersion)
        assert agrees(scale.peak_to_mean, peak)
    prompt, output = facts.prompt, facts.output
    assert rounded(prompt) == [12035, 6909, 27367, 85400, 126195]
    assert rounded(output) == [343, 350, 597, 1119, 2000]
    assert facts.length_correlation == pytest.approx(0.07, abs=0.005)
    assert facts.prefix_reuse.hit_share == pytest.approx(0.37, abs=0.005)
    assert facts.prefix_reuse.mostly_hit_share == pytest.approx(0.29, abs=0.005)


def test_the_spread_undoes_mooncake_coarse_times(shared_data):
    path = shared_data / "traces/mooncake_conversation_trace.jsonl.gz"
    facts = describe(load(path)[0])
    coarse = describe(load(path, jitter_s=0)[0])
    assert coarse.scales[0].dispersion > 5
    assert facts.scales[0].dispersion == pytest.approx(1, abs=0.1)
    assert facts.gap_cv == pytest.approx(1, abs=0.05)
    assert facts.scales[2].dispersion == pytest.approx(coarse.scales[2].dispersion, rel=0.05)


def test_sharegpt_lengths(shared_data):
    workload, report = load(shared_data / "traces/sharegpt_llama-3.1-8b_300sessions_lengths.csv")
    assert (report.format, len(workload)) == ("plain CSV, short names", 300)


@pytest.mark.parametrize("run", ["rtx4090_llama-3.1-8b", "rtxpro6000_llama-3.1-8b"])
def test_measured_runs(shared_data, run):
    workload, report = load(shared_data / "ground_truth/vllm_measured" / run / "requests.jsonl")
    lengths, _ = load(shared_data / "traces/sharegpt_llama-3.1-8b_300sessions_lengths.csv")
    assert (report.format, len(workload), workload.arrival_s[0]) == ("vLLM run JSONL", 300, 0.0)
    assert set(workload.request_ids) == {f"bench-{i}" for i in range(300)}
    by_id = np.argsort([int(name.split("-")[1]) for name in workload.request_ids])
    assert np.array_equal(workload.prompt_tokens[by_id], lengths.prompt_tokens)


def test_vidur_trace(shared_data):
    workload, report = load(shared_data / "ground_truth/peer_vidur/vllm2000.trace.csv")
    assert (report.format, len(workload)) == ("Vidur CSV", 2000)


def test_arxiv_lengths(shared_data):
    law = load_lengths(shared_data / "traces/arxiv_summarization_lengths.csv")
    prompt, output = law.prompt_tokens, law.output_tokens
    assert len(prompt) == 28257
    assert np.percentile(prompt, (50, 90, 99, 100)).round().tolist() == [2730, 3702, 3933, 4054]
    assert np.percentile(output, (50, 90, 99, 100)).round().tolist() == [167, 372, 3271, 4056]
    assert (round(prompt.mean()), round(output.mean())) == (2588, 291)
    assert np.corrcoef(prompt, output)[0, 1] == pytest.approx(-0.46, abs=0.005)


def test_a_trace_may_lend_its_lengths(shared_data):
    path = shared_data / "traces/arxiv_summarization_lengths.csv"
    facts = describe(open_workload(f"poisson://?requests=30000&lengths={path}"))
    assert facts.prompt.mean == pytest.approx(2588, rel=0.01)
    assert facts.length_correlation == pytest.approx(-0.46, abs=0.03)


@pytest.mark.parametrize(("model", "clients", "top_ten"), [("m-large", 162, 0.63), ("m-small", 43, 0.93)])
def test_servegen_tables(shared_data, model, clients, top_ten):
    table = read_windows(str(shared_data / f"traces/servegen_language_{model}.csv.gz"))
    load_of = np.bincount(table.client, weights=table.rate_rps)
    assert (load_of > 0).sum() == clients
    assert np.sort(load_of)[-10:].sum() / load_of.sum() == pytest.approx(top_ten, abs=0.005)
    if model == "m-large":
        assert 1 - table.weibull.mean() == pytest.approx(0.75, abs=0.05)


def test_servegen_requests_follow_the_table(shared_data):
    path = shared_data / "traces/servegen_language_m-large.csv.gz"
    quantiles = shared_data / "traces/servegen_client_length_quantiles.csv"
    table = read_windows(str(path))
    scale, start = 0.05, 86400
    uri = f"servegen://{path}?scale={scale}&start={start}&duration=6000&quantiles={quantiles}&model=language/m-large"
    workload = open_workload(uri)
    published = [scale * table.rate_rps[table.start_s == start + 600 * window].sum() for window in range(10)]
    found = np.histogram(workload.arrival_s, np.arange(0, 6001, 600))[0] / 600
    np.testing.assert_allclose(found, published, rtol=0.03)
    # Lengths: the whole model's quantiles, of which ten windows are a part; so a wide tolerance.
    facts = describe(workload)
    assert facts.prompt.mean == pytest.approx(1056, rel=0.35)
    assert facts.output.mean == pytest.approx(173, rel=0.35)
    laws = read_client_lengths(str(quantiles), "language/m-large")
    assert laws.prompt.tokens.shape == laws.output.tokens.shape == (len(laws.clients), 5)
