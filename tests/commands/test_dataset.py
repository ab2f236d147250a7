"""`llmserve dataset`: what is recorded can be read, played again, and is of training seeds only."""

from __future__ import annotations

import json
import sys

import minari
import numpy as np
import pytest

from llmserve_env.agents import load_agent, play
from llmserve_env.cli import main
from llmserve_env.commands.dataset import OnGrid
from llmserve_env.controls import ACTION, to_array
from llmserve_env.rewards import COMPONENTS
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import EVALUATION_SEEDS, load_task
from tests.live.pilot.test_decision_log import steer
from tests.of_every_task import FEATURES

TASK = "bursty_workload"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    out = tmp_path_factory.mktemp("datasets")
    asked = ["--task", TASK, "--agent", "best-constant", "--episodes", "3", "--first-seed", "7"]
    assert main(["dataset", *asked, "--out", str(out)]) == 0
    return minari.MinariDataset(out / "llmserve" / TASK / "best-constant-v0" / "data")


def test_agents_play_the_nearest_of_the_grid():
    task = load_task(TASK)
    player = OnGrid(load_agent("best-constant", task))  # a batch cap of 216, which is none of the grid
    player.reset(task, [1, 2])
    actions = player.act(np.zeros((2, len(FEATURES)), np.float32), np.zeros(2))
    assert actions.dtype == ACTION
    assert actions["batch_cap"].tolist() == [256, 256]
    assert (task.grid.indices(actions) == player.indices[0]).all()


def test_episodes_play_again_in_the_environment(recorded):
    env = recorded.recover_environment()
    seeds = [int(each["seed"]) for each in recorded.storage.get_episode_metadata(range(3))]
    assert seeds == [7, 8, 9]
    for seed, episode in zip(seeds, recorded, strict=True):
        observation, _ = env.reset(seed=seed)
        np.testing.assert_array_equal(episode.observations[0], observation)
        assert len(episode.observations) == len(episode.actions) + 1 == len(episode.infos["cost"])
        for t, action in enumerate(episode.actions):
            observation, reward, terminated, truncated, info = env.step(action)
            np.testing.assert_array_equal(episode.observations[t + 1], observation)
            assert episode.rewards[t] == reward
            assert (episode.terminations[t], episode.truncations[t]) == (terminated, truncated)
            parts = [info["reward_components"][name] for name in COMPONENTS]
            np.testing.assert_array_equal(episode.infos["components"][t + 1], parts)
        assert truncated
    task = load_task(TASK)
    player = OnGrid(load_agent("best-constant", task))
    scores = play(player, task, seeds).scores
    assert [episode.rewards.mean() for episode in recorded] == pytest.approx(scores)


def test_metadata_say_what_it_is(recorded):
    metadata = recorded.storage.metadata
    said = metadata["llmserve"]
    assert (said["task_id"], said["agent"], said["seeds"]) == (TASK, "best-constant", [7, 9])
    assert [feature["name"] for feature in said["features"]] == [feature.name for feature in FEATURES]
    assert said["controls"]["quantization_tier"] == ["FP16", "INT8", "INT4"]
    assert metadata["total_episodes"] == 3
    start = recorded[0].observations[0][[feature.name for feature in FEATURES].index("set_batch_cap")]
    assert start == pytest.approx(to_array([load_task(TASK).start])["batch_cap"][0] / 512)


def test_what_is_there_stays(recorded, capsys):
    out = recorded.storage.data_path.parents[3]
    asked = ["dataset", "--task", TASK, "--agent", "best-constant", "--episodes", "1", "--out", str(out)]
    assert main(asked) == 2
    assert "is there already" in capsys.readouterr().err


def test_an_interrupted_recording_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("llmserve_env.commands.dataset.record", stop)
    assert main(["dataset", "--task", TASK, "--out", str(tmp_path)]) == 130
    assert [path for path in tmp_path.rglob("*") if not path.is_dir() or path.name.endswith(".tmp")] == []


@pytest.fixture
def logs(tmp_path):
    """A service steered twice, its log torn at its end."""
    steer(tmp_path / "a", 6, stale=[3])
    steer(tmp_path / "b", 3)
    (tmp_path / "b").write_bytes((tmp_path / "b").read_bytes()[:-9])
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_decision_logs_become_episodes(tmp_path, logs, capsys):
    assert main(["dataset", "--decisions", *logs, "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "left out, it was not written to its end" in captured.err
    assert "wrote 3 episodes" in captured.out
    found = minari.MinariDataset(tmp_path / "llmserve" / TASK / "scripted-live-v0" / "data")
    task = load_task(TASK)
    assert [each.rewards.tolist() for each in found] == [[0, 1], [4, 5], [0, 1]]
    for episode in found:
        assert len(episode.observations) == len(episode.actions) + 1 == len(episode.infos["by"])
        assert episode.truncations.tolist() == [False, True]
        assert not episode.terminations.any()
    first = found[0]
    caps = [ServeAction(batch_cap=cap) for cap in (8, 16)]
    np.testing.assert_array_equal(first.actions, task.grid.indices(to_array(caps)))
    assert first.infos["applied"][1:, 0].tolist() == [8, 16]
    assert first.infos["by"].tolist() == [0, 0, 0]
    names = [feature.name for feature in FEATURES]
    assert first.observations[:, names.index("set_batch_cap")] == pytest.approx([64 / 512, 8 / 512, 16 / 512])
    said = found.storage.metadata["llmserve"]
    assert (said["agent"], said["task_id"], len(said["runs"])) == ("scripted", TASK, 2)


def test_logs_that_make_no_dataset_are_refused(tmp_path, logs, capsys):
    text = (tmp_path / "a").read_text()
    run = json.loads(text.splitlines()[0])["run"]
    other = text.replace(run, "other").replace('"max_in_flight":null', '"max_in_flight":9000')
    (tmp_path / "c").write_text(other)
    steer(tmp_path / "d", 0)
    steer(tmp_path / "d", 1, stale=[0])
    for asked, told in [
        (["--decisions", logs[0], str(tmp_path / "c")], "expected logs of one task"),
        (["--decisions", str(tmp_path / "d")], "no window whose outcome is known"),
        (["--decisions", logs[0], "--task", TASK], "a log says all"),
        ([], "expected --task, or --decisions"),
    ]:
        assert main(["dataset", *asked, "--out", str(tmp_path / "out")]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--task", TASK, "--first-seed", str(EVALUATION_SEEDS.start)], "expected seeds of training"),
        (["--task", TASK, "--first-seed", str(EVALUATION_SEEDS.start - 1)], "expected seeds of training"),
        (["--task", TASK, "--first-seed", "-1"], "expected seeds of training"),
        (["--task", TASK, "--episodes", "0"], "field 'episodes': expected 1 or more"),
        (["--task", "nonesuch"], "nonesuch"),
        (["--task", TASK, "--agent", "nonesuch"], "nonesuch"),
    ],
)
def test_what_cannot_be_recorded_is_refused(tmp_path, capsys, asked, told):
    assert main(["dataset", *asked, "--out", str(tmp_path)]) == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_minari_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    monkeypatch.setitem(sys.modules, "minari", None)
    assert main(["dataset", "--task", TASK, "--out", str(tmp_path)]) == 2
    assert "pip install 'minari[hdf5]'" in capsys.readouterr().err
