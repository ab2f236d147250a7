"""The client of a server: the episode that is played here, errors by name, sessions and connections."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import httpx
import pytest

from llmserve_env import Episode, grade, list_tasks, load_task
from llmserve_env.client import (
    CapacityError,
    ConflictError,
    LLMServeEnv,
    NotFoundError,
    RemoteSession,
    ServiceError,
)
from llmserve_env.envs.tool_env import ServeToolEnv
from llmserve_env.errors import InputError
from llmserve_env.schema import EpisodeLog, QuantizationTier, ServeAction, ServeObservation
from llmserve_env.tasks.catalog import catalog
from tests.of_every_task import FEATURES
from tests.server.conftest import ends, running

TASK = "adversarial_multitenant"
ACTIONS = [ServeAction(batch_cap=cap, priority_routing=True) for cap in (8, 64, 64, 512)]


@pytest.fixture
def env(server_url):
    with LLMServeEnv.from_url(server_url).sync() as env:
        yield env


def local(actions: list[ServeAction], seed: int = 5) -> tuple[list[ServeObservation], EpisodeLog]:
    """What the episode of four windows gives when it is played here."""
    episode = Episode(load_task(TASK, horizon_s=20.0))
    seen = [episode.reset(seed), *(episode.step(action) for action in actions)]
    return seen, episode.log()


def bare(observation: ServeObservation) -> dict:
    """An observation without the name of the session that gave it."""
    metadata = {name: value for name, value in observation.metadata.items() if name != "session_id"}
    return observation.model_copy(update={"metadata": metadata}).model_dump()


def begin(env, **arguments):
    return env.reset(**{"task_id": TASK, "seed": 5, "horizon_s": 20.0, **arguments})


# Episodes


def test_it_plays_what_is_played_here(env):
    here, log = local(ACTIONS)
    results = [begin(env), *(env.step(action) for action in ACTIONS)]
    assert [bare(result.observation) for result in results] == [bare(observation) for observation in here]
    assert [(result.reward, result.done) for result in results] == [
        (observation.reward, observation.done) for observation in here
    ]
    assert env.log() == log
    assert env.grade() == env.grade(log) == grade(log)


def test_it_is_awaited_too(server_url):
    async def play() -> list:
        async with LLMServeEnv.from_url(server_url) as env:
            seen = [await env.reset(task_id=TASK, seed=5, horizon_s=20.0), await env.step(ACTIONS[0])]
            rest = await env.step_n(ACTIONS[1:])
            assert (await env.state()).done
            assert (await env.grade()).verified
            assert len(await env.tasks()) == len(list_tasks())
            assert len((await env.log()).actions) == 4
            return [bare(result.observation) for result in [*seen, *rest.results]]

    assert asyncio.run(play()) == [bare(observation) for observation in local(ACTIONS)[0]]


def test_many_windows_in_a_message_are_those_one_by_one(env):
    here, _ = local(ACTIONS)
    begin(env)
    steps = env.step_n([*ACTIONS, *ACTIONS])  # the episode ends after four
    assert [bare(result.observation) for result in steps.results] == [bare(each) for each in here[1:]]
    assert steps.rewards == [result.reward for result in steps.results]
    begin(env)
    last = env.step_n(ACTIONS, every=False)
    assert [bare(result.observation) for result in last.results] == [bare(here[-1])]
    assert last.rewards == steps.rewards


def test_the_state_says_where_the_episode_stands(env):
    assert env.state().task_id is None
    begin(env, episode_id="mine")
    env.step(ServeAction())
    state = env.state()
    assert (state.task_id, state.seed, state.step_count, state.windows) == (TASK, 5, 1, 4)
    assert (state.episode_id, state.done) == ("mine", False)
    assert state.score == env.log().score


def test_tasks_are_told_as_here(env):
    assert tuple(env.tasks()) == catalog()


def test_the_default_is_the_first_task_with_a_training_seed(env):
    metadata = env.reset().observation.metadata
    assert env.state().task_id == "static_workload"
    assert 0 <= metadata["seed"] < 2**31
    assert "features" not in metadata


def test_features_and_workloads_go_with_a_reset(env):
    calm = env.reset(seed=1, workload="poisson://?rate=1", horizon_s=5.0, features=True)
    assert len(calm.observation.metadata["features"]) == len(FEATURES)
    rushed = env.reset(seed=1, workload="poisson://?rate=50", horizon_s=5.0)
    assert rushed.observation.metadata["seed"] == 1
    assert env.step(ServeAction()).observation.request_arrival_rate > 10


def test_observations_have_the_types_of_the_schema(env):
    result = begin(env)
    assert isinstance(result.observation, ServeObservation)
    assert QuantizationTier.FP16 in result.observation.engines_by_tier
    assert result.observation.tenants["premium"].arrived == 0
    assert result.metadata["session_id"] == env.state().session_id


# Refusals


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": "one"}, "seed"),
        ({"horizon_s": -5.0}, "horizon_s"),
        ({"horizon_s": 7.5}, None),
        ({"workload": "trace:///etc/passwd"}, "workload"),
        ({"no_such_argument": 1}, "no_such_argument"),
    ],
)
def test_what_cannot_be_played_is_an_input_error_with_its_field(env, arguments, field):
    begin(env)
    with pytest.raises(InputError) as refused:
        env.reset(**{"task_id": TASK, **arguments})
    if field is not None:
        assert refused.value.field == field
    assert env.step(ServeAction()).observation.step_index == 1, "the connection and the episode go on"


def test_a_bad_action_is_an_input_error_with_its_field(env):
    begin(env)
    with pytest.raises(InputError, match=r"512.*900") as refused:
        env.step(ServeAction.model_construct(batch_cap=900))
    assert refused.value.field == "batch_cap"
    with pytest.raises(InputError) as refused:
        env.step_n([ServeAction(), ServeAction.model_construct(speculation_depth=9)])
    assert refused.value.field == "actions.1.speculation_depth"
    assert env.state().step_count == 0


def test_a_log_that_does_not_match_is_refused_with_its_field(env):
    _, log = local(ACTIONS)
    rewards = [*log.rewards[:2], log.rewards[2] + 1e-9, log.rewards[3]]
    with pytest.raises(InputError) as refused:
        env.grade(log.model_copy(update={"rewards": rewards}))
    assert refused.value.field == "rewards[2]"


def test_an_unknown_task_is_not_found(env):
    with pytest.raises(NotFoundError, match="static_workload") as refused:
        env.reset(task_id="no_such_task")
    assert refused.value.status == 404


def test_what_comes_out_of_turn_is_a_conflict(env):
    for call in (env.grade, env.log, lambda: env.step(ServeAction())):
        with pytest.raises(ConflictError):
            call()
    begin(env)
    with pytest.raises(ConflictError, match="0 of 4"):
        env.grade()
    env.step_n(ACTIONS)
    with pytest.raises(ConflictError, match="over") as refused:
        env.step(ServeAction())
    assert refused.value.status == 409
    assert issubclass(ConflictError, ServiceError)


def test_a_full_server_says_so(single_url):
    with LLMServeEnv.from_url(single_url).sync() as first:
        session_id = first.reset().metadata["session_id"]
        other = LLMServeEnv.from_url(single_url).sync()
        try:
            with pytest.raises(CapacityError) as refused:
                other.reset()
            assert refused.value.status == 429
            assert first.step(ServeAction()).observation.step_index == 1
        finally:
            other.close()
    assert ends(single_url, session_id)


def test_a_server_that_is_not_there_is_a_connection_error():
    env = LLMServeEnv.from_url("http://127.0.0.1:9").sync()
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9"):
        env.connect()
    env.close()


def test_a_server_that_goes_away_is_a_connection_error():
    with running() as url:
        env = LLMServeEnv.from_url(url).sync()
        env.reset()
    with pytest.raises(ConnectionError):
        env.step(ServeAction())
    env.close()


# Sessions


def test_connections_have_sessions_of_their_own(server_url, env):
    with LLMServeEnv.from_url(server_url).sync() as other:
        begin(env)
        begin(other, seed=6)
        other.step(ACTIONS[0])
        here, _ = local(ACTIONS[:1])
        assert bare(env.step(ACTIONS[0]).observation) == bare(here[1])
        assert env.state().session_id != other.state().session_id


def test_a_session_can_be_attached_to_and_is_left_open(server_url):
    with httpx.Client(base_url=server_url, timeout=60) as http:
        asked = {"task_id": TASK, "seed": 5, "horizon_s": 20.0}
        session_id = http.post("/reset", json=asked).headers["x-session-id"]
        http.post("/step", json={"session_id": session_id, "action": ACTIONS[0].model_dump(mode="json")})
        with LLMServeEnv.from_url(server_url, session_id=session_id).sync() as env:
            assert env.state().session_id == session_id
            env.step(ACTIONS[1])
        # Dropped and taken up again.
        with LLMServeEnv.from_url(server_url, session_id=session_id).sync() as env:
            env.step_n(ACTIONS[2:])
            assert env.log() == local(ACTIONS)[1]
        state = http.get("/state", headers={"X-Session-Id": session_id}).json()
        assert (state["step_count"], state["done"]) == (4, True)


def test_a_session_of_a_connection_ends_with_it(server_url):
    with LLMServeEnv.from_url(server_url).sync() as env:
        session_id = begin(env).metadata["session_id"]
    assert ends(server_url, session_id)


def test_after_a_break_the_next_call_connects_anew(env):
    begin(env)
    env.disconnect()
    with pytest.raises(ConflictError):
        env.step(ServeAction())  # a new session, whose episode has not begun
    here, _ = local(ACTIONS[:1])
    begin(env)
    assert bare(env.step(ACTIONS[0]).observation) == bare(here[1])


# The player of the tools


def test_tools_answer_alike_here_and_on_a_server(server_url):
    here, there = ServeToolEnv(), ServeToolEnv(server_url)
    assert there.observe() == here.observe()
    config = ServeAction().model_dump(mode="json")
    for env in (here, there):
        env.told = [
            env.reset(task_id=TASK, seed=5, horizon_s=20.0, prompt="unread"),
            env.set_serving_config(**config, windows=2),
            env.set_serving_config(**{**config, "batch_cap": 0}),
            env.observe(),
            env.set_serving_config(**{**config, "quantization_tier": "INT8"}, windows=9),
            env.set_serving_config(**config),
            env.grade(),
            env.list_tasks(),
        ]
    assert there.told == here.told
    assert (there.score, there.done) == (here.score, here.done) == (here.get_reward(), True)


def test_a_row_that_a_server_cannot_play_is_an_input_error(server_url):
    env = ServeToolEnv(server_url)
    for column, value in (("task_id", "no_such_task"), ("seed", -1)):
        with pytest.raises(InputError, match=column):
            env.reset(**{column: value})


def test_a_session_that_is_dropped_ends_its_session(server_url):
    session = RemoteSession(server_url)
    session_id = session.reset(task_id=None, seed=1).metadata["session_id"]
    del session
    assert ends(server_url, session_id)


def test_without_openenv_it_says_what_to_install():
    code = "import sys; sys.modules['openenv'] = None; import llmserve_env.client"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: the client needs OpenEnv 0.10: pip install -e '.[server]'" in done.stderr
