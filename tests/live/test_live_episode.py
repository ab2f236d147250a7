"""Episodes that an endpoint serves, at the level of the schema."""

from __future__ import annotations

import pytest

from llmserve_env.errors import InputError
from llmserve_env.grading import grade
from llmserve_env.live import EndpointSettings, LiveEpisode
from llmserve_env.schema import EpisodeLog, QuantizationTier, ServeAction
from llmserve_env.tasks import load_task

from .endpoint_server import CompletionEndpoint, closed_url, serving

SEED = 2**31
WORKLOAD = {
    "tenants": {"chat": {"slo": "mooncake", "lengths": "fixed:20,3"}},
    "regimes": [{"name": "all", "dwell_s": [10, 10], "rates": {"chat": 60.0}}],
}


def task(windows=3, **changes):
    return load_task("static_workload", window_s=0.3, horizon_s=0.3 * windows, workload=WORKLOAD, **changes)


def played(episode, action=None):
    """All observations of an episode."""
    observations = [episode.reset(SEED)]
    while not observations[-1].done:
        observations.append(episode.step(action or ServeAction(batch_cap=8)))
    return observations


@pytest.fixture(scope="module")
def url():
    with serving(CompletionEndpoint()) as url:
        yield url


def test_an_episode_is_played_logged_and_graded_without_verification(url):
    episode = LiveEpisode(task(), EndpointSettings(url, "m", precision=QuantizationTier.FP16))
    first, *windows = played(episode)
    assert (first.step_index, first.done, first.reward, first.queue_depth) == (0, False, 0.0, 0)
    assert first.metadata["not_applied"] == {}
    assert [each.step_index for each in windows] == [1, 2, 3]
    last = windows[-1]
    assert (last.metadata["truncated"], last.metadata["terminated"]) == (True, False)
    assert set(last.metadata["not_applied"]) == {"speculation_depth", "prefill_decode_split"}
    assert last.metadata["action"]["batch_cap"] == 8
    assert sum(each.tenants["chat"].completed for each in windows) > 0
    log = episode.log()
    assert log.live
    assert EpisodeLog.model_validate_json(log.model_dump_json()) == log
    result = grade(log)
    assert not result.verified
    assert result.complete
    assert 0 < result.score == pytest.approx(last.metadata["score"])
    assert sum(result.components.values()) == pytest.approx(result.score)
    assert result.components["goodput"] > result.components["latency"] > result.components["memory"] == 0
    assert [each.reward for each in windows] == log.rewards


def test_what_cannot_be_measured_earns_nothing(url):
    for precision in (None, QuantizationTier.FP16):
        episode = LiveEpisode(task(), EndpointSettings(url, "m", precision=precision))
        rewarded = [each for each in played(episode) if each.reward]
        parts = [each.metadata["reward_components"] for each in rewarded]
        assert parts
        assert all(part["memory"] == 0 for part in parts)
        assert all(part["goodput"] > 0 for part in parts)
        assert all(part["latency"] > 0 for part in parts)
        assert all((part["quality"] > 0) == (precision is not None) for part in parts)


def test_what_the_bounds_cut_is_told_and_not_asked_for(url):
    settings = EndpointSettings(
        url, "m", max_requests_per_step=1, max_prompt_tokens=5, max_completion_tokens=2
    )
    episode = LiveEpisode(task(), settings)
    windows = played(episode)[1:]
    told = windows[-1].metadata["live"]
    total = len(task().requests(SEED))
    assert told["cuts"] == {
        "requests": total,
        "left_out": total - 3,
        "prompts_shortened": 3,
        "answers_shortened": 3,
    }
    assert [each.tenants["chat"].arrived for each in windows] == [1, 1, 1]
    assert windows[0].mean_prompt_length == 5
    assert sum(each.tenants["chat"].in_slo for each in windows) > 0
    for each in windows:  # a share of what is sent: one request a window is all of a window's
        earned = each.metadata["reward_components"]["goodput"]
        assert earned == pytest.approx(episode.task.reward.goodput * each.tenants["chat"].in_slo)
    assert 0 < sum(each.throughput_tps for each in windows) * 0.3 < 6.1  # two tokens a request
    assert told["endpoint"] == url
    assert {"kv_cache_occupancy", "preemptions", "gpu_busy_share"} <= set(told["unmeasured"])


def test_an_endpoint_that_is_down_earns_nothing():
    episode = LiveEpisode(task(2), EndpointSettings(closed_url(), "m"))
    windows = played(episode)[1:]
    assert sum(each.failed_requests for each in windows) > 0
    assert windows[-1].metadata["live"]["failures"].keys() == {"connection"}
    assert grade(episode.log()).score == 0.0


def test_too_many_in_flight_terminates():
    with serving(CompletionEndpoint(held=True)) as url:
        episode = LiveEpisode(task(max_in_flight=5), EndpointSettings(url, "m"))
        windows = played(episode)[1:]
    assert len(windows) == 1
    assert windows[0].metadata["terminated"]
    assert episode.log().terminated


def test_steps_out_of_turn_are_refused(url):
    episode = LiveEpisode(task(1), EndpointSettings(url, "m"))
    with pytest.raises(InputError, match="reset"):
        episode.step(ServeAction())
    played(episode)
    with pytest.raises(InputError, match="over"):
        episode.step(ServeAction())
    assert len(played(episode)) == 2  # and it can be played again
