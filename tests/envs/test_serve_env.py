"""LLMServe-v0: what a step gives, how episodes begin and end, exact copies, refusals."""

from __future__ import annotations

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve_env.controls import CONTROLS, to_array
from llmserve_env.envs.serve_env import LLMServeEnv
from llmserve_env.episode import Episode
from llmserve_env.errors import InputError
from llmserve_env.rewards import COMPONENTS
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import EVALUATION_SEEDS, TRAINING_SEEDS, list_tasks, load_task

TASK = "static_workload"


def short(windows: int = 6, task_id: str = TASK, **arguments):
    task = load_task(task_id)
    return LLMServeEnv(task_id, horizon_s=windows * task.window_s, **arguments)


def play(env, actions) -> list:
    """What each step gives, up to the episode's end."""
    given_back = []
    for action in actions:
        observation, *rest = env.step(action)
        given_back.append((observation.tobytes(), *rest))
        if rest[1] or rest[2]:
            break
    return given_back


def samples(env, count: int, seed: int = 0):
    env.action_space.seed(seed)
    return [env.action_space.sample() for _ in range(count)]


@pytest.mark.parametrize("task_id", list_tasks())
def test_an_episode_of_every_task(task_id):
    env = short(5, task_id)
    observation, info = env.reset(seed=3)
    assert observation in env.observation_space
    total = 0.0
    for step, action in enumerate(samples(env, 5)):
        before = info
        observation, reward, terminated, truncated, info = env.step(action)
        assert observation in env.observation_space
        assert {name: type(value) for name, value in info.items()} == {
            name: type(value) for name, value in before.items()
        }
        assert sum(info["reward_components"].values()) == pytest.approx(reward)
        assert tuple(info["reward_components"]) == COMPONENTS
        assert tuple(info["action"]) == CONTROLS
        assert all(isinstance(value, (int, float, str)) for value in info["action"].values())
        assert to_array([ServeAction(**info["action"])]) == env.task.grid.actions(action[None])
        total += reward
        assert info["score"] == pytest.approx(total / env.task.windows)
        assert (terminated, truncated) == (False, step == 4)
    assert info["seed"] == 3


def test_it_plays_what_the_episode_plays():
    env, episode = short(), Episode(load_task(TASK, horizon_s=6.0))
    env.reset(seed=9)
    episode.reset(9)
    for action in samples(env, 6):
        _, reward, _, truncated, info = env.step(action)
        observation = episode.step(ServeAction(**info["action"]))
        assert (reward, truncated) == (observation.reward, observation.done)
        assert info["not_applied"] == observation.metadata["not_applied"]
        assert info["cost"] == observation.metadata["cost"]
    assert env.log() == episode.log()


def test_controls_without_effect_are_named():
    env = short(task_id=TASK, profile="rtx4090-llama-3.1-8b")
    env.reset(seed=0)
    exact = to_array([ServeAction(prefill_decode_split=True)])[0]
    *_, info = env.step(exact)
    assert set(info["not_applied"]) == {"prefill_decode_split"}
    info["not_applied"].clear()
    *_, info = env.step(exact)
    assert set(info["not_applied"]) == {"prefill_decode_split"}


def test_a_record_sets_values_between_those_of_the_grid():
    env = short()
    env.reset(seed=0)
    *_, info = env.step(to_array([ServeAction(batch_cap=77)])[0])
    assert info["action"]["batch_cap"] == 77


def test_action_masks_show_what_the_cell_cannot_apply():
    controls = {**load_task(TASK).controls, "prefill_decode_split": [False, True]}
    wide = load_task(TASK, controls=controls, horizon_s=6.0)
    env = LLMServeEnv(wide)
    env.reset(seed=0)
    masks = dict(
        zip(wide.grid.values, np.split(env.action_masks(), np.cumsum(wide.grid.nvec)[:-1]), strict=True)
    )
    assert masks["prefill_decode_split"].tolist() == [True, False]
    assert masks["batch_cap"].all()
    assert [tier in wide.profile.tier_names for tier in wide.grid.values["quantization_tier"]] == masks[
        "quantization_tier"
    ].tolist()


# Seeds


def test_resets_draw_training_seeds_from_np_random():
    env = short()
    seeds = [env.reset(seed=5)[1]["seed"], *(env.reset()[1]["seed"] for _ in range(3))]
    again = [env.reset(seed=5)[1]["seed"], *(env.reset()[1]["seed"] for _ in range(3))]
    assert seeds == again
    assert seeds[0] == 5
    assert len(set(seeds)) == 4
    assert all(seed in TRAINING_SEEDS for seed in seeds)


def test_an_evaluation_seed_is_played_as_given():
    env = short()
    assert env.reset(seed=EVALUATION_SEEDS[0])[1]["seed"] == EVALUATION_SEEDS[0]


def test_the_same_seed_and_actions_give_the_same_bytes():
    first, second = short(), short()
    actions = samples(first, 6)
    for env in (first, second):
        env.reset(seed=4)
    assert play(first, actions) == play(second, actions)


# Ends


def test_it_terminates_where_the_task_does():
    task = load_task(TASK, horizon_s=30.0, max_in_flight=1)
    env = LLMServeEnv(task)
    env.reset(seed=0)
    steps = play(env, [task.grid.indices(to_array([ServeAction()]))[0]] * 30)
    assert len(steps) < 30
    *_, terminated, truncated, _ = steps[-1]
    assert (terminated, truncated) == (True, False)
    assert env.log().terminated
    with pytest.raises(InputError, match="over: call reset"):
        env.step(np.zeros(7, np.int64))


# Exact copies


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))], ids=["deepcopy", "pickle"]
)
def test_a_copy_in_the_middle_goes_on_alike(copied):
    env = short(8, "bursty_workload")
    actions = samples(env, 8)
    env.reset(seed=2)
    play(env, actions[:3])
    twin = copied(env)
    assert play(env, actions[3:]) == play(twin, actions[3:])
    assert env.log() == twin.log()
    assert env.reset()[1] == twin.reset()[1]


def test_a_snapshot_is_returned_to():
    env, other = short(8), short(8)
    actions = samples(env, 8)
    env.reset(seed=2)
    play(env, actions[:3])
    snapshot = env.snapshot()
    rest, log, following = play(env, actions[3:]), env.log(), env.reset()[1]
    play(env, actions[:2])
    for each in (env, other):
        each.restore(snapshot)
        assert play(each, actions[3:]) == rest
        assert each.log() == log
        assert each.reset()[1] == following


def test_a_snapshot_of_another_task_is_refused():
    env = short(8)
    env.reset(seed=0)
    with pytest.raises(InputError, match="snapshot"):
        short(9).restore(env.snapshot())


# Any action


@settings(max_examples=25)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), task_id=st.sampled_from(list_tasks()))
def test_rewards_and_observations_stay_in_their_bounds(data, seed, task_id):
    env = _short_of(task_id)
    env.reset(seed=seed)
    total = 0.0
    for _ in range(env.task.windows):
        action = np.array([data.draw(st.integers(0, int(count) - 1)) for count in env.task.grid.nvec])
        observation, reward, *_, info = env.step(action)
        assert observation in env.observation_space
        assert np.isfinite(reward)
        assert 0 <= reward <= env.task.windows
        assert info["cost"] >= 0
        total += reward
    assert 0 <= total / env.task.windows <= 1


_ENVS: dict[str, LLMServeEnv] = {}


def _short_of(task_id: str) -> LLMServeEnv:
    return _ENVS.setdefault(task_id, short(4, task_id))


# Refusals


def coded(**codes):
    """A record of the defaults with some codes, whether they are any or not."""
    record = to_array([ServeAction()])[0]
    for name, code in codes.items():
        record[name] = code
    return record


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ([7, 0, 0, 0, 0, 0, 0], r"action\[0\] \(batch_cap\)': expected 0..6, found 7"),
        ([0, -1, 0, 0, 0, 0, 0], r"kv_budget_fraction\)': expected 0..5, found -1"),
        ([0, 0, 0, 0, 0], "expected 7 whole numbers"),
        ([0.0] * 7, "expected 7 whole numbers"),
        (3, "expected 7 whole numbers"),
        ([0] * 6 + [None], "expected 7 whole numbers, found object"),
        ([[0] * 7], r"expected 7 whole numbers, found int64\[1, 7\]"),
        ([[0], [0, 0]], "expected whole numbers"),
        ({"batch_cap": 0}, "expected 7 whole numbers"),
        (coded(batch_cap=0), "batch_cap': expected 1..512"),
        (coded(kv_budget_fraction=np.nan), r"kv_budget_fraction': expected 0.1..1.0"),
        (coded(quantization_tier=3), "quantization_tier': expected 0..2"),
        (coded(admission_rate=1001.0), "admission_rate': expected"),
        (coded(admission_rate=0.0), "admission_rate': expected"),
    ],
)
def test_actions_out_of_range_are_refused_and_change_nothing(action, message):
    env = short()
    env.reset(seed=0)
    before = env.snapshot()
    with pytest.raises(InputError, match=message):
        env.step(action)
    assert env.snapshot() == before


def test_seeds_and_options_of_other_types_are_refused():
    env = short(2)
    assert env.reset(seed=np.int64(5))[1]["seed"] == 5
    for arguments, field in (
        ({"seed": "5"}, "seed"),
        ({"seed": 5.0}, "seed"),
        ({"seed": [5]}, "seed"),
        ({"options": 3}, "options"),
        ({"options": {"seed": 5}}, "seed"),
    ):
        with pytest.raises(InputError) as refused:
            env.reset(**arguments)
        assert refused.value.field == field


def test_steps_outside_an_episode_are_refused():
    env = short(2)
    with pytest.raises(InputError, match="call reset before step"):
        env.step(np.zeros(7, np.int64))
    with pytest.raises(InputError, match="reset"):
        env.action_masks()
    env.reset(seed=0)
    play(env, samples(env, 2))
    with pytest.raises(InputError, match="over: call reset"):
        env.step(np.zeros(7, np.int64))
    env.reset()
    env.step(np.zeros(7, np.int64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task_id": "no_such_task"}, f"expected one of .*{TASK}"),
        ({"task_id": "nowhere.toml"}, "nowhere.toml"),
        ({"render_mode": "human"}, "ansi, rgb_array"),
        ({"horizon_s": 0.5}, "whole number of windows"),
        ({"window_s": 0.0}, "window_s"),
        ({"engines": 0}, "engines"),
        ({"profile": "h9000"}, "h9000"),
        ({"workload": "nothing://"}, "scheme"),
        ({"task_id": load_task(TASK), "horizon_s": 30.0}, "horizon_s"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        LLMServeEnv(**arguments)


@pytest.mark.parametrize(("seed", "options"), [(-1, None), (2**63, None), (None, {"episode_seed": 3})])
def test_bad_seeds_and_options_are_refused(seed, options):
    with pytest.raises(InputError):
        short().reset(seed=seed, options=options)


def test_arguments_change_the_task():
    env = gym.make(
        "LLMServe-v0", task_id=TASK, engines=2, window_s=2.0, horizon_s=8.0, workload="gamma://?rate=3"
    ).unwrapped
    assert (env.task.cell.engines, env.task.windows) == (2, 4)
    env.reset(seed=1)
    assert len(env.batch.backend.engines[0]) == 2
