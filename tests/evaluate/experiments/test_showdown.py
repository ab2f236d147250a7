"""Reports say what the scores say, and compare only what compares."""

from __future__ import annotations

import pytest

import evaluate.experiments.showdown_report as report
from evaluate.experiments.showdown import Arguments, main
from evaluate.experiments.showdown_report import Arguments as ReportArguments
from evaluate.experiments.showdown_report import clairvoyant_scores
from evaluate.scores import policy_digest, read_scores
from llmserve_env.agents import load_agent, play
from llmserve_env.agents.trained import trained_folder
from llmserve_env.errors import InputError
from llmserve_env.report.stats import (
    gap_share,
    interval,
    paired_difference,
    probability_of_improvement,
)
from llmserve_env.tasks import EVALUATION_SEEDS, load_task

AGENTS = ("defaults", "best-constant")
SEEDS = EVALUATION_SEEDS[:10]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("showdown")
    main(Arguments(AGENTS, ("static_workload", "trace_replay"), 10, jobs=1, out=out))
    return out


def scores(agent, task_id="static_workload"):
    task = load_task(task_id)
    return play(load_agent(agent, task), task, SEEDS).scores


def rows(folder, label):
    """Cells of the rows of an agent, table by table."""
    lines = (folder / "showdown.md").read_text().splitlines()
    return [
        [cell.strip() for cell in line.split("|")[2:-1]] for line in lines if line.startswith(f"| {label} |")
    ]


def test_report_says_what_the_scores_say(folder):
    own, shares = rows(folder, "defaults"), probability_of_improvement
    static, trace = (
        [scores(agent, task) for agent in AGENTS] for task in ("static_workload", "trace_replay")
    )
    both = [list(zip(one, other, strict=True)) for one, other in zip(static, trace, strict=True)]
    assert own[0] == [str(interval(table)) for table in (static[0], trace[0], both[0])]
    differences = [str(paired_difference(*table)) for table in (static, trace, both)]
    assert own[1] == [*differences, str(shares(*both))]
    assert "-" not in rows(folder, "best-constant")[0][0]
    for name in ("scores.png", "profiles.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_share_of_the_gap_is_of_paired_seeds(folder):
    found = clairvoyant_scores("static_workload")
    low, high = zip(*(found[seed] for seed in SEEDS), strict=True)
    assert rows(folder, "defaults")[2] == [str(gap_share(scores("defaults"), low, high))]
    assert low == pytest.approx(scores("best-constant"), abs=1e-12)


def test_share_of_a_gap_measured_otherwise_is_not_reported(folder, monkeypatch):
    old = {seed: (low - 1e-3, high) for seed, (low, high) in clairvoyant_scores("static_workload").items()}
    monkeypatch.setattr(report, "clairvoyant_scores", lambda task_id: old)
    report.main(ReportArguments(folder))
    assert "gap" not in (folder / "showdown.md").read_text()
    monkeypatch.undo()
    report.main(ReportArguments(folder))
    assert "gap" in (folder / "showdown.md").read_text()


def test_report_of_a_folder_is_that_of_the_showdown(folder):
    before = (folder / "showdown.md").read_text()
    report.main(ReportArguments(folder))
    assert (folder / "showdown.md").read_text() == before


def test_baseline_must_have_played(folder, tmp_path):
    with pytest.raises(InputError) as caught:
        main(Arguments(AGENTS, ("static_workload",), 2, baseline="reactive", out=tmp_path))
    assert caught.value.field == "baseline"
    with pytest.raises(InputError, match="no scores yet"):
        report.main(ReportArguments(tmp_path))


def test_shipped_policies_play_the_tasks_that_they_were_trained_on(tmp_path, ship):
    ship("static_workload")
    agents = ("best-constant", "ppo", "shielded:ppo")
    main(Arguments(agents, ("static_workload", "trace_replay"), 2, jobs=1, out=tmp_path))
    assert {path.name for path in (tmp_path / "static_workload").iterdir()} >= {
        "ppo.json",
        "best-constant.json",
    }
    assert [path.name for path in (tmp_path / "trace_replay").iterdir()] == ["best-constant.json"]
    for name in ("ppo", "shielded-ppo"):
        found = read_scores(tmp_path / "static_workload" / f"{name}.json")
        assert found.policy == policy_digest(trained_folder("ppo", "static_workload"))


def test_a_report_without_the_best_constant_says_what_it_leaves_out(folder, tmp_path):
    agents, tasks = ("random", "defaults"), ("static_workload",)
    main(Arguments(agents, tasks, 2, baseline="defaults", jobs=1, out=tmp_path))
    assert "best-constant has not played: there are no shares" in (tmp_path / "showdown.md").read_text()
    assert "has not played" not in (folder / "showdown.md").read_text()
