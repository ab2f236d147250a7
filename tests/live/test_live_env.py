"""LLMServeLive-v0 before real HTTP servers: what is applied, refused, ordered, told and brought back."""

from __future__ import annotations

import gc
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import llmserve_env  # noqa: F401 - registers
from llmserve_env.controls import to_array
from llmserve_env.errors import InputError
from llmserve_env.grading import grade
from llmserve_env.live import LiveEpisode, sender
from llmserve_env.live.gateway.ledger import UNMEASURED
from llmserve_env.live.servers.engine_settings import EngineSettings, read_settings, write_settings
from llmserve_env.live.settings import open_endpoint
from llmserve_env.schema import QuantizationTier, ServeAction

from .control_folder import FolderEngine
from .endpoint_server import CompletionEndpoint, Reply, closed_url, serving
from .vllm_server import RecordedServer, metrics

TENANTS = {
    "chat": {"slo": "mooncake", "lengths": "fixed:20,3"},
    "batch": {"slo": "mooncake", "lengths": "fixed:20,3", "priority": 1},
}
WORKLOAD = {
    "tenants": TENANTS,
    "regimes": [{"name": "all", "dwell_s": [10, 10], "rates": dict.fromkeys(TENANTS, 40.0)}],
}
WINDOW_S = 0.3
CHAT, BATCH = "chat", "batch"


@pytest.fixture
def make():
    """Makes environments, and closes them."""
    made = []

    def make(*url, windows=3, **given):
        arguments = {"model": "m", "window_s": WINDOW_S, "horizon_s": windows * WINDOW_S, **given}
        env = gym.make(
            "LLMServeLive-v0",
            url=url[0] if len(url) == 1 else url,
            workload=WORKLOAD,
            disable_env_checker=True,
            **arguments,
        )
        made.append(env)
        return env.unwrapped

    yield make
    for each in made:
        each.close()


def act(**fields):
    return to_array([ServeAction(**fields)])[0]


def play(env, **fields):
    """Infos and observations of an episode under one action."""
    env.reset(seed=1)
    infos, seen, done = [], [], False
    while not done:
        *_, terminated, truncated, info = env.step(act(**fields))
        infos.append(info)
        seen.append(env.episode.observation())
        done = terminated or truncated
    return infos, seen


def total(seen, field):
    return sum(getattr(tenant, field) for each in seen for tenant in each.tenants.values())


def test_gymnasiums_checker_has_nothing_to_say(make):
    with serving(CompletionEndpoint()) as url, warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(url, windows=2))


def test_an_episode_has_the_form_of_a_simulated_one(make):
    simulated = gym.make(
        "LLMServe-v0", workload=WORKLOAD, window_s=WINDOW_S, horizon_s=3 * WINDOW_S
    ).unwrapped
    with serving(CompletionEndpoint()) as url:
        live = make(url, precision="FP16")
        assert live.observation_space == simulated.observation_space
        assert live.action_space == simulated.action_space
        expected, known = simulated.reset(seed=1)
        observation, info = live.reset(seed=1)
        assert np.array_equal(observation, expected)
        assert info.keys() == known.keys() | {"live"}
        live.action_space.seed(0)
        observation, reward, _, truncated, info = live.step(live.action_space.sample())
        assert observation in live.observation_space
        assert sum(info["reward_components"].values()) == pytest.approx(reward)
        assert not truncated
        *_, truncated, _ = live.step(act(batch_cap=64))
        *_, truncated, info = live.step(act(batch_cap=64))
        assert truncated
        log = live.log()
    assert log.live
    assert log.actions[-1] == ServeAction(batch_cap=64)
    assert grade(log).score == pytest.approx(info["score"])
    assert grade(log).components.keys() == info["reward_components"].keys()


@pytest.mark.parametrize("cap", [1, 3])
def test_no_request_is_lost_and_the_cap_is_kept(make, cap):
    endpoint = CompletionEndpoint(held=True)
    arrived = over = 0
    with serving(endpoint) as url:
        env = make(url)
        env.reset(seed=1)
        for _ in range(3):
            env.step(act(batch_cap=cap))
            seen = env.episode.observation()
            arrived += total([seen], "arrived")
            over += total([seen], "completed") + total([seen], "failed")
            assert arrived == over + seen.in_flight
            assert seen.in_flight == seen.queue_depth + seen.active_requests
            assert seen.active_requests <= cap
            endpoint.release()
    assert over > 0
    assert endpoint.peak == cap


def test_the_admission_rate_refuses(make):
    endpoint = CompletionEndpoint()
    with serving(endpoint) as url:
        infos, seen = play(make(url, task_id="death_spiral"), admission_rate=1.0)
    refused = sum(each.refused_tries for each in seen)
    assert 0 < refused == sum(each.failed_requests for each in seen)
    assert infos[-1]["live"]["failures"] == {"admission rate": refused}
    assert 0 < len(endpoint.requests) == total(seen, "arrived") - refused
    assert "admission_rate" not in infos[-1]["not_applied"]


@pytest.mark.parametrize("routing", [False, True])
def test_the_urgent_go_first_and_the_server_is_told(make, routing):
    endpoint = CompletionEndpoint(held=True)
    with serving(endpoint) as url:
        env = make(url, windows=40)
        env.reset(seed=1)
        env.step(act(batch_cap=1, priority_routing=routing))
        waiting = env.episode.observation().tenants[CHAT].in_flight
        assert waiting > 3
        endpoint.release()
        env.step(act(batch_cap=1, priority_routing=routing))
    sent = [body.get("priority", 0) for body in endpoint.requests]
    if routing:
        assert set(sent[1 : waiting - 1]) == {0}  # all of them before the first of the others
    else:
        assert set(sent) == {0}


def test_a_server_that_does_not_take_priorities_is_asked_without(make):
    endpoint = CompletionEndpoint(refuse=lambda body: 400 if "priority" in body else None)
    with serving(endpoint) as url:
        infos, seen = play(make(url), priority_routing=True)
    assert total(seen, "completed") > 0
    assert infos[-1]["live"]["failures"] == {}
    assert infos[-1]["live"]["ignore_eos"] is True
    assert endpoint.requests[-1]["ignore_eos"] is True


def test_precisions_and_depths_are_pools(make):
    fp16, int8 = CompletionEndpoint(), CompletionEndpoint()
    with serving(fp16) as one, serving(int8) as two:
        env = make(f"{one},tier=FP16", f"{two},tier=INT8,speculation=3")
        infos, seen = play(env, quantization_tier="INT8", speculation_depth=3)
        assert not fp16.requests
        assert len(int8.requests) > 3
        assert set(infos[-1]["not_applied"]) == {"prefill_decode_split"}
        assert seen[-1].engines_by_tier == {"FP16": 1, "INT8": 1, "INT4": 0}
        assert max(info["reward_components"]["quality"] for info in infos) > 0
        _, seen = play(env, quantization_tier="FP16", speculation_depth=3)
        assert fp16.requests
        assert env.episode.action.quantization_tier is QuantizationTier.FP16
        env.reset(seed=1)
        grid = env.task.grid.values
        begins = dict(zip(grid, np.cumsum([0, *(len(values) for values in grid.values())]), strict=False))
        masks = {
            name: dict(zip(values, env.action_masks()[begins[name] :], strict=False))
            for name, values in grid.items()
        }
        assert masks["quantization_tier"] == {tier: tier != "INT4" for tier in grid["quantization_tier"]}
        assert set(masks["speculation_depth"].values()) == {
            True
        }  # of FP16 there is no pool of any: no value has an effect
        assert env.capabilities()["quantization_tier"] == "routing: to servers with FP16, INT8"


def test_a_server_that_is_down_is_passed_over(make):
    with serving(CompletionEndpoint()) as url:
        infos, seen = play(make(closed_url(), url))
    assert total(seen, "completed") > 3
    assert total(seen, "failed") == 0
    assert infos[-1]["live"]["stale"].endswith("no metrics yet")


def test_a_full_cache_holds_requests_back_and_an_engine_that_does_so_itself_does_not(make, tmp_path):
    endpoint = CompletionEndpoint(others={"/metrics": metrics("0.32-busy-2")})
    with serving(endpoint) as url:
        _, seen = play(make(url), kv_budget_fraction=0.5)
        assert seen[-1].active_requests == 0
        assert seen[-1].queue_depth > 3
        assert not endpoint.requests
        FolderEngine(tmp_path)
        _, seen = play(make(url, control=str(tmp_path)), kv_budget_fraction=0.5)
    assert total(seen, "completed") > 3


def test_what_the_servers_tell_is_in_observations_and_rewards(make, monkeypatch):
    monkeypatch.setattr(sender, "SCRAPE_S", 0.01)
    endpoint = CompletionEndpoint(others={"/metrics": metrics("0.32-busy-1")})
    with serving(endpoint) as url:
        env = make(url, windows=100)
        env.reset(seed=1)
        endpoint.others["/metrics"] = metrics("0.32-busy-2")
        for _ in range(50):
            *_, info = env.step(act())
            seen = env.episode.observation()
            if seen.preemptions and info["reward_components"]["goodput"]:
                break
    assert seen.preemptions == 14
    assert seen.spec_acceptance_rate == pytest.approx((3516 - 1715) / (4446 - 2169))
    assert seen.kv_cache_occupancy == pytest.approx(0.9308, abs=1e-4)
    earned, worth = info["reward_components"], env.task.reward
    free = earned["memory"] / worth.memory / (earned["goodput"] / worth.goodput)
    assert 0.69 < free < 0.89  # of a cache that was held to 91 and 93%
    told = info["live"]["unmeasured"]
    assert told.keys() < UNMEASURED.keys()
    assert not told.keys() & {"preemptions", "kv_cache_occupancy", "spec_acceptance_rate"}


def test_lost_metrics_are_stale_and_no_zeros(make, monkeypatch):
    monkeypatch.setattr(sender, "SCRAPE_S", 0.01)
    monkeypatch.setattr(sender, "STALE_S", 1.5)
    endpoint = CompletionEndpoint(others={"/metrics": metrics("0.32-busy-1")})
    with serving(endpoint) as url:
        env = make(url, windows=100)
        env.reset(seed=1)
        *_, info = env.step(act())
        assert info["live"]["stale"] is None
        assert "kv_cache_occupancy" not in info["live"]["unmeasured"]
        del endpoint.others["/metrics"]
        for _ in range(50):
            *_, info = env.step(act())
            if info["live"]["stale"]:
                break
    assert "no metrics for" in info["live"]["stale"]
    assert info["live"]["unmeasured"] == UNMEASURED
    assert info["reward_components"]["memory"] == 0


@pytest.mark.parametrize("found", [None, EngineSettings(batch_cap=3)])
@pytest.mark.parametrize("end", ["horizon", "close", "reset", "interrupt", "forgotten"])
def test_settings_return_to_what_was_found(make, tmp_path, found, end):
    if found is not None:
        write_settings(tmp_path, found)
    engine = FolderEngine(tmp_path)
    with serving(CompletionEndpoint()) as url:
        env = make(url, windows=2, control=str(tmp_path))
        env.reset(seed=1)
        assert env.capabilities()["speculation_depth"] == "engine: 0 to 4"
        env.step(act(batch_cap=8, speculation_depth=2))
        assert engine.look().speculation_depth == 2
        if end == "horizon":
            env.step(act())
        elif end == "close":
            env.close()
        elif end == "reset":
            env.reset(seed=2)
        elif end == "interrupt":
            with pytest.raises(KeyboardInterrupt):
                interrupted(env)
        else:
            env.episode = LiveEpisode(env.task, env.episode.settings)
            gc.collect()
    assert (tmp_path / "settings.json").exists() == (found is not None)
    assert read_settings(tmp_path) == (found or EngineSettings())


def interrupted(env):
    """A step, with Ctrl-C in the middle of it."""
    import _thread
    import threading

    timer = threading.Timer(0.05, _thread.interrupt_main)
    timer.start()
    try:
        env.step(act())
    finally:
        timer.join()
        env.close()


def test_the_model_is_the_first_that_a_server_lists():
    with serving(RecordedServer()) as url:
        assert open_endpoint(url).model == "tiny"
        assert open_endpoint(url.removesuffix("/v1")).model == "tiny"
        assert open_endpoint(url, "other").model == "other"
    silent = RecordedServer({"/v1/models": Reply('{"data": []}')})
    with serving(silent) as url, pytest.raises(InputError, match="does not tell its models"):
        open_endpoint(url)
    with pytest.raises(InputError, match="cannot be reached"):
        open_endpoint(closed_url())


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"url": []}, "url"),
        ({"url": "ftp://h"}, "base_url"),
        ({"url": ["http://h:1", "h:2"]}, "more"),
        ({"url": ["http://h:1", "http://h:2"], "control": "folder"}, "control"),
        ({"url": "http://h:1", "precision": "FP8"}, "precision"),
    ],
)
def test_servers_that_cannot_be_are_refused(given, field):
    with pytest.raises(InputError) as caught:
        open_endpoint(model="m", **given)
    assert caught.value.field == field


def test_a_control_folder_that_is_none_is_refused_at_reset(make, tmp_path):
    with pytest.raises(InputError, match="expected an existing folder"):
        make("http://127.0.0.1:1", control=str(tmp_path / "none")).reset(seed=1)
