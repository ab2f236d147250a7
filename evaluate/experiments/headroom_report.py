"""The table and the picture of what `evaluate.experiments.headroom` measured.

python -m evaluate.experiments.headroom_report --picture docs/images/headroom.png
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray

from evaluate.experiments.headroom import RESULTS
from llmserve_env.controls import CONTROLS
from llmserve_env.errors import InputError
from llmserve_env.report.figures import BLUE, GREY, ORANGE, picture_file
from llmserve_env.report.stats import Interval, interval, paired_difference

AGENTS = {
    "random": "random",
    "defaults": "vLLM's defaults",
    "best_constant": "best constant",
    "reactive": "reactive rule",
    "clairvoyant": "clairvoyant plan",
}


def main(results: tuple[Path, ...] = (), *, picture: Path | None = None) -> None:
    """Print the table, and draw the picture if asked.

    Args:
        results: files of `evaluate.experiments.headroom` (default: all in evaluate/results).
        picture: file to draw to.
    """
    paths = results or tuple(sorted(RESULTS.glob("headroom-*.json")))
    if not paths:
        raise InputError(
            "there are no results yet: run python -m evaluate.experiments.headroom", file=str(RESULTS)
        )
    measured = {}
    for path in paths:
        state = json.loads(path.read_text(encoding="utf-8"))
        measured[state["settings"]["task"]] = scores_of(state, path)
    print(_table(measured))
    if picture is not None:
        _draw(picture, measured)
        print(f"\nwrote {picture}")


def scores_of(state: dict[str, Any], path: Path) -> dict[str, NDArray[np.float64]]:
    """Scores by agent and by fixed control, float64[seeds], of a finished file of results.

    Raises:
        InputError: the measurement was not finished.
    """
    if "references" not in state or len(state["scores"]) < state["settings"]["seeds"]:
        raise InputError("is not finished: run the same command again", file=str(path))
    rows = [state["scores"][seed] for seed in sorted(state["scores"], key=int)]
    scores = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return {**{name: np.array(values) for name, values in state["references"].items()}, **scores}


def _table(measured: dict[str, dict[str, NDArray[np.float64]]]) -> str:
    lines = ["| | " + " | ".join(f"`{task}`" for task in measured) + " |", "|---|" + "---|" * len(measured)]
    for name, label in AGENTS.items():
        lines.append(_row(label, [str(interval(scores[name])) for scores in measured.values()]))
    pairs = (("best_constant", "defaults"), ("clairvoyant", "best_constant"), ("reactive", "best_constant"))
    for better, worse in pairs:
        label = f"{AGENTS[better]} − {AGENTS[worse]}"
        cells = [str(paired_difference(scores[better], scores[worse])) for scores in measured.values()]
        lines.append(_row(label, cells))
    for control in _granted(measured):
        cells = []
        for scores in measured.values():
            dropped = drop(scores, control)
            cells.append("not granted" if dropped is None else str(dropped))
        lines.append(_row(f"clairvoyant − the same with `{control}` fixed", cells))
    return "\n".join(lines)


def drop(scores: dict[str, NDArray[np.float64]], control: str) -> Interval | None:
    """What the clairvoyant plan loses when a control keeps its best constant value; None if not granted."""
    if f"fixed {control}" not in scores:
        return None
    return paired_difference(scores["clairvoyant"], scores[f"fixed {control}"])


def _granted(measured: dict[str, dict[str, NDArray[np.float64]]]) -> list[str]:
    """The controls that some task grants."""
    return [name for name in CONTROLS if any(drop(scores, name) is not None for scores in measured.values())]


def _row(label: str, cells: list[str]) -> str:
    return f"| {label} | " + " | ".join(cells) + " |"


def _draw(path: Path, measured: dict[str, dict[str, NDArray[np.float64]]]) -> None:
    controls = _granted(measured)
    with picture_file(path, (10.0, 4.6)) as figure:
        axes = figure.subplots(2, len(measured), sharex="row", squeeze=False, height_ratios=[5, 6])
        for column, (task, scores) in enumerate(measured.items()):
            above, below = axes[0, column], axes[1, column]
            for place, name in enumerate(reversed(AGENTS)):
                colour = {"clairvoyant": ORANGE, "best_constant": BLUE}.get(name, GREY)
                _point(above, place, interval(scores[name]), scores[name], colour)
            above.set_yticks(range(len(AGENTS)), list(reversed(AGENTS.values())) if column == 0 else [])
            above.set_title(task)
            above.set_xlim(0, 1)
            above.set_xlabel("score")
            for place, control in enumerate(reversed(controls)):
                dropped = drop(scores, control)
                if dropped is None:
                    below.text(0, place, " not granted", va="center", color=GREY, fontsize=7)
                    continue
                _point(below, place, dropped, scores["clairvoyant"] - scores[f"fixed {control}"], ORANGE)
            below.set_yticks(range(len(controls)), list(reversed(controls)) if column == 0 else [])
            below.set_ylim(-0.5, len(controls) - 0.5)
            below.axvline(0, color=GREY, linewidth=0.8)
            below.set_xlabel("lost by the plan if it is fixed")


def _point(axes: Any, place: int, found: Interval, scores: NDArray[np.float64], colour: str) -> None:
    """An estimate with its interval over the single seeds."""
    axes.plot(scores, np.full(len(scores), place), "|", color=colour, alpha=0.35, markersize=7)
    axes.plot([found.low, found.high], [place, place], color=colour, linewidth=3, solid_capstyle="round")
    axes.plot(found.estimate, place, "o", color=colour, markersize=5)


if __name__ == "__main__":
    tyro.cli(main)
