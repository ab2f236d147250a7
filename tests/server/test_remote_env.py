"""LLMServeRemote-v0 against a real server: what LLMServe-v0 gives, bit for bit."""

from __future__ import annotations

import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import SyncVectorEnv

import llmserve_env  # noqa: F401 - registers the ids
from llmserve_env.controls import to_array
from llmserve_env.envs.remote_env import LLMServeRemoteEnv
from llmserve_env.envs.serve_env import LLMServeEnv
from llmserve_env.errors import InputError
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import TRAINING_SEEDS, list_tasks, load_task
from tests.of_every_task import CONTROLS
from tests.server.conftest import ends


@pytest.fixture
def pair(server_url):
    """One environment that plays here and one that plays there, of the same episodes of six windows."""
    opened = []

    def open_pair(task_id: str = "static_workload", windows: int = 6, **changes):
        horizon_s = windows * load_task(task_id).window_s
        here = LLMServeEnv(task_id, horizon_s=horizon_s, **changes)
        there = LLMServeRemoteEnv(server_url, task_id, horizon_s=horizon_s, **changes)
        opened.append(there)
        return here, there

    yield open_pair
    for each in opened:
        each.close()


def assert_same(here, there) -> None:
    """Both gave the same for a step or a reset, types included."""
    (observation, *rest), (remote, *remote_rest) = here, there
    assert observation.dtype == remote.dtype == np.float32
    assert observation.tobytes() == remote.tobytes()
    assert rest == remote_rest
    assert [type(each) for each in rest] == [type(each) for each in remote_rest]
    assert list(rest[-1]) == list(remote_rest[-1])
    for name, value in rest[-1].items():
        assert type(value) is type(remote_rest[-1][name]), name


@pytest.mark.parametrize("task_id", list_tasks())
def test_episodes_are_the_same_bit_for_bit(pair, task_id):
    here, there = pair(task_id)
    assert there.observation_space == here.observation_space
    assert there.action_space == here.action_space
    here.action_space.seed(0)
    for seed in (3, 2**31):
        assert_same(here.reset(seed=seed), there.reset(seed=seed))
        assert there.action_masks().tolist() == here.action_masks().tolist()
        over = False
        while not over:
            action = here.action_space.sample()
            given = here.step(action)
            assert_same(given, there.step(action))
            over = given[2] or given[3]
        assert there.log() == here.log()
        assert there.grade().score == pytest.approx(here.log().score)


def test_episodes_with_another_workload_are_the_same(pair):
    here, there = pair("bursty_workload", 3, workload="poisson://?rate=20")
    assert_same(here.reset(seed=1), there.reset(seed=1))
    assert_same(here.step([0] * len(CONTROLS)), there.step([0] * len(CONTROLS)))


def test_records_set_values_between_those_of_the_grid(pair):
    here, there = pair()
    here.reset(seed=1)
    there.reset(seed=1)
    record = to_array([ServeAction(batch_cap=77, prefill_decode_split=True)])[0]
    given = there.step(record)
    assert_same(here.step(record), given)
    assert set(given[-1]["not_applied"]) == {"prefill_decode_split"}
    assert given[-1]["action"]["batch_cap"] == 77


def test_seeds_are_drawn_as_here(pair):
    here, there = pair()
    for seed in (11, None, None):
        assert_same(here.reset(seed=seed), there.reset(seed=seed))
    drawn = there.reset()[1]["seed"]
    assert drawn in TRAINING_SEEDS


def test_gymnasiums_checker_has_nothing_to_say(server_url):
    env = gym.make("LLMServeRemote-v0", url=server_url, horizon_s=4.0, disable_env_checker=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
    env.close()


def test_several_at_once_play_what_they_play_here(server_url):
    def made(env_id: str, **options):
        return [lambda: gym.make(env_id, task_id="static_workload", horizon_s=4.0, **options)] * 3

    here = SyncVectorEnv(made("LLMServe-v0"))
    there = SyncVectorEnv(made("LLMServeRemote-v0", url=server_url))
    here.action_space.seed(0)
    observations, _ = here.reset(seed=[1, 2, 3])
    remote, _ = there.reset(seed=[1, 2, 3])
    assert observations.tobytes() == remote.tobytes()
    for _ in range(10):  # over the ends of episodes, which reset by themselves
        action = here.action_space.sample()
        given, found = here.step(action), there.step(action)
        assert given[0].tobytes() == found[0].tobytes()
        for ours, theirs in zip(given[1:4], found[1:4], strict=True):
            assert ours.tolist() == theirs.tolist()
    there.close()


def test_a_loop_that_was_written_for_the_one_learns_on_the_other(server_url):
    """A cross-entropy search over constants, as it would be written for any environment."""

    def improve(env) -> list[float]:
        counts = env.action_space.nvec
        weights = [np.ones(count) for count in counts]
        generator, best = np.random.default_rng(0), []
        for generation in range(3):
            played = []
            for _ in range(4):
                action = np.array([generator.choice(len(w), p=w / w.sum()) for w in weights])
                env.reset(seed=generation)
                over, score = False, 0.0
                while not over:
                    _, reward, terminated, truncated, _ = env.step(action)
                    score, over = score + reward, terminated or truncated
                played.append((score, action))
            score, action = max(played, key=lambda each: each[0])
            for w, index in zip(weights, action, strict=True):
                w[index] += 1
            best.append(score)
        env.close()
        return best

    options = {"task_id": "static_workload", "horizon_s": 5.0}
    there = improve(gym.make("LLMServeRemote-v0", url=server_url, **options))
    assert there == improve(gym.make("LLMServe-v0", **options))
    assert max(there) > 0


# Refusals


def test_refusals_are_those_of_the_local_one(pair):
    here, there = pair(windows=1)
    for call in (
        lambda env: env.step(np.zeros(len(CONTROLS), int)),
        lambda env: env.action_masks(),
        lambda env: env.reset(seed=-1),
        lambda env: env.reset(options={"x": 1}),
        lambda env: env.reset(seed=1) and env.step(np.full(6, 99)),
        lambda env: env.step(np.zeros(len(CONTROLS))),
    ):
        with pytest.raises(InputError) as ours:
            call(here)
        with pytest.raises(InputError) as theirs:
            call(there)
        assert theirs.value.field == ours.value.field
    there.step(np.zeros(len(CONTROLS), int))
    with pytest.raises(InputError, match=r"over.*reset"):
        there.step(np.zeros(len(CONTROLS), int))
    assert there.reset(seed=2)[1]["seed"] == 2


def test_an_unknown_task_and_a_bad_workload_are_named(server_url):
    with pytest.raises(InputError, match=r"bursty_workload.*no_such_task") as refused:
        LLMServeRemoteEnv(server_url, "no_such_task")
    assert refused.value.field == "task_id"
    env = LLMServeRemoteEnv(server_url, workload="trace:///etc/passwd")
    with pytest.raises(InputError) as refused:
        env.reset(seed=1)
    assert refused.value.field == "workload"
    with pytest.raises(InputError):
        env.step(np.zeros(len(CONTROLS), int))
    env.close()


def test_a_server_that_is_not_there_is_a_connection_error():
    with pytest.raises(ConnectionError):
        LLMServeRemoteEnv("http://127.0.0.1:9")


def test_after_a_break_a_reset_connects_anew(pair):
    here, there = pair()
    here.reset(seed=4)
    there.reset(seed=4)
    there._client.disconnect()
    with pytest.raises(InputError, match="reset"):
        there.step(np.zeros(len(CONTROLS), int))  # of a new session, where no episode has begun
    assert_same(here.reset(seed=4), there.reset(seed=4))
    assert_same(here.step(np.zeros(len(CONTROLS), int)), there.step(np.zeros(len(CONTROLS), int)))


def test_closing_ends_the_session_and_twice_is_no_fault(server_url):
    env = LLMServeRemoteEnv(server_url)
    env.reset(seed=1)
    session_id = env._client.state().session_id
    env.close()
    env.close()
    assert ends(server_url, session_id)


def test_a_program_that_closes_nothing_ends_quietly_and_so_do_its_sessions(server_url):
    code = (
        "import gymnasium as gym, llmserve_env\n"
        f"envs = [gym.make('LLMServeRemote-v0', url='{server_url}') for _ in range(2)]\n"
        "for env in envs:\n"
        "    env.reset(seed=1)\n"
        "    print(env.unwrapped._client.state().session_id)\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    sessions = done.stdout.split()
    assert len(sessions) == 2
    assert all(ends(server_url, session_id) for session_id in sessions)
