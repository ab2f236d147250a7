"""Constants: complete, possible and ordered; what they say of costs."""

from __future__ import annotations

from itertools import pairwise

import pytest
from pydantic import ValidationError

from llmserve_env.errors import InputError
from llmserve_env.hardware.constants import Speculation, constants


def test_host_overhead_is_one_value_below_a_millisecond():
    assert 0 < constants().host.overhead_us < 1000


def test_speculation_gains_grow_with_depth_and_shrink_by_draft_token():
    for name, entry in constants().speculation.items():
        tokens = entry.tokens_per_step
        gains = [b - a for a, b in pairwise(tokens)]
        assert tokens[0] == 1.0, name
        assert all(gain > 0 for gain in gains), name
        assert gains == sorted(gains, reverse=True), name


def test_math_drafts_are_accepted_more_often_than_chat_and_ngrams_least():
    speculation = constants().speculation
    for depth in range(1, 9):
        math, chat, ngram = (speculation[n].tokens_per_step[depth] for n in ("math", "chat", "ngram"))
        assert math > chat > ngram


def test_ngram_drafts_cost_no_model():
    speculation = constants().speculation
    assert (speculation["ngram"].draft_layers, speculation["ngram"].draft_head) == (0, False)
    assert (speculation["chat"].draft_layers, speculation["chat"].draft_head) == (1, True)


@pytest.mark.parametrize(
    "tokens",
    [
        (1.0, 2.5, 2.6, 2.7, 2.8, 2.9, 3.0, 3.1, 3.2),
        (1.0, 1.6, 1.5, 1.7, 1.8, 1.9, 2.0, 2.1, 2.2),
        (1.0, 1.6),
    ],
    ids=["more than drafted", "falls", "too few"],
)
def test_impossible_speculation_is_refused(tokens):
    with pytest.raises(ValidationError, match="tokens_per_step"):
        Speculation(tokens_per_step=tokens, draft_layers=0, draft_head=False, source="a test")


def test_quality_falls_with_precision():
    quality = constants().quality
    assert quality["FP16"].score == 1.0 > quality["INT8"].score > quality["INT4"].score


def test_a_switch_takes_a_restart_and_the_weights():
    switching = constants().switching
    assert switching.duration_s(0) == switching.restart_s
    assert switching.duration_s(16.06e9) == pytest.approx(49.9, abs=0.1)  # bf16 Llama-3.1-8B


def test_rdma_reproduces_the_measured_transfers():
    # Mooncake's table: 8 GPUs a side; MB as its time times its bandwidth, ms.
    rdma = constants().kv_transfer["rdma"]
    for megabytes, ms in [(19.7, 0.54), (142.8, 1.50), (565.3, 4.75), (1127.7, 8.84), (4502.2, 31.65)]:
        assert 1e3 * rdma.duration_s(megabytes * 1e6, gpu_count=8) == pytest.approx(ms, rel=0.07)


def test_nvlink_is_faster_than_pcie_and_each_gpu_has_one_default_link():
    links = constants().kv_transfer
    assert constants().kv_link("NVIDIA H100 80GB HBM3").bandwidth_gb_per_s > links["pcie5"].bandwidth_gb_per_s
    gpus = [gpu for link in links.values() for gpu in link.gpus]
    assert len(gpus) == len(set(gpus))


def test_unknown_gpu_names_the_known_ones():
    with pytest.raises(InputError, match="NVIDIA H200"):
        constants().kv_link("Voodoo 2")
