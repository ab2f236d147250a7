"""Length laws against the quantiles that are published of their sources."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve_env.workloads import length_law
from llmserve_env.workloads.presets import presets

SEED = np.random.SeedSequence(1)
COUNT = 200_000

# mean, p50, p90, p99, max of prompts and outputs
PUBLISHED = {
    "mooncake-conversation": ((12035, 6909, 27367, 85400, 126195), (343, 350, 597, 1119, 2000)),
    "arxiv-summarization": ((2588, 2730, 3702, 3933, 4054), (291, 167, 372, 3271, 4056)),
    "servegen-m-large": ((1056, 652, 2373, 7640, 30699), (173, 66, 481, 1005, 9176)),
    "servegen-m-small": ((149, 40, 336, 1529, 151068), (20, 3, 60, 186, 10912)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_quantile_laws(name):
    """Quantiles within 3%; means, which the law's shape between quantiles decides, within 10%."""
    for tokens, (mean, *quantiles, most) in zip(
        length_law(name).sample(SEED, COUNT), PUBLISHED[name], strict=True
    ):
        np.testing.assert_allclose(np.percentile(tokens, (50, 90, 99)), quantiles, rtol=0.03)
        assert tokens.mean() == pytest.approx(mean, rel=0.10)
        assert 0.5 * most < tokens.max() <= most


def test_azure_mixture():
    """Means within 2%; p50 and p90 within 20%: a mixture of two or three laws is no better fit (KS 0.1)."""
    prompt, output = length_law("azure-conv").sample(SEED, COUNT)
    assert prompt.mean() == pytest.approx(1155, rel=0.02)
    assert output.mean() == pytest.approx(211, rel=0.02)
    np.testing.assert_allclose(np.percentile(prompt, (50, 90)), (1020, 2735), rtol=0.05)
    np.testing.assert_allclose(np.percentile(output, (50, 90)), (129, 424), rtol=0.20)
    assert prompt.max() <= 14050
    assert output.max() <= 1000


@pytest.mark.parametrize("name", presets("lengths"))
def test_more_draws_keep_the_first_ones(name):
    law = length_law(name)
    for few, many in zip(law.sample(SEED, 100), law.sample(SEED, 5000), strict=True):
        assert few.min() >= 1
        assert np.array_equal(few, many[:100])
    assert len(presets("lengths")[name]["source"]) > 20


def test_the_copula_ties_ranks():
    prompt, output = length_law("arxiv-summarization").sample(SEED, COUNT)
    rank = [np.argsort(np.argsort(tokens)) for tokens in (prompt, output)]
    assert np.corrcoef(*rank)[0, 1] == pytest.approx(-0.11, abs=0.01)
    prompt, output = length_law("mooncake-conversation").sample(SEED, COUNT)
    assert np.corrcoef(prompt, output)[0, 1] == pytest.approx(0.07, abs=0.02)
