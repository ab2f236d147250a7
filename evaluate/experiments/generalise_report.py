"""The table and the picture of `evaluate.experiments.generalise`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluate.constants import Found
from evaluate.fit import Fit
from evaluate.jobs import Setting
from evaluate.scores import Scores
from llmserve_env.files import write_atomic
from llmserve_env.report.figures import BLUE, GREY, INK, ORANGE, picture_file
from llmserve_env.report.provenance import made_by
from llmserve_env.report.stats import Interval, gap_share, interval, paired_difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

CONSTANT = "best-constant"


@dataclass(frozen=True)
class Place:
    """Where a task is played.

    Attributes:
        label: in tables.
        setting: of it; that of a task's first place is the task itself.
        fit: of the trace, if it is one.
    """

    label: str
    setting: Setting
    fit: Fit | None = None


@dataclass(frozen=True)
class Row:
    """What came out in a place.

    Attributes:
        place: where.
        scores: float64[seeds] by agent; "ppo" is the mean of the policies, seed by seed.
        gain: ppo − the constant that was tuned to the task.
        kept: that, as a share of what it is on the task itself; None where there is nothing to keep.
        gains: as `gain`, of each policy.
        constant: the one searched for here, None if none was.
        over_constant: ppo − that.
    """

    place: Place
    scores: dict[str, NDArray[np.float64]]
    gain: Interval
    kept: Interval | None
    gains: dict[str, Interval]
    constant: Found | None
    over_constant: Interval | None


def advantage_kept(
    here: tuple[NDArray[np.float64], NDArray[np.float64]],
    own: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> Interval | None:
    """An agent's mean advantage over a baseline in a place, as a share of that on its own task.

    Resamples draw whole seeds, all four scores of each together: of traffic that the seed makes alike in
    both places they keep what is common.

    Args:
        here: float64[seeds] of the agent and of the baseline.
        own: as `here`, on the same seeds of the agent's own task.

    Returns:
        The share with its interval; None where in some resample there is no advantage to keep.
    """
    won, had = here[0] - here[1], own[0] - own[1]
    return gap_share(won, np.zeros_like(won), had)


def rows_of(
    task_places: Sequence[Place],
    found: Mapping[tuple[str, Setting], Scores],
    constants: Mapping[Setting, Found],
    policies: Sequence[str],
    seeds: Sequence[int],
) -> list[Row]:
    """What came out on a task, place by place; none if not all policies play it."""
    rows: list[Row] = []
    for place in task_places:
        scores = {
            agent: each.of(list(seeds))
            for (agent, setting), each in found.items()
            if setting == place.setting
        }
        if not {CONSTANT, *policies} <= set(scores):
            return []
        scores["ppo"] = np.mean([scores[name] for name in policies], axis=0)
        base, constant = scores[CONSTANT], constants.get(place.setting)
        own = rows[0].scores if rows else scores
        rows.append(
            Row(
                place,
                scores,
                gain=paired_difference(scores["ppo"], base),
                kept=advantage_kept((scores["ppo"], base), (own["ppo"], own[CONSTANT])),
                gains={name: paired_difference(scores[name], base) for name in policies},
                constant=constant,
                over_constant=None if constant is None else paired_difference(scores["ppo"], constant.scores),
            )
        )
    return rows


def write_report(
    found: Mapping[tuple[str, Setting], Scores],
    constants: Mapping[Setting, Found],
    places: Mapping[str, Sequence[Place]],
    *,
    policies: Sequence[str],
    seeds: Sequence[int],
    out: Path,
) -> str:
    """Write generalise.md, generalise.json and generalise.png.

    Args:
        found: scores by agent and setting.
        constants: what was searched for, by setting.
        places: by task, the first one the task itself.
        policies: names of the agents whose mean is "ppo".
        seeds: on which to compare.
        out: folder of the files.

    Returns:
        What generalise.md says, and the names of the files.
    """
    rows = {task: rows_of(each, found, constants, policies, seeds) for task, each in places.items()}
    rows = {task: each for task, each in rows.items() if each}
    official = all(scores.seeds_of == "evaluation" for scores in found.values())
    text = (
        "\n\n".join([_title(seeds, policies, official), *(_section(*each) for each in rows.items())]) + "\n"
    )
    write_atomic(out / "generalise.md", text)
    content: dict[str, Any] = {
        "seeds_of": "evaluation" if official else "other",
        "seeds": list(seeds),
        "made_by": made_by(),
    }
    content["tasks"] = {task: [_json(row) for row in each] for task, each in rows.items()}
    write_atomic(out / "generalise.json", json.dumps(content, indent=1) + "\n")
    names = ["generalise.md", "generalise.json"]
    if rows:
        _draw(out / "generalise.png", rows)
        names.append("generalise.png")
    return text + "\n" + "\n".join(f"wrote {out / name}" for name in names)


def _title(seeds: Sequence[int], policies: Sequence[str], official: bool) -> str:
    text = (
        f"{len(seeds)} seeds, {seeds[0]} to {seeds[-1]}, the same for all. Scores are interquartile means, "
        "differences means over paired seeds, with 95% intervals. ppo: mean of "
        f"{', '.join(policies)}, seed by seed. Constant: the best one of the task itself, carried over; "
        "constant there: the best of a small search on training seeds in that place. Kept: ppo − constant as "
        "a share of what it is on the task itself."
    )
    return text if official else f"{text} **These are not seeds of evaluation: no results to report.**"


def _section(task: str, rows: Sequence[Row]) -> str:
    shown = [name for name in rows[0].scores if name not in rows[0].gains]
    parts = [f"**{task}**", _table(["", *shown], [_scores_of(row, shown) for row in rows])]
    header = [
        "",
        "ppo − constant",
        "kept",
        "ppo − constant there",
        *(f"{name} − constant" for name in rows[0].gains),
    ]
    parts.append(_table(header, [_gains_of(row) for row in rows]))
    fitted = [row.place for row in rows if row.place.fit is not None]
    if fitted:
        header = ["", "stretches at once", "pace", "requests/s", "tokens/s"]
        parts.append(_table(header, [_fit_of(place) for place in fitted]))
    return "\n\n".join(parts)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _scores_of(row: Row, shown: Sequence[str]) -> list[str]:
    return [
        row.place.label,
        *(str(interval(row.scores[name])) if name in row.scores else "–" for name in shown),
    ]


def _gains_of(row: Row) -> list[str]:
    cells = [row.gain, row.kept, row.over_constant, *row.gains.values()]
    return [row.place.label, *("–" if cell is None else str(cell) for cell in cells)]


def _fit_of(place: Place) -> list[str]:
    fit = place.fit
    assert fit is not None
    return [
        place.label,
        f"{fit.stretches}",
        f"× {fit.pace:.3g}",
        f"{fit.requests_per_s:.1f}",
        f"{fit.tokens_per_s:,.0f}",
    ]


def _json(row: Row) -> dict[str, Any]:
    fit = row.place.fit
    return {
        "place": row.place.label,
        "profile": row.place.setting.profile,
        "load": row.place.setting.load,
        "fit": None
        if fit is None
        else {name: value for name, value in asdict(fit).items() if name != "workload"},
        "scores": {name: asdict(interval(scores)) for name, scores in row.scores.items()},
        "ppo_minus_constant": asdict(row.gain),
        "kept": row.kept and asdict(row.kept),
        "each_minus_constant": {name: asdict(gain) for name, gain in row.gains.items()},
        "constant_there": row.constant
        and {
            "action": row.constant.action,
            "tuning_score": row.constant.tuning_score,
            "episodes": row.constant.episodes,
            "score": asdict(interval(row.constant.scores)),
        },
        "ppo_minus_constant_there": row.over_constant and asdict(row.over_constant),
    }


def _draw(path: Path, rows: Mapping[str, Sequence[Row]]) -> None:
    """For each task, by how much ppo is ahead in each place."""
    columns = min(len(rows), 2)
    lines = -(-len(rows) // columns)
    height = max(len(each) for each in rows.values())
    with picture_file(path, (5.6 * columns, lines * (1.0 + 0.28 * height))) as figure:
        panels: list[Axes] = list(figure.subplots(lines, columns, squeeze=False).flat)
        for panel in panels[len(rows) :]:
            panel.set_axis_off()
        for panel, (task, each) in zip(panels, rows.items(), strict=False):
            _panel(panel, each)
            panel.set_title(task)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns + 1)


def _panel(panel: Axes, rows: Sequence[Row]) -> None:
    panel.axvline(0, color=INK, linewidth=0.8)
    own = rows[0].gain.estimate
    if rows[0].kept is not None:
        panel.axvline(
            own / 2,
            color=GREY,
            linewidth=0.9,
            linestyle="--",
            label="half of the advantage on the task itself",
        )
    for y, row in enumerate(rows):
        for gain, shift, colour, label in (
            (row.gain, -0.14, BLUE, "ppo − constant"),
            (row.over_constant, 0.14, ORANGE, "ppo − constant there"),
        ):
            if gain is not None:
                panel.plot([gain.low, gain.high], [y + shift] * 2, color=colour, linewidth=2.5)
                panel.plot(
                    gain.estimate, y + shift, "o", color=colour, markersize=4, label=label if not y else ""
                )
    panel.set_yticks(range(len(rows)), [row.place.label for row in rows])
    panel.invert_yaxis()
    panel.set_xlabel("difference of scores")
