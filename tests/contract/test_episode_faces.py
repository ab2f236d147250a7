"""An episode has one face, whether the simulator, real engines or a server play it."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve_env import Episode, grade, load_task
from llmserve_env.agents import load_agent
from llmserve_env.agents.constant import ConstantAgent
from llmserve_env.client import RemoteSession
from llmserve_env.episode import EpisodeBatch
from llmserve_env.errors import InputError
from llmserve_env.live import EndpointSettings, LiveEpisode
from llmserve_env.play import play_batch
from llmserve_env.rewards import COMPONENTS
from llmserve_env.schema import EpisodeLog, ServeAction
from llmserve_env.session import RemoteEpisode
from tests.live.endpoint_server import CompletionEndpoint, serving
from tests.of_every_task import FEATURES
from tests.server.conftest import running

SEED = 7
WINDOWS = 3
INFO = {"seed", "reward_components", "cost", "score", "action", "not_applied"}
WORKLOAD = {
    "tenants": {"chat": {"slo": "mooncake", "lengths": "fixed:20,3"}},
    "regimes": [{"name": "all", "dwell_s": [10, 10], "rates": {"chat": 60.0}}],
}
ACTION = ServeAction(batch_cap=8)


@pytest.fixture(scope="module")
def url():
    with running() as url:
        yield url


@pytest.fixture(scope="module")
def endpoint():
    with serving(CompletionEndpoint()) as url:
        yield url


@pytest.fixture(params=["simulated", "live", "remote"])
def episode(request):
    if request.param == "live":
        task = load_task("static_workload", window_s=0.3, horizon_s=0.3 * WINDOWS, workload=WORKLOAD)
        made = LiveEpisode(task, EndpointSettings(request.getfixturevalue("endpoint"), "m"))
    else:
        task = load_task("static_workload", horizon_s=float(WINDOWS))
        made = Episode(task)
        if request.param == "remote":
            made = RemoteEpisode(task, RemoteSession(request.getfixturevalue("url")))
    yield made
    made.close()


def test_it_is_played_step_by_step_and_logged(episode):
    seen = [episode.reset(SEED)]
    assert episode.action == episode.task.start
    while not episode.done:
        seen.append(episode.step(ACTION))
        assert episode.observation() == seen[-1]
        assert episode.action == ACTION
    assert [each.step_index for each in seen] == list(range(WINDOWS + 1))
    assert [each.done for each in seen] == [False] * WINDOWS + [True]
    assert all(INFO | {"terminated", "truncated"} <= each.metadata.keys() for each in seen)
    assert [each.metadata["truncated"] for each in seen] == [each.done for each in seen]
    for each in seen:
        parts = each.metadata["reward_components"]
        assert tuple(parts) == COMPONENTS
        assert sum(parts.values()) == pytest.approx(each.reward)
        assert each.metadata["seed"] == SEED
    assert seen[0].metadata["action"] == episode.task.start.model_dump(mode="json")
    rewards = [each.reward for each in seen[1:]]
    assert seen[-1].metadata["score"] == pytest.approx(sum(rewards) / WINDOWS)
    log = episode.log()
    assert EpisodeLog.model_validate_json(log.model_dump_json()) == log
    assert (log.actions, log.rewards, log.seed) == ([ACTION] * WINDOWS, rewards, SEED)
    assert (len(log.digests), log.terminated) == (WINDOWS, False)
    assert log.score == seen[-1].metadata["score"]
    assert grade(log).score == pytest.approx(log.score)
    assert grade(log).verified is not log.live


def test_steps_out_of_turn_are_refused(episode):
    with pytest.raises(InputError, match="reset"):
        episode.step(ACTION)
    for _ in range(2):  # it can be played again
        episode.reset(SEED)
        for _ in range(WINDOWS):
            episode.step(ACTION)
        with pytest.raises(InputError, match="over"):
            episode.step(ACTION)


def test_what_the_task_does_not_grant_is_not_obeyed(episode):
    episode.reset(SEED)
    seen = episode.step(ACTION.model_copy(update={"admission_rate": 1.0}))
    assert episode.action == ACTION
    assert seen.metadata["action"] == ACTION.model_dump(mode="json")
    assert seen.metadata["not_applied"]["admission_rate"] == "not granted by the task: it stays None"
    assert seen.refused_tries == 0
    assert episode.log().actions == [ACTION]


def test_an_agent_plays_it_as_any_other(episode):
    rewards = []

    def watch(batch, result):
        rewards.append(float(result.rewards[0]))
        assert result.observations.shape == (1, len(FEATURES))
        assert result.observations.dtype == np.float32
        assert (result.terminated[0], result.truncated[0]) == (False, len(rewards) == WINDOWS)
        assert batch.windows["end_s"][0] == pytest.approx(len(rewards) * batch.task.window_s)

    for agent in (load_agent("reactive", episode.task), ConstantAgent(ACTION, "constant")):
        rewards.clear()
        batch = play_batch(agent, episode.batch, [SEED], watch)
        assert batch is episode.batch
        assert (batch.over.tolist(), batch.steps.tolist()) == ([True], [WINDOWS])
        assert batch.info().keys() >= INFO
        assert batch.info()["score"] == pytest.approx(sum(rewards) / WINDOWS)
        assert batch.info()["reward_components"].keys() == set(COMPONENTS)
    assert episode.log().actions == [ACTION] * WINDOWS


def test_on_a_server_it_is_the_same_bit_for_bit(url):
    task = load_task("adversarial_multitenant", horizon_s=40.0)
    here, there = Episode(task), RemoteEpisode(task, RemoteSession(url))
    seen = []
    for episode in (here, there):
        steps = []
        play_batch(
            load_agent("reactive", task),
            episode.batch,
            [SEED],
            lambda batch, result, kept=steps: kept.append(
                (batch.windows.tobytes(), result.observations.tobytes(), result.rewards.tobytes())
            ),
        )
        seen.append(steps)
    assert seen[0] == seen[1]
    assert here.log() == there.log()
    assert there.grade() == grade(here.log())
    there.close()


def test_a_task_that_a_session_cannot_be_told_of_is_refused(url):
    with pytest.raises(InputError, match="shipped"):
        RemoteEpisode(load_task("static_workload", window_s=0.5), RemoteSession(url))


def test_episodes_side_by_side_have_the_logs_that_they_have_alone():
    task = load_task("adversarial_multitenant", horizon_s=40.0)
    seeds = [SEED, SEED + 1, SEED + 2]
    batch = EpisodeBatch(task, len(seeds), recorded=True)
    play_batch(load_agent("reactive", task), batch, seeds)
    for index, seed in enumerate(seeds):
        alone = Episode(task)
        play_batch(load_agent("reactive", task), alone.batch, [seed])
        assert batch.log(index) == alone.log()
        assert batch.info(index) == alone.batch.info()
