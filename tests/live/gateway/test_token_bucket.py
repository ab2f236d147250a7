"""The admission rate, in sequences."""

from __future__ import annotations

import pytest

from llmserve_env.hardware.constants import constants
from llmserve_env.live.gateway.admission.token_bucket import TokenBucket


class Bucket:
    """A bucket under a rate, whose time stands still."""

    def __init__(self, rate, priorities=(0,)):
        self.rate, self.by_priority, self.now_s = rate, len(priorities) > 1, 100.0
        self._bucket = TokenBucket(priorities)

    def wait_s(self, sequences, priority=0):
        """0 where a request is let in, which then takes its tokens."""
        arguments = (self.rate, sequences, priority, self.by_priority, self.now_s)
        wait_s = self._bucket.wait_s(*arguments)
        if wait_s == 0:
            self._bucket.take(*arguments)
        return wait_s


def test_a_request_takes_a_token_for_each_sequence():
    assert constants().admission.burst_s == 1
    bucket = Bucket(10.0)
    assert bucket.wait_s(6) == 0
    assert bucket.wait_s(6) == pytest.approx(0.2)
    assert [bucket.wait_s(1) for _ in range(4)] == [0] * 4
    assert bucket.wait_s(1) == pytest.approx(0.1)


def test_what_weighs_more_than_a_burst_needs_a_full_bucket_and_is_paid_back():
    bucket = Bucket(10.0)
    assert bucket.wait_s(1) == 0
    assert bucket.wait_s(30) == pytest.approx(0.1)
    bucket.now_s += 0.1
    assert bucket.wait_s(30) == 0
    assert bucket.wait_s(1) == pytest.approx(2.1)  # 30 are in debt, and one of ten must be there
    bucket.now_s += 2.1
    assert [bucket.wait_s(1) > 0 for _ in range(2)] == [False, True]
    let_in = 1 + 30 + 1
    while bucket.now_s < 200:
        bucket.now_s += 0.01
        for sequences in (25, 1, 3):
            let_in += sequences * (bucket.wait_s(sequences) == 0)
    assert let_in <= 10 * (100 + 1) + 30


def test_a_heavy_request_of_the_less_urgent_leaves_the_more_urgent_their_part():
    bucket = Bucket(6.0, priorities=(0, 1, 2))
    assert bucket.wait_s(100, priority=2) == 0
    assert bucket.wait_s(1, priority=2) > 16
    assert [bucket.wait_s(1, priority=1) > 0 for _ in range(3)] == [False, False, True]
    assert [bucket.wait_s(1, priority=0) > 0 for _ in range(3)] == [False, False, True]


@pytest.mark.parametrize("rate", [0.2, 1.0, 1.9])
def test_at_a_low_rate_too_the_less_urgent_leave_a_token(rate):
    bucket = Bucket(rate, priorities=(0, 5))
    assert bucket.wait_s(1, priority=5) == 0
    assert bucket.wait_s(1, priority=0) == 0
    assert bucket.wait_s(1, priority=5) > 0
    assert bucket.wait_s(1, priority=0) > 0
