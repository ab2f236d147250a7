"""Bounds of what is sent, and its text."""

from __future__ import annotations

import numpy as np

from llmserve_env.live.settings import EndpointSettings
from llmserve_env.live.traffic import Prompts, bounded
from llmserve_env.workloads.workload import Workload


def workload(arrivals, prompts, outputs, **more):
    return Workload(np.array(arrivals), np.array(prompts), np.array(outputs), np.zeros(len(arrivals)), **more)


def test_bounds_cut_by_window_and_length_and_say_so():
    asked = workload([0.0, 0.1, 0.9, 1.0, 2.5, 2.6], [10, 200, 30, 400, 5, 6], [9, 9, 9, 90, 1, 50])
    settings = EndpointSettings(
        "http://h/v1", "m", max_requests_per_step=2, max_prompt_tokens=100, max_completion_tokens=20
    )
    sent, cuts = bounded(asked, 1.0, settings)
    assert sent.arrival_s.tolist() == [0.0, 0.1, 1.0, 2.5, 2.6]
    assert sent.prompt_tokens.tolist() == [10, 100, 100, 5, 6]
    assert sent.output_tokens.tolist() == [9, 9, 20, 1, 20]
    assert (cuts.requests, cuts.left_out, cuts.prompts_shortened, cuts.answers_shortened) == (6, 1, 2, 2)


def test_prompts_have_their_lengths_and_their_requests_own_words():
    asked = workload([0.0, 1.0], [50, 50], [1, 1])
    words = Prompts(asked, 7, None)
    assert [len(words.of(index).split()) for index in (0, 1)] == [50, 50]
    assert words.of(0) == Prompts(asked, 7, None).of(0)
    assert len({words.of(0), words.of(1), Prompts(asked, 8, None).of(0)}) == 3
    tokens = Prompts(asked, 7, (100, 200)).of(0)
    assert len(tokens) == 50
    assert 100 <= min(tokens) < max(tokens) < 200


def test_prompts_share_what_the_workload_says_they_share():
    shared = {"prefix_block_tokens": 16, "prefix_offsets": [0, 2, 4, 6], "prefix_ids": [1, 2, 1, 3, 2, 1]}
    asked = workload([0.0, 1.0, 2.0], [40, 40, 20], [1, 1, 1], **shared)
    first, second, third = (Prompts(asked, 7, (0, 10_000)).of(index) for index in range(3))
    assert first[:16] == second[:16]
    assert first[16:32] != second[16:32]
    assert first[32:] != second[32:]
    assert len(third) == 20
    assert third[:16] != first[16:32]  # a block of the same name at another depth is other text
