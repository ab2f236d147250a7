"""Fronts and hypervolumes of points that can be drawn by hand, and the command from policy to picture."""

from __future__ import annotations

import json

import numpy as np
import pytest
from matplotlib.image import imread

import llmserve_env
from evaluate.experiments import pareto
from evaluate.experiments.pareto import Arguments, bootstrap, front, hypervolume, lattice, main
from llmserve_env.agents import load_agent, play
from llmserve_env.agents.policy import Policy, PolicyConfig, save_policy, shapes, weight_features
from llmserve_env.errors import InputError
from llmserve_env.objectives import OBJECTIVES, Objectives
from llmserve_env.tasks import EVALUATION_SEEDS, load_task
from tests.of_every_task import FEATURES

TASK = "death_spiral"


@pytest.fixture
def policy(tmp_path):
    """The folder of a policy that takes preferences."""
    task = load_task(TASK)
    config = PolicyConfig(
        package_version=llmserve_env.__version__,
        task_id=TASK,
        features=[feature.name for feature in FEATURES] + weight_features(OBJECTIVES),
        controls={name: list(values) for name, values in task.grid.values.items()},
        frames=1,
        hidden=8,
        recurrent=False,
        objectives=list(OBJECTIVES),
    )
    rng = np.random.default_rng(1)
    weights = {name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes(config).items()}
    weights["std"][:] = 0.2
    save_policy(tmp_path / "mo", Policy(config, weights))
    return tmp_path / "mo"


def test_a_front_by_hand():
    points = np.array([[0.5, 0.5], [0.2, 0.8], [0.2, 0.7], [0.8, 0.1], [0.5, 0.5], [0.5, 0.4]])
    assert front(points).tolist() == [True, True, False, True, False, False]


def test_hypervolumes_by_hand():
    assert hypervolume(np.array([[0.5, 0.5, 0.5, 0.5]])) == pytest.approx(1 / 16)
    # Two boxes less what they share; a dominated point adds nothing.
    points = np.array([[0.5, 1, 1, 1], [1, 0.25, 1, 1], [0.4, 0.2, 1, 1]])
    assert hypervolume(points) == pytest.approx(0.5 + 0.25 - 0.5 * 0.25)
    assert hypervolume(np.ones((1, 4))) == 1.0


def test_a_lattice_holds_every_mixture_once():
    found = lattice(4)
    assert len(np.unique(found, axis=0)) == len(found) == 35
    assert (found.sum(axis=1) == 1).all()
    assert set(found.ravel()) == {0, 0.25, 0.5, 0.75, 1}
    np.testing.assert_array_equal(lattice(1), np.eye(4))
    with pytest.raises(InputError):
        lattice(0)


def test_resamples_draw_the_same_seeds_for_all():
    """Point by point a tenth more: however noisy the seeds are, the one volume is larger by that."""
    rng = np.random.default_rng(0)
    low = rng.uniform(0.2, 0.8, (3, 20, 1)) * np.ones(4)
    high = low * 1.1
    one, other, more = bootstrap([high, low], 200)
    assert one.estimate == pytest.approx(hypervolume(high.mean(axis=1)))
    assert one.low < one.estimate < one.high
    for end in ("low", "estimate", "high"):
        assert getattr(more, end) == pytest.approx(getattr(other, end) * (1.1**4 - 1))
    assert one == bootstrap([high, low], 200)[0]


@pytest.fixture
def short(monkeypatch):
    """A short task, also in the module."""
    task = load_task(TASK, horizon_s=20 * load_task(TASK).window_s)
    monkeypatch.setattr(pareto, "load_task", lambda task_id: task)
    return task


def test_from_a_policy_to_tables_and_a_picture(tmp_path, policy, short, capsys):
    out = tmp_path / "out"
    main(Arguments(policy, TASK, divisions=2, constants=6, episodes=3, resamples=50, jobs=1, out=out,
                   first_seed=100, other_seeds=True))  # fmt: skip
    table = json.loads((out / "pareto.json").read_text())
    kinds = [point["kind"] for point in table["points"]]
    assert {kind: kinds.count(kind) for kind in kinds} == {"policy": 10, "constants": 6, "agents": 3}
    (reactive,) = [point for point in table["points"] if point["label"] == "reactive"]
    scores = play(load_agent("reactive", short), short, range(100, 103)).scores
    assert np.dot(reactive["means"], Objectives(short).weights) == pytest.approx(scores.mean(), rel=1e-12)
    played = np.array([point["means"] for point in table["points"] if point["kind"] == "policy"])
    assert len(np.unique(played, axis=0)) > 1
    assert table["hypervolume"]["policy"]["estimate"] == pytest.approx(hypervolume(played))
    text = (out / "pareto.md").read_text()
    assert text in capsys.readouterr().out
    assert "no results to report" in text
    assert table["seeds_of"] == "other"
    assert imread(out / "pareto.png").std() > 0


def test_it_does_not_depend_on_the_processes(policy):
    arguments = Arguments(policy, TASK, constants=1, agents=("defaults",))
    points = pareto.make_points(arguments, load_task(TASK))[-2:]
    alone, together = (
        pareto.play_points(Arguments(policy, TASK, jobs=jobs), points, [1, 2]) for jobs in (1, 2)
    )
    np.testing.assert_array_equal(alone, together)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"agents": ("nobody",)}, "agent"),
        ({"constants": 0}, "constants"),
        ({"task": "static_workload"}, "controls.batch_cap"),
        ({"first_seed": 5}, "first_seed"),
        ({"first_seed": EVALUATION_SEEDS.start, "other_seeds": True}, "other_seeds"),
        ({"resamples": 1}, "resamples"),
    ],
)
def test_what_cannot_be_played_is_refused(policy, changes, field):
    with pytest.raises(InputError) as caught:
        main(Arguments(**{"policy": policy, "task": TASK, **changes}))
    assert caught.value.field == field


def test_a_policy_without_preferences_is_refused(tmp_path, policy):
    config = json.loads((policy / "policy.json").read_text())
    plain = PolicyConfig(**{**config, "objectives": [], "features": config["features"][:-4]})
    weights = {name: np.zeros(shape, np.float32) for name, shape in shapes(plain).items()}
    save_policy(tmp_path / "plain", Policy(plain, weights))
    with pytest.raises(InputError, match=r"train\.mo_ppo"):
        main(Arguments(tmp_path / "plain", TASK))
