"""Task, seed and actions fix an episode bit for bit, whoever plays it."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest

from llmserve_env.envs.serve_env import LLMServeEnv
from llmserve_env.episode import EpisodeBatch
from llmserve_env.recording import record_digests
from llmserve_env.tasks import list_tasks

from .episodes import anything, played, short, sticky, uniform

WINDOWS = 10
SEED = 2**31 + 5
OTHERS = 6


def chosen(task):
    """The actions of the episode that is compared: of the grid, then of no grid."""
    rng = np.random.default_rng(12)
    half = WINDOWS // 2
    return np.concatenate([sticky(task, rng, half), anything(rng, WINDOWS - half)])


def log_of(task_id):
    """The log as Episode gives it."""
    task = short(task_id, WINDOWS)
    return played(task, SEED, chosen(task)).log()


def logs_as_json():
    return [log_of(task_id).model_dump_json() for task_id in list_tasks()]


def records(batch, row, actions, seeds):
    """(digests, rewards, score) of one row of a batch in which others play something else."""
    rng = np.random.default_rng(99)
    batch.reset(seeds)
    windows, rewards = [], []
    for action in actions:
        together = uniform(batch.task, rng, batch.num_episodes)
        together[row] = action
        rewards.append(float(batch.step(together).rewards[row]))
        windows.append(batch.windows[row].copy())
    return record_digests(windows, batch.task), rewards, float(batch.scores[row])


@pytest.mark.parametrize("task_id", list_tasks())
def test_an_environment_leaves_the_log_of_an_episode(task_id):
    env = LLMServeEnv(short(task_id, WINDOWS))
    env.reset(seed=SEED)
    for action in chosen(env.task):
        env.step(action)
    assert env.log() == log_of(task_id)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("row", [None, 0, 3, OTHERS])
@pytest.mark.parametrize("task_id", list_tasks())
def test_a_batch_plays_each_episode_as_if_alone(task_id, row, threads):
    task, log = short(task_id, WINDOWS), log_of(task_id)
    count = 1 if row is None else OTHERS + 1
    row = row or 0
    seeds = [1000 + k for k in range(count)]
    seeds[row] = SEED
    batch = EpisodeBatch(task, count, threads=threads)
    assert records(batch, row, chosen(task), seeds) == (log.digests, log.rewards, log.score)
    # again in rooms that another episode has used
    batch.reset([5] * count)
    batch.step(uniform(task, np.random.default_rng(0), count))
    assert records(batch, row, chosen(task), seeds) == (log.digests, log.rewards, log.score)


def test_another_process_leaves_the_same_logs():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(logs_as_json) == logs_as_json()


@pytest.mark.parametrize("task_id", list_tasks())
def test_a_restored_batch_goes_on_to_the_same_log(task_id):
    task, log = short(task_id, WINDOWS), log_of(task_id)
    actions, half = chosen(task), WINDOWS // 2
    batch, other = EpisodeBatch(task, 2), EpisodeBatch(task, 2)
    batch.reset([SEED, 7])
    windows = []

    def serve(batch, part):
        for action in part:
            batch.step(np.repeat(np.array([action]), 2))
            windows.append(batch.windows[0].copy())

    serve(batch, actions[:half])
    snapshot = batch.snapshot()
    for each in (batch, other):
        del windows[half:]
        each.reset([1, 1])  # something else in between
        each.step(np.repeat(actions[:1], 2))
        each.restore(snapshot)
        serve(each, actions[half:])
        assert record_digests(windows, task) == log.digests
        assert each.scores[0] == log.score


@pytest.mark.parametrize("task_id", list_tasks())
def test_a_restored_environment_leaves_the_same_log(task_id):
    env = LLMServeEnv(short(task_id, WINDOWS))
    env.reset(seed=SEED)
    actions = chosen(env.task)
    for action in actions[:4]:
        env.step(action)
    snapshot = env.snapshot()
    env.reset(seed=1)
    env.step(actions[0])
    env.restore(snapshot)
    for action in actions[4:]:
        env.step(action)
    assert env.log() == log_of(task_id)


def test_episodes_that_are_skipped_or_reset_apart_leave_the_same_log():
    """Rows that start later, or wait, play as if alone."""
    task, log = short("bursty_workload", WINDOWS), log_of("bursty_workload")
    actions, rng = chosen(task), np.random.default_rng(3)
    batch = EpisodeBatch(task, 3)
    batch.reset([1, 2, 3])
    for _ in range(3):
        batch.step(uniform(task, rng, 3))
    mine = np.array([False, True, False])
    batch.reset([0, SEED, 0], mine)
    windows, played_so_far = [], 0
    while played_so_far < WINDOWS:
        together = uniform(task, rng, 3)
        together[1] = actions[played_so_far]
        serve = rng.random() < 0.5
        which = np.array([not batch.over[0], serve, False])
        if not which.any():
            continue
        batch.step(together, which)
        if serve:
            windows.append(batch.windows[1].copy())
            played_so_far += 1
    assert record_digests(windows, task) == log.digests
    assert batch.scores[1] == log.score
    assert batch.steps.tolist()[1:] == [WINDOWS, 3]
