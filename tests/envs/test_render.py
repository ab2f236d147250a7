"""The dashboard: as text, as an image, as a file."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest

from llmserve_env.controls import CONTROLS
from llmserve_env.envs.render import draw_episode
from llmserve_env.errors import InputError
from llmserve_env.tasks import list_tasks, load_task


def made(render_mode, task_id="static_workload"):
    env = gym.make(
        "LLMServe-v0", task_id=task_id, horizon_s=4 * load_task(task_id).window_s, render_mode=render_mode
    )
    env.action_space.seed(0)
    env.reset(seed=0)
    return env


def test_text_tells_the_last_window():
    env = made("ansi")
    assert "no window has been served yet" in env.render()
    *_, info = env.step(env.action_space.sample())
    text = env.render()
    assert "window 1/4" in text
    assert f"score so far {info['score']:.3f}" in text
    for name in CONTROLS:
        assert name in text
    assert max(len(line) for line in text.splitlines()) < 200


@pytest.mark.parametrize("task_id", list_tasks())
def test_image_changes_with_the_episode(task_id):
    env = made("rgb_array", task_id)
    frames = [env.render()]
    for _ in range(4):
        env.step(env.action_space.sample())
        frames.append(env.render())
    for frame in frames:
        assert (frame.dtype, frame.shape) == (np.uint8, frames[0].shape)
        assert frame.shape[2] == 3
    assert len({frame.tobytes() for frame in frames}) == len(frames)


def test_frames_make_a_list():
    env = made("rgb_array_list")
    env.step(env.action_space.sample())
    assert len(env.render()) == 2


def test_an_episode_becomes_a_file(tmp_path):
    env = made(None).unwrapped
    for _ in range(4):
        env.step(env.action_space.sample())
    recording = env.recording
    path = tmp_path / "episode.png"
    draw_episode(path, env.task, recording.windows, recording.actions, recording.components)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="png, svg, pdf"):
        draw_episode(tmp_path / "x.txt", env.task, recording.windows, recording.actions, recording.components)


def test_without_a_mode_it_says_how_to_get_one():
    with pytest.warns(UserWarning, match="render_mode"):
        assert made(None).unwrapped.render() is None
