"""The policies that come with the package are found, and what is wrong with their files is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llmserve_env.agents import AGENTS, TRAINED, Shield, lacks_weights, load_agent, play, trained
from llmserve_env.agents.find import find_agent, policy_folder
from llmserve_env.agents.policy import CONFIG, WEIGHTS, Policy, save_policy
from llmserve_env.errors import InputError
from llmserve_env.tasks import load_task

TASK = load_task("static_workload", horizon_s=20.0)
OTHER = load_task("bursty_workload", horizon_s=100.0)


@pytest.fixture(params=["weights", "llmserve_env/weights"], ids=["checkout", "installed"])
def root(request, tmp_path: Path, monkeypatch, random_policy) -> Path:
    """Weights of static_workload: ppo-1, ppo-2 and bc; of bursty_workload: ppo-2."""
    monkeypatch.setattr(trained, "_PACKAGE", tmp_path / "llmserve_env")
    folder = tmp_path / request.param
    for place, (task, name) in enumerate([(TASK, "ppo-1"), (TASK, "ppo-2"), (TASK, "bc"), (OTHER, "ppo-2")]):
        save_policy(folder / task.id / name, random_policy(task, place))
    (folder / "README.md").write_text("no task")
    return folder


def test_every_name_plays_the_policy_of_its_folder(root):
    for name, folder in [("ppo", "ppo-1"), ("ppo-1", "ppo-1"), ("ppo-2", "ppo-2"), ("bc", "bc")]:
        agent = load_agent(name, TASK)
        assert agent.name == name
        expected = find_agent(str(root / TASK.id / folder), TASK)
        np.testing.assert_array_equal(
            agent.policy.weights["heads.bias"], expected.policy.weights["heads.bias"]
        )
        assert policy_folder(f"shielded:{name}", TASK) == root / TASK.id / folder
        assert find_agent(name, TASK).name == name
    shield = load_agent("shielded:ppo", TASK)
    assert isinstance(shield, Shield)
    assert shield.name == "shielded:ppo"
    assert play(shield, TASK, [1, 2]).scores.shape == (2,)


def test_a_name_says_which_tasks_there_are_weights_for(root):
    assert [
        name for name in (*AGENTS, *TRAINED, "shielded:bc", "nobody") if lacks_weights(name, OTHER.id)
    ] == [
        "ppo-1",
        "ppo-3",
        "bc",
        "ppo",
        "shielded:bc",
    ]
    for name in ("bc", "shielded:ppo"):
        with pytest.raises(InputError, match=f"'bursty_workload'.*{root}.* static_workload$") as caught:
            find_agent(name, OTHER)
        assert caught.value.field == "agent"
    with pytest.raises(InputError, match="no task"):
        load_agent("ppo-3", TASK)
    with pytest.raises(InputError, match=r"ppo-1, ppo-2, ppo-3, bc, ppo.*found 'ppo-4'"):
        load_agent("ppo-4", TASK)


def half(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def rewritten(change):
    def write(path):
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return write


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        (WEIGHTS, Path.unlink, "cannot be read: No such file"),
        (CONFIG, Path.unlink, "cannot be read: No such file"),
        (WEIGHTS, lambda path: path.write_bytes(b""), "damaged or no safetensors"),
        (CONFIG, lambda path: path.write_bytes(b""), "Invalid JSON"),
        (WEIGHTS, half, "damaged or no safetensors"),
        (CONFIG, half, "Invalid JSON"),
        (
            CONFIG,
            rewritten(lambda config: config["features"].__setitem__(0, "mood")),
            "no such features: mood",
        ),
        (
            CONFIG,
            rewritten(lambda config: config["controls"].update(turbo=[1, 2])),
            "no such controls: turbo",
        ),
        (CONFIG, rewritten(lambda config: config.update(task_id=OTHER.id)), "expected 'static_workload'"),
        (
            CONFIG,
            rewritten(lambda config: config["controls"]["batch_cap"].reverse()),
            "expected a task with the values",
        ),
    ],
)
def test_what_is_wrong_with_the_files_is_said(root, name, damage, told):
    damage(root / TASK.id / "ppo-1" / name)
    with pytest.raises(InputError, match=told) as caught:
        load_agent("ppo", TASK)
    assert caught.value.file == str(root / TASK.id / "ppo-1" / name)
    load_agent("ppo-2", TASK)


def test_weights_of_another_task_are_told_apart(root, random_policy):
    folder = root / TASK.id / "ppo-1"
    policy = random_policy(OTHER)
    save_policy(folder, Policy(policy.config.model_copy(update={"task_id": TASK.id}), policy.weights))
    with pytest.raises(InputError, match="expected a task with the values") as caught:
        load_agent("ppo", TASK)
    assert caught.value.file == str(folder / CONFIG)
    assert caught.value.field.startswith("controls.")


def test_without_weights_nothing_is_lost_but_the_policies(ship):
    ship()
    assert all(lacks_weights(name, TASK.id) for name in TRAINED)
    with pytest.raises(InputError, match="weights for no task"):
        load_agent("ppo", TASK)
    assert load_agent("reactive", TASK).name == "reactive"
