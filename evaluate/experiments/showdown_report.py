"""The tables and pictures of scores that lie in a folder.

python -m evaluate.experiments.showdown_report --results out/showdown
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tyro

from evaluate.evaluate import setting_label
from evaluate.experiments.headroom import RESULTS
from evaluate.experiments.headroom_report import scores_of
from evaluate.jobs import Setting
from evaluate.scores import Scores, read_scores
from llmserve_env.agents import AGENTS, CONTROLLERS
from llmserve_env.errors import InputError
from llmserve_env.files import write_atomic
from llmserve_env.report.figures import BLUE, GREY, INK, ORANGE, picture_file
from llmserve_env.report.stats import (
    Interval,
    gap_share,
    interval,
    paired_difference,
    performance_profile,
    probability_of_improvement,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

Found = Mapping[tuple[str, Setting], Scores]

_COLOURS = (BLUE, ORANGE, "#4c9a6a", "#8b5fbf", "#c0504d", "#3aa6b9", "#b08b2e", INK, GREY)
_CONSTANT = "best-constant"
_SAME = 1e-9
"""Difference of scores (1) up to which two runs of one agent are one."""


@dataclass
class Arguments:
    """What to report.

    Attributes:
        results: folder that `evaluate.experiments.showdown` or `evaluate.evaluate` wrote.
        baseline: label of the agent with which the others are compared.
    """

    results: Path = Path("out/showdown")
    baseline: str = "best-constant"


def main(arguments: Arguments) -> None:
    """Report all scores in a folder, on the seeds that all of them have."""
    files = [read_scores(path) for path in sorted(arguments.results.glob("*/*.json"))]
    if not files:
        raise InputError(
            "there are no scores yet: run python -m evaluate.experiments.showdown",
            file=str(arguments.results),
        )
    if len({scores.seeds_of for scores in files}) > 1:
        raise InputError("holds scores on seeds of evaluation and others", file=str(arguments.results))
    order = {name: place for place, name in enumerate((*AGENTS, *CONTROLLERS))}
    files.sort(key=lambda scores: (order.get(scores.agent, len(order)), scores.agent))
    whole = [set(scores.seeds) for scores in files if scores.llm is None]
    seeds = sorted(set.intersection(*whole)) if whole else []
    if len(seeds) < 2:
        raise InputError("expected two seeds or more that all played", file=str(arguments.results))
    found = {(scores.agent, scores.setting): scores for scores in files}
    print(write_report(found, seeds, arguments.baseline, arguments.results))


def write_report(found: Found, seeds: Sequence[int], baseline: str, out: Path) -> str:
    """Write showdown.md, scores.png and profiles.png.

    Args:
        found: scores by agent and setting.
        seeds: on which to compare.
        baseline: with whom.
        out: folder of the files.

    Returns:
        What showdown.md says, and the names of the files.

    Raises:
        InputError: nobody played, or the baseline did not play a setting.
    """
    few = {key: scores for key, scores in found.items() if not set(seeds) <= set(scores.seeds)}
    models = {key: scores for key, scores in found.items() if scores.llm is not None}
    found = {key: scores for key, scores in found.items() if key not in few}
    settings = list(dict.fromkeys(setting for _, setting in found))
    if not settings:
        raise InputError("none of them plays any of the tasks", field="agents")
    table: dict[str, dict[Setting, NDArray[np.float64]]] = {}
    for (agent, setting), scores in found.items():
        table.setdefault(agent, {})[setting] = scores.of(list(seeds))
    if baseline not in table or len(table[baseline]) < len(settings):
        raise InputError(f"'{baseline}' has not played every setting", field="baseline")
    whole = {agent: _stacked(row) for agent, row in table.items() if len(row) == len(settings)}
    parts = [_scores(table, whole, settings), _differences(table, whole, settings, baseline)]
    shares = _gap_shares(table, settings, seeds)
    parts += [shares] if shares else []
    if _CONSTANT not in table:
        parts.append(
            f"{_CONSTANT} has not played: there are no shares of the gap between it and the clairvoyant plan."
        )
    if models:
        parts.append(_language_models(models, table, seeds, baseline))
    text = "\n\n".join([_title(found, seeds), *parts]) + "\n"
    write_atomic(out / "showdown.md", text)
    _draw_scores(out / "scores.png", table, whole, settings)
    _draw_profiles(out / "profiles.png", whole)
    written = [out / name for name in ("showdown.md", "scores.png", "profiles.png")]
    return text + "\n" + "\n".join(f"wrote {path}" for path in written)


def _stacked(row: Mapping[Setting, NDArray[np.float64]]) -> NDArray[np.float64]:
    """float64[seeds, settings]."""
    return np.stack(list(row.values()), axis=1)


def _title(found: Found, seeds: Sequence[int]) -> str:
    title = f"Scores on {len(seeds)} seeds, {seeds[0]} to {seeds[-1]}, the same for all."
    if any(scores.seeds_of == "other" for scores in found.values()):
        return f"{title} **These are not seeds of evaluation: no results to report.**"
    return title


def _scores(
    table: Mapping[str, Mapping[Setting, NDArray[np.float64]]],
    whole: Mapping[str, NDArray[np.float64]],
    settings: Sequence[Setting],
) -> str:
    lines = _header(settings, ["all"])
    for agent, row in table.items():
        cells = [str(interval(row[setting])) if setting in row else "–" for setting in settings]
        lines.append(_row(agent, [*cells, str(interval(whole[agent])) if agent in whole else "–"]))
    return "\n".join(["Interquartile means with 95% intervals:", "", *lines])


def _differences(
    table: Mapping[str, Mapping[Setting, NDArray[np.float64]]],
    whole: Mapping[str, NDArray[np.float64]],
    settings: Sequence[Setting],
    baseline: str,
) -> str:
    lines = _header(settings, ["all", "P(better)"])
    for agent, row in table.items():
        if agent == baseline:
            continue
        cells = [
            str(paired_difference(row[setting], table[baseline][setting])) if setting in row else "–"
            for setting in settings
        ]
        if agent in whole:
            cells += [str(paired_difference(whole[agent], whole[baseline]))]
            cells += [str(probability_of_improvement(whole[agent], whole[baseline]))]
        else:
            cells += ["–", "–"]
        lines.append(_row(agent, cells))
    title = (
        f"Means of the differences to {baseline}, seed by seed; P(better): how likely a score is above one "
        f"of {baseline}'s in the same setting, whatever the seeds:"
    )
    return "\n".join([title, "", *lines])


def _gap_shares(
    table: Mapping[str, Mapping[Setting, NDArray[np.float64]]],
    settings: Sequence[Setting],
    seeds: Sequence[int],
) -> str:
    """How far agents come from the best constant to the clairvoyant plan, on the seeds that have one."""
    gaps = {}
    for setting in settings:
        if setting.changed or setting not in table.get(_CONSTANT, {}):
            continue
        gap = clairvoyant_gap(setting.task, table[_CONSTANT][setting], seeds)
        if gap is not None:
            gaps[setting] = gap
    if not gaps:
        return ""
    lines = _header(list(gaps), [])
    for agent, row in table.items():
        if agent == _CONSTANT:
            continue
        cells = []
        for setting, (places, constant, plan) in gaps.items():
            share: Interval | None = None
            if setting in row:
                share = gap_share(row[setting][places], constant, plan)
            cells.append("–" if share is None else str(share))
        lines.append(_row(agent, cells))
    count = max(len(places) for places, _, _ in gaps.values())
    title = (
        f"Shares of the gap between {_CONSTANT} (0) and the clairvoyant plan (1), on the {count} seeds for "
        "which there is a plan:"
    )
    return "\n".join([title, "", *lines])


def clairvoyant_gap(
    task_id: str, constant: NDArray[np.float64], seeds: Sequence[int]
) -> tuple[list[int], NDArray[np.float64], NDArray[np.float64]] | None:
    """Where the gap is known that is to be closed.

    Args:
        task_id: of the task, unchanged.
        constant: scores of the best constant on the seeds.
        seeds: of evaluation.

    Returns:
        Places of the seeds for which there is a clairvoyant plan, and there the scores of the best constant
        and of the plan; None where they are fewer than two, or of another simulator.
    """
    found = clairvoyant_scores(task_id) or {}
    places = [place for place, seed in enumerate(seeds) if seed in found]
    if len(places) < 2:
        return None
    below, plan = np.array([found[seeds[place]] for place in places]).T
    if np.abs(below - constant[places]).max() > _SAME:
        return None
    return places, below, plan


def _language_models(
    models: Found,
    table: Mapping[str, Mapping[Setting, NDArray[np.float64]]],
    seeds: Sequence[int],
    baseline: str,
) -> str:
    """What language models scored on the few seeds that they played, and what asking them came to."""
    names = ["agent", "model", "seeds", "score", baseline, "difference", "calls", "unusable", "tokens"]
    lines = [_row("", names), "|---|---|---|" + "---:|" * (len(names) - 2)]
    for (agent, setting), scores in models.items():
        played = [seed for seed in seeds if seed in set(scores.seeds)]
        assert scores.llm is not None
        cells = [agent, str(scores.llm["model"]), _range(played)]
        if len(played) > 1:
            mine, base = (
                scores.of(played),
                table[baseline][setting][[list(seeds).index(seed) for seed in played]],
            )
            cells += [str(interval(mine)), str(interval(base)), str(paired_difference(mine, base))]
        else:
            cells += ["–"] * 3
        usage = [scores.usage[str(seed)] for seed in played]
        cells.append(f"{sum(each['calls'] for each in usage):,}")
        cells.append(f"{sum(sum(each['fallbacks'].values()) for each in usage):,}")
        cells.append(f"{sum(each['prompt_tokens'] + each['completion_tokens'] for each in usage):,}")
        lines.append(_row(setting_label(setting), cells))
    title = (
        "Language models, **on the seeds named here only**, and the baseline on the same ones; unusable: "
        "calls without a usable answer, which left the configuration as it was; tokens: of prompts and of "
        "answers:"
    )
    return "\n".join([title, "", *lines])


def _range(seeds: Sequence[int]) -> str:
    if not seeds:
        return "none"
    return f"{len(seeds)}: {seeds[0]} to {seeds[-1]}"


def clairvoyant_scores(task_id: str) -> dict[int, tuple[float, float]] | None:
    """Scores of the best constant and of the clairvoyant plan by evaluation seed, None without a search."""
    path = RESULTS / f"headroom-{task_id}.json"
    if not path.exists():
        return None
    state = json.loads(path.read_text(encoding="utf-8"))
    scores = scores_of(state, path)
    seeds = sorted(int(seed) for seed in state["scores"])
    pairs = zip(scores["best_constant"].tolist(), scores["clairvoyant"].tolist(), strict=True)
    return dict(zip(seeds, pairs, strict=True))


def _header(settings: Sequence[Setting], more: Sequence[str]) -> list[str]:
    names = [setting_label(setting) for setting in settings] + list(more)
    return [_row("", names), "|---|" + "---:|" * len(names)]


def _row(label: str, cells: Sequence[str]) -> str:
    return f"| {label} | " + " | ".join(cells) + " |"


def _draw_scores(
    path: Path,
    table: Mapping[str, Mapping[Setting, NDArray[np.float64]]],
    whole: Mapping[str, NDArray[np.float64]],
    settings: Sequence[Setting],
) -> None:
    """An interval for each agent in each setting, over the scores of the single seeds."""
    columns = min(len(settings) + 1, 5)
    rows = -(-(len(settings) + 1) // columns)
    with picture_file(path, (2.2 + 2.4 * columns, rows * (0.9 + 0.26 * len(table)))) as figure:
        panels: list[Axes] = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
        for panel in panels[len(settings) + 1 :]:
            panel.set_axis_off()
        for panel, setting in zip(panels, [*settings, None], strict=False):
            for place, (agent, row) in enumerate(table.items()):
                scores = whole.get(agent) if setting is None else row.get(setting)
                if scores is not None:
                    _point(panel, place, interval(scores), scores.ravel(), _COLOURS[place % len(_COLOURS)])
            panel.set_title("all" if setting is None else setting_label(setting))
            panel.set_xlabel("score")
        panels[0].set_yticks(range(len(table)), list(table))
        panels[0].invert_yaxis()


def _point(panel: Axes, place: int, found: Interval, scores: NDArray[np.float64], colour: str) -> None:
    panel.plot(scores, np.full(len(scores), place), "|", color=colour, alpha=0.25, markersize=6)
    panel.plot([found.low, found.high], [place, place], color=colour, linewidth=3, solid_capstyle="round")
    panel.plot(found.estimate, place, "o", color=colour, markersize=5)


def _draw_profiles(path: Path, whole: Mapping[str, NDArray[np.float64]]) -> None:
    """The share of scores above each threshold, of the agents that played everything."""
    thresholds = np.linspace(0, 1, 201)
    with picture_file(path, (6.0, 3.6)) as figure:
        axes = figure.subplots()
        for place, (agent, scores) in enumerate(whole.items()):
            colour = _COLOURS[place % len(_COLOURS)]
            profile = performance_profile(scores, thresholds)
            axes.plot(thresholds, profile.shares, color=colour, label=agent)
            axes.fill_between(thresholds, profile.low, profile.high, color=colour, alpha=0.2, linewidth=0)
        axes.set_xlabel("score τ")
        axes.set_ylabel("share of scores above τ")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.legend()


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except InputError as error:
        sys.exit(f"showdown_report: {error}")
