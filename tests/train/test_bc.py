"""Clones do what their teachers do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmserve_env.agents import ConstantAgent, RandomAgent, load_agent, play
from llmserve_env.agents.policy import PolicyAgent, load_policy
from llmserve_env.backend import WINDOW
from llmserve_env.controls import to_action, to_array
from llmserve_env.errors import InputError
from llmserve_env.live.pilot.change_limits import ChangeLimits
from llmserve_env.live.pilot.decision_log import DecisionLog, read_decisions
from llmserve_env.live.pilot.pilot import Pilot
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import EVALUATION_SEEDS, load_task
from train import bc
from train.bc import Arguments, Cloner, clone, watch
from train.ppo import VALIDATION

TASK = load_task("bursty_workload", horizon_s=200.0)
CONSTANT = ServeAction(batch_cap=200, quantization_tier="INT8", priority_routing=True)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Short episodes, few validation seeds."""
    monkeypatch.setattr(bc, "load_task", lambda task_id: load_task(task_id, horizon_s=200.0))
    monkeypatch.setattr(bc, "VALIDATION", VALIDATION[:4])


@pytest.fixture
def taught(monkeypatch):
    """Gives the teacher that a name means."""

    def teach(agent):
        monkeypatch.setattr(bc, "find_agent", lambda name, task: agent)

    return teach


def small(out, **changes):
    return Arguments(**{"out": out, "rounds": 2, "episodes": 8, "hidden": 16, "epochs": 20, **changes})


@pytest.mark.parametrize(("recurrent", "frames"), [(False, 2), (True, 1)])
def test_a_constant_teacher_is_learned_exactly(tmp_path, taught, recurrent, frames):
    taught(ConstantAgent(CONSTANT))
    best = clone(small(tmp_path, recurrent=recurrent, frames=frames, batch=64, epochs=60))
    task = TASK
    nearest = task.grid.indices(to_array([CONSTANT]))
    played = watch(task, range(3), PolicyAgent(load_policy(tmp_path)))
    assert (played.labels == nearest).all()
    on_grid = ConstantAgent(to_action(task.grid.actions(nearest)[0]))
    assert best == play(on_grid, task, VALIDATION[:4]).scores.mean()


def test_the_teacher_sees_the_episode_that_is_played():
    """A rule remembers what it saw: asked beside a player, it must say what it says on that very episode."""
    task, seeds = TASK, range(3)
    seen = []

    class Spy(RandomAgent):
        def act(self, observations, windows):
            seen.append((observations.copy(), windows.copy()))
            return super().act(observations, windows)

    watched = watch(task, seeds, load_agent("reactive", task), Spy())
    teacher = load_agent("reactive", task)
    teacher.reset(task, seeds)
    for t, (observations, windows) in enumerate(seen):
        np.testing.assert_array_equal(watched.observations[t], observations)
        labels = task.grid.indices(teacher.act(observations, windows))
        np.testing.assert_array_equal(watched.labels[t], labels)
    # What is current is what the player, not the teacher, set before; at first what the cell starts in.
    player = RandomAgent()
    player.reset(task, seeds)
    expected = [task.grid.indices(to_array([task.start])).repeat(3, axis=0)]
    expected += [task.grid.indices(player.act(*each)) for each in seen]
    np.testing.assert_array_equal(watched.current, np.stack(expected[:-1]))
    assert (watched.labels[:-1] != watched.current[1:]).any()


def test_episodes_that_ended_teach_nothing():
    task = TASK.model_copy(update={"max_in_flight": 60})
    watched = watch(task, range(8), load_agent("defaults", task))
    lengths = watched.there.sum(axis=0)
    assert lengths.min() < lengths.max() <= task.windows
    for i, length in enumerate(lengths):
        assert watched.there[:length, i].all()


def test_training_is_on_training_seeds_that_are_not_validated_on(tmp_path, monkeypatch):
    played = []
    whole = bc.watch
    monkeypatch.setattr(
        bc, "watch", lambda task, seeds, *agents: played.append(seeds) or whole(task, seeds, *agents)
    )
    clone(small(tmp_path, epochs=1))
    validated = [seeds for seeds in played if seeds == VALIDATION[:4]]
    learned = [seed for seeds in played if seeds not in validated for seed in seeds]
    assert len(validated) == 2
    assert len(set(learned)) == len(learned) == 16
    assert not set(learned) & set(VALIDATION)
    assert max(learned) < EVALUATION_SEEDS.start


def weights_after(tmp_path, name, *rounds):
    """Weights after cloning in several goes."""
    out = tmp_path / name
    for i, count in enumerate(rounds):
        torch.manual_seed(i)  # nothing may hang on what was drawn elsewhere
        clone(small(out, rounds=count, epochs=3, resume=i > 0))
    return torch.load(out / "checkpoint.pt", weights_only=False)


def test_resumed_is_as_if_never_stopped(tmp_path):
    straight, resumed = weights_after(tmp_path, "a", 3), weights_after(tmp_path, "b", 2, 3)
    assert straight["told"] == resumed["told"]
    assert len(straight["told"]) == 3
    for name, value in straight["net"].items():
        assert torch.equal(value, resumed["net"][name]), name


@pytest.fixture
def rounds(monkeypatch):
    """Rounds that agree with the teacher as told, and write into the weights which round it was."""

    def play(*agreements, then=None):
        def learn(cloner, bar):
            if cloner.round == len(agreements):
                raise then
            torch.manual_seed(cloner.round)
            with torch.no_grad():
                for weights in cloner.net.parameters():
                    weights.normal_()
                cloner.net.stay.fill_(cloner.round + 1)
            return {"loss": 0.0}

        left = iter(agreements)
        monkeypatch.setattr(Cloner, "learn", learn)
        monkeypatch.setattr(bc.Watched, "agreement", lambda _: {"agreement": next(left), "moves": 0.0})

    return play


def round_of(folder):
    """The round that a policy of `rounds` is of."""
    (number,) = np.unique(load_policy(folder).weights["stay"])
    return number


@pytest.mark.parametrize(
    ("agreements", "best"),
    [((0.5, 0.8, 0.7), 2), ((0.9, 0.8, 0.7), 1), ((0.5, 0.6, 0.7), 3), ((0.8, 0.8), 1)],
)
def test_the_round_that_agrees_most_is_kept_and_its_score_told(tmp_path, rounds, agreements, best):
    rounds(*agreements)
    score = clone(small(tmp_path, rounds=len(agreements)))
    assert round_of(tmp_path) == best
    told = torch.load(tmp_path / "checkpoint.pt", weights_only=False)["told"]
    assert [each["agreement"] for each in told] == list(agreements)
    assert score == told[best - 1]["validation"]
    assert len({each["validation"] for each in told}) == len(told)


def test_ctrl_c_keeps_the_best(tmp_path, rounds):
    rounds(0.8, 0.7, then=KeyboardInterrupt)
    clone(small(tmp_path, rounds=4))
    assert round_of(tmp_path) == 1
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=False)["round"] == 2


def test_ctrl_c_in_the_first_round_keeps_it_as_far_as_it_came(tmp_path, monkeypatch):
    def stop(cloner, bar):
        with torch.no_grad():
            cloner.net.stay.fill_(5.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(Cloner, "learn", stop)
    score = clone(small(tmp_path))
    kept = load_policy(tmp_path)
    assert (kept.weights["stay"] == 5.0).all()
    assert score == play(PolicyAgent(kept), TASK, VALIDATION[:4]).scores.mean()


@pytest.mark.parametrize("seed", [-1, 2_148])
def test_seeds_never_reach_those_of_validation_or_evaluation(tmp_path, seed):
    with pytest.raises(InputError) as caught:
        clone(small(tmp_path, seed=seed))
    assert caught.value.field == "seed"


def test_nothing_to_resume_is_told(tmp_path):
    with pytest.raises(InputError, match="none to go on from") as caught:
        clone(small(tmp_path, resume=True))
    assert caught.value.file == str(tmp_path / "checkpoint.pt")


def test_the_policy_says_how_it_was_made(tmp_path):
    best = clone(small(tmp_path, epochs=1))
    made = load_policy(tmp_path).config.training
    assert made["arguments"]["teacher"] == "reactive"
    assert max(made["rounds"], key=lambda told: told["agreement"])["validation"] == best
    task = TASK
    assert made["teacher_validation"] == pytest.approx(
        play(load_agent("reactive", task), task, VALIDATION[:4]).scores.mean()
    )


@pytest.fixture
def log(tmp_path):
    """Of a service in which a rule sets a large batch cap while requests wait, and fails now and then."""

    class Rule:
        name = "rule"

        def reset(self, task, seeds):
            self.asked = 0

        def act(self, observations, windows):
            self.asked += 1
            if self.asked % 7 == 0:
                raise RuntimeError("now and then")
            return to_array([START.model_copy(update={"batch_cap": 512 if windows["waiting"][0] else 8})])

    START = TASK.start
    path, drawn = tmp_path / "decisions.jsonl", np.random.default_rng(0)
    safe = START.model_copy(update={"batch_cap": 64})
    pilot = Pilot(Rule(), TASK, START, safe=safe, shield=False, limits=ChangeLimits(), log=DecisionLog(path))
    row = np.zeros((), WINDOW)
    for k in range(300):
        pilot.decide(row)
        row = np.zeros((), WINDOW)
        row["end_s"], row["waiting"] = k + 1, 40 * drawn.integers(2)
        pilot.result(row, 0.0)
    pilot.close()
    return path


def test_a_decision_log_teaches_what_was_done_and_not_the_fallback(tmp_path, log):
    agrees = clone(Arguments(decisions=[log], out=tmp_path / "out", hidden=16, batch=32))
    assert agrees > 0.98
    policy = load_policy(tmp_path / "out")
    agent = PolicyAgent(policy)
    (kept,) = read_decisions([log])
    agent.reset(TASK, [0])
    acts = [agent.act(seen.reshape(1, -1), kept.windows[:1]) for seen in kept.observations[:-1]]
    assert {each.applied.batch_cap for each in kept.decisions} == {8, 64, 512}
    assert set(np.concatenate(acts)["batch_cap"].tolist()) == {8, 512}
    made = policy.config.training
    assert made["runs"] == [kept.beginning.run]
    assert made["rounds"][0]["agreement"] == agrees


def test_pieces_of_a_log_are_held_out_and_keep_their_order(log):
    (kept,) = read_decisions([log])
    learned, held = bc.logged([kept], TASK, held_out=0.1)
    there = learned.there.sum() + held.there.sum()
    assert there == sum(each.by == "agent" for each in kept.decisions)
    assert 0.05 < held.there.sum() / there < 0.15
    for part in (learned, held):  # what was set before is what the window before shows, the fallback's too
        np.testing.assert_array_equal(part.current[1:], part.labels[:-1])


def test_logs_that_teach_nothing_are_refused(tmp_path, log):
    with pytest.raises(InputError, match="say it themselves"):
        clone(Arguments(decisions=[log], teacher="random", out=tmp_path / "out"))
    few = tmp_path / "few"
    few.write_text("".join(log.read_text().splitlines(keepends=True)[:9]))
    with pytest.raises(InputError, match="expected 20 windows or more"):
        clone(Arguments(decisions=[few], out=tmp_path / "out"))
    few.write_text(log.read_text().splitlines(keepends=True)[0])
    with pytest.raises(InputError, match="no window whose outcome is known"):
        clone(Arguments(decisions=[few], out=tmp_path / "out"))
