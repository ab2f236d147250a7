"""What is shipped of a finished run: its weights as they are, and a card that says how to make them again."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import tyro

from evaluate.experiments.showdown_report import clairvoyant_scores
from evaluate.jobs import Setting
from evaluate.scores import Scores, policy_digest, scores_path
from llmserve_env.agents.policy import CONFIG, WEIGHTS, load_policy, save_policy
from llmserve_env.errors import InputError
from llmserve_env.report.stats import interval
from llmserve_env.rewards import COMPONENTS
from llmserve_env.tasks import TRAINING_SEEDS
from train import bc, ppo, release

TASK = "bursty_workload"
FEW = range(TRAINING_SEEDS.stop - 2, TRAINING_SEEDS.stop)
BRIEF = {"task_id": TASK, "steps": 80, "envs": 4, "rollout": 10, "validations": 1, "hidden": 8, "epochs": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A clone, a policy that was trained from it, and one with two frames, all of them short runs."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for module in (ppo, bc):
            patch.setattr(module, "VALIDATION", FEW)
        bc.clone(bc.Arguments("defaults", TASK, folder / "clone", rounds=1, episodes=2, epochs=1, hidden=8))
        ppo.train(ppo.Arguments(out=folder / "from-clone", seed=1, init=folder / "clone", **BRIEF))
        ppo.train(ppo.Arguments(out=folder / "plain", seed=2, frames=2, learning_rate=1e-5, **BRIEF))
    return folder


@pytest.fixture
def weights(runs, tmp_path) -> Path:
    """The three as they are shipped, not measured."""
    shipped = tmp_path / "weights"
    order = ("clone", "from-clone", "plain")
    release.main(
        release.Arguments(tuple(runs / name for name in order), tmp_path / "none", "abc123", shipped)
    )
    return shipped


def given(card: Path) -> list[str]:
    """Words of the first command in a card, without `python`."""
    return shlex.split(re.findall(r"^```\n(.*)\n```$", card.read_text(), re.M)[0])[1:]


def files(weights: Path) -> dict[str, bytes]:
    return {str(path.relative_to(weights)): path.read_bytes() for path in weights.glob("*/*/policy.*")}


def test_weights_are_shipped_as_they_are_and_name_no_place_of_the_run(runs, weights):
    for run, name in (("clone", "bc"), ("from-clone", "ppo-1"), ("plain", "ppo-2")):
        shipped = weights / TASK / name
        assert {path.name for path in shipped.iterdir()} == {CONFIG, WEIGHTS, release.CARD}
        assert (shipped / WEIGHTS).read_bytes() == (runs / run / WEIGHTS).read_bytes()
        before, after = (load_policy(folder).config for folder in (runs / run, shipped))
        assert after.model_copy(update={"training": before.training}) == before
        assert after.training["commit"] == "abc123"
        assert after.training["run"] == before.training["run"]
        assert str(runs) not in (shipped / CONFIG).read_text() + (shipped / release.CARD).read_text()


def test_the_command_in_a_card_is_that_of_the_run(runs, weights):
    for run, name, trainer in (("clone", "bc", bc), ("from-clone", "ppo-1", ppo), ("plain", "ppo-2", ppo)):
        module, *flags = given(weights / TASK / name / release.CARD)[1:]
        assert module == trainer.__name__
        parsed = tyro.cli(trainer.Arguments, args=flags)
        made = load_policy(runs / run).config.training["arguments"]
        for field, value in vars(parsed).items():
            if field == "out":
                assert value == Path("out") / TASK / name
            elif field == "init" and made[field]:
                assert value == Path("weights") / TASK / "bc"
            else:
                assert value == made[field], field
    assert "--gamma" not in given(weights / TASK / "ppo-2" / release.CARD)  # as it is by default


def test_cards_say_what_is_known(weights):
    card = (weights / TASK / "ppo-1" / release.CARD).read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "- reinforcement-learning\n" in card
    assert "`ppo-1` has not been measured on evaluation seeds yet." in card
    assert "| commit | abc123 |" in card
    assert "| windows played | 80, kept as it was after " in card
    assert 'load_agent("ppo-1", task)' in card
    clone = (weights / TASK / "bc" / release.CARD).read_text()
    assert "| teacher | `defaults`, which scores 0." in clone
    index = (weights / release.CARD).read_text()
    assert re.findall(r"\| `(\S+)` \| (\d) \|.* (.*) \|$", index, re.M) == [
        ("ppo-1", "1", "measured"),
        ("ppo-2", "2", "measured"),
        ("bc", "1", "measured"),
    ]


def write_scores(results: Path, name: str, scores: dict[int, float], policy: str | None, **changes) -> Path:
    """A file of made-up results."""
    setting = Setting(task=TASK)
    made = Scores(
        agent=name, plays=name, policy=policy, setting=setting, seeds_of="evaluation", package_version="0",
        seeds=list(scores), scores=list(scores.values()),
        components={each: [0.0] * len(scores) for each in COMPONENTS},
        requests={each: [0] * len(scores) for each in ("arrived", "completed", "in_slo", "failed")},
    )  # fmt: skip
    path = scores_path(results, name, setting, official=True)
    made.model_copy(update=changes).save(path)
    return path


def test_results_go_into_the_cards_and_touch_nothing_else(weights, tmp_path):
    results, before = tmp_path / "results", files(weights)
    plans = clairvoyant_scores(TASK)
    constant = {seed: pair[0] for seed, pair in plans.items()}
    halfway = {seed: (low + high) / 2 for seed, (low, high) in plans.items()}
    write_scores(results, "best-constant", constant, None)
    write_scores(results, "ppo-2", halfway, policy_digest(weights / TASK / "ppo-2"))
    release.main(release.Arguments((), results, None, weights))
    assert files(weights) == before
    card = (weights / TASK / "ppo-2" / release.CARD).read_text()
    assert f"| **ppo-2** | {interval(list(halfway.values()))} |" in card
    assert "| 0.500 [0.500, 0.500] |" in card  # of the gap
    assert f"| best-constant | {interval(list(constant.values()))} | – | – |" in card
    assert "ppo-1` has not been measured" in (weights / TASK / "ppo-1" / release.CARD).read_text()
    assert f"| {interval(list(halfway.values()))} |" in (weights / release.CARD).read_text()


def test_results_of_other_weights_are_refused(weights, tmp_path):
    path = write_scores(tmp_path, "ppo-1", {2**31: 0.5, 2**31 + 1: 0.6}, "0" * 64)
    with pytest.raises(InputError, match="other weights") as caught:
        release.main(release.Arguments((), tmp_path, None, weights))
    assert caught.value.file == str(path)
    digest = policy_digest(weights / TASK / "ppo-1")
    write_scores(tmp_path, "ppo-1", {1: 0.5, 2: 0.6}, digest, seeds_of="other")
    with pytest.raises(InputError, match="seeds of evaluation"):
        release.main(release.Arguments((), tmp_path, None, weights))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda training: training.pop("run"), "--resume adds"),
        (lambda training: training.pop("commit"), "--commit"),
        (lambda training: training["run"].update(steps=40), "stopped after 40 of 80"),
        (lambda training: training["arguments"].update(seed=4), "'ppo-4' is none of ppo-1"),
        (lambda training: training["arguments"].update(buffer=1), "of train.ppo or train.bc"),
        (lambda training: training.clear(), "of train.ppo or train.bc"),
        (lambda training: training["arguments"].update(init="elsewhere/clone"), "which is not shipped"),
    ],
)
def test_runs_that_cannot_be_shipped_are_named(runs, tmp_path, change, told):
    save_policy(tmp_path / "run", load_policy(runs / "plain"))
    config = json.loads((tmp_path / "run" / CONFIG).read_text())
    change(config["training"])
    (tmp_path / "run" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(InputError, match=told) as caught:
        release.release(tmp_path / "run", tmp_path / "weights")
    assert caught.value.file.startswith(str(tmp_path / "run"))
    assert not (tmp_path / "weights").exists()
