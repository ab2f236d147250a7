"""What one policy reaches with all weights of the objectives, beside constants and reference agents.

    python -m evaluate.experiments.pareto --policy out/mo --task bursty_workload

A policy of `train.mo_ppo` is played with many preferences, constants are drawn from the task's grid. Writes
pareto.md, pareto.json and pareto.png: which points no other of their kind dominates, and what volume they
dominate together.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from numpy.typing import NDArray
from tqdm import tqdm

from evaluate.evaluate import choose_seeds
from llmserve_env.agents import Agent, ConstantAgent, load_agent
from llmserve_env.agents.policy import PolicyAgent, load_policy
from llmserve_env.controls import to_action
from llmserve_env.episode import prepare
from llmserve_env.errors import InputError
from llmserve_env.files import write_atomic
from llmserve_env.objectives import OBJECTIVES, ObjectiveBatch
from llmserve_env.play import play_batch
from llmserve_env.report.figures import BLUE, GREY, INK, ORANGE, picture_file
from llmserve_env.report.provenance import made_by
from llmserve_env.report.stats import Interval
from llmserve_env.tasks import Task, load_task

KINDS = ("policy", "constants", "agents")
REFERENCE = 0.0
"""Worst value of every objective, from which the hypervolume is measured; the best is 1: it is a share."""
_MARKERS = "s^Dv<>ph"


class Point(NamedTuple):
    """What is played.

    Attributes:
        kind: one of KINDS.
        label: tells it from others of its kind.
        plays: a preference, the number of an action of the grid, or the name of an agent.
    """

    kind: str
    label: str
    plays: Any


@dataclass
class Arguments:
    """What to play.

    Attributes:
        policy: folder of a policy.
        task: id of a task, or path of a task file.
        divisions: number of parts of which a preference is made: with n, every weight is 0/n, 1/n, .. n/n.
        constants: number of constants drawn from the task's grid; all of them if it has no more.
        agents: reference agents by name.
        episodes: episodes of each, 2 or more.
        resamples: bootstrap samples.
        jobs: number of processes.
        out: folder of the results.
        first_seed: first seed (default: the first of evaluation).
        other_seeds: whether seeds may be none of evaluation; the results are marked so.
    """

    policy: Path
    task: str = "bursty_workload"
    divisions: int = 4
    constants: int = 128
    agents: tuple[str, ...] = ("defaults", "best-constant", "reactive")
    episodes: int = 50
    resamples: int = 1_000
    jobs: int = 2
    out: Path = Path("out/pareto")
    first_seed: int | None = None
    other_seeds: bool = False


def lattice(divisions: int) -> NDArray[np.float64]:
    """float64[points, 4], all weights that are n-ths and sum to 1 (Das and Dennis, 1998).

    Raises:
        InputError: fewer than one part.
    """
    if divisions < 1:
        raise InputError(f"expected 1 or more, found {divisions}", field="divisions")
    size = len(OBJECTIVES)
    bars = np.array(list(combinations(range(divisions + size - 1), size - 1)))
    edges = np.column_stack([np.full(len(bars), -1), bars, np.full(len(bars), divisions + size - 1)])
    return (np.diff(edges, axis=1)[::-1] - 1) / divisions


def front(means: NDArray[np.float64]) -> NDArray[np.bool_]:
    """bool[points], those of float64[points, objectives] that no other dominates; of equal ones the first."""
    from moocore import is_nondominated

    found: NDArray[np.bool_] = is_nondominated(means, maximise=True)
    return found


def hypervolume(means: NDArray[np.float64]) -> float:
    """Share of the unit cube between REFERENCE and the points, float64[points, objectives]."""
    import moocore

    return float(moocore.hypervolume(means, ref=REFERENCE, maximise=True))


def bootstrap(
    found: Sequence[NDArray[np.float64]], resamples: int, confidence: float = 0.95, seed: int = 0
) -> list[Interval]:
    """Hypervolumes of sets of points, and how much larger the first is than each of the others.

    Every resample draws seeds, the same for all points of all sets: points are means over them.

    Args:
        found: float64[points, seeds, objectives] of each set.
        resamples: how many.
        confidence: of the percentile intervals.
        seed: of the resampling.

    Returns:
        An interval a set, then one for each difference.
    """
    seeds = found[0].shape[1]
    counts = np.random.default_rng(seed).multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    volumes = np.array(
        [[hypervolume(np.einsum("s,psk->pk", count, each)) for each in found] for count in counts]
    )
    exact = np.array([hypervolume(each.mean(axis=1)) for each in found])
    drawn = np.column_stack([volumes, volumes[:, :1] - volumes[:, 1:]])
    estimates = np.concatenate([exact, exact[0] - exact[1:]])
    tail = (1 - confidence) / 2
    bounds = np.quantile(drawn, (tail, 1 - tail), axis=0)
    return [Interval(*map(float, each)) for each in zip(estimates, *bounds, strict=True)]


def make_points(arguments: Arguments, task: Task) -> list[Point]:
    """What is to be played.

    Raises:
        InputError: the policy takes no preferences, or an agent is unknown.
    """
    policy = load_policy(arguments.policy)
    if policy.config.objectives != list(OBJECTIVES):
        raise InputError("takes no preferences: expected a policy of train.mo_ppo", field="policy")
    if arguments.constants < 1:
        raise InputError(f"expected 1 or more, found {arguments.constants}", field="constants")
    PolicyAgent(policy).reset(task, [0])  # a task of another grid is refused before anything is played
    points = [Point("policy", _mixture(each), each.tolist()) for each in lattice(arguments.divisions)]
    chosen = np.arange(min(task.grid.size, arguments.constants))
    if task.grid.size > arguments.constants:
        chosen = np.sort(np.random.default_rng(0).choice(task.grid.size, arguments.constants, replace=False))
    points += [Point("constants", _setting(task, task.grid.at([int(i)])), int(i)) for i in chosen]
    for name in arguments.agents:
        load_agent(name, task)
        points.append(Point("agents", name, name))
    return points


def play_point(policy: Path, task_id: str, seeds: list[int], point: Point) -> NDArray[np.float64]:
    """float64[seeds, objectives], means of the objectives of its episodes."""
    task = load_task(task_id)
    return play_batch(_agent(policy, task, point), ObjectiveBatch(task, len(seeds)), seeds).means


def play_points(arguments: Arguments, points: Sequence[Point], seeds: list[int]) -> NDArray[np.float64]:
    """float64[points, seeds, objectives], in as many processes as are asked for."""
    play = partial(play_point, arguments.policy, arguments.task, seeds)
    bar = partial(tqdm, total=len(points), unit="point", disable=None)
    if arguments.jobs < 2:
        return np.stack([play(point) for point in bar(points)])
    prepare()
    ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes: one is enough to stop
    with get_context("spawn").Pool(arguments.jobs, signal.signal, ignore) as pool:
        return np.stack(list(bar(pool.imap(play, points))))


def main(arguments: Arguments) -> None:
    """Play, write the files and print the tables."""
    seeds = choose_seeds(arguments.episodes, arguments.first_seed, arguments.other_seeds)
    if arguments.resamples < 2:
        raise InputError(f"expected 2 or more, found {arguments.resamples}", field="resamples")
    task = load_task(arguments.task)
    points = make_points(arguments, task)
    found = play_points(arguments, points, seeds)
    arguments.out.mkdir(parents=True, exist_ok=True)
    text, table = report(arguments, task, points, found, seeds)
    write_atomic(arguments.out / "pareto.md", text)
    write_atomic(arguments.out / "pareto.json", json.dumps(table, indent=1) + "\n")
    draw(arguments.out / "pareto.png", points, found.mean(axis=1))
    print(text)


def report(
    arguments: Arguments, task: Task, points: Sequence[Point], found: NDArray[np.float64], seeds: list[int]
) -> tuple[str, dict[str, Any]]:
    """The tables in Markdown, and for a file all that they rest on."""
    means = found.mean(axis=1)
    kind = np.array([point.kind for point in points])
    sets = [name for name in KINDS if (kind == name).any()]
    volumes = bootstrap([found[kind == name] for name in sets], arguments.resamples)
    preferences = np.array([point.plays for point in points if point.kind == "policy"])
    lines = [
        f"# {task.id}: objectives of {arguments.policy.name}",
        "",
        f"Means over {len(seeds)} seeds. Hypervolume: share of the cube from {REFERENCE:g} to 1 in each "
        "objective (as they are, unweighted, more is better) that the points of a set dominate, with a 95% "
        f"interval from {arguments.resamples:,} resamples of the seeds. Weighted: mean of the weighted "
        f"objectives over {len(preferences)} preferences, of the policy as it plays for each, of others the "
        "point that turned out best for each on these very seeds.",
        "",
        "| set | points | non-dominated | hypervolume | policy's is larger by | weighted |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    weighted = {}
    for i, name in enumerate(sets):
        each = means[kind == name]
        utility = preferences @ each.T
        weighted[name] = float((np.diag(utility) if name == "policy" else utility.max(axis=1)).mean())
        more = str(volumes[len(sets) + i - 1]) if i else ""
        cells = [name, str(len(each)), str(front(each).sum()), str(volumes[i]), more, f"{weighted[name]:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    best = np.zeros(len(points), bool)
    for name in sets:
        best[kind == name] = front(means[kind == name])
    overall = front(means)
    lines += [
        "",
        "Points that none of their set dominates; \\* none of all.",
        "",
        "| set | point | " + " | ".join(OBJECTIVES) + " |",
        "|---|---|" + "---:|" * len(OBJECTIVES),
    ]
    for i, point in enumerate(points):
        if best[i] or point.kind == "agents":
            star = " \\*" if overall[i] else ""
            values = " | ".join(f"{value:.3f}" for value in means[i])
            lines.append(f"| {point.kind} | {point.label}{star} | {values} |")
    if arguments.other_seeds:
        lines += ["", "**These are not seeds of evaluation: no results to report.**"]
    table = {
        "made_by": made_by(),
        "task": task.id,
        "policy": str(arguments.policy),
        "seeds_of": "other" if arguments.other_seeds else "evaluation",
        "seeds": seeds,
        "objectives": OBJECTIVES,
        "reference": REFERENCE,
        "hypervolume": {name: vars(volumes[i]) for i, name in enumerate(sets)},
        "policy_larger_by": {name: vars(volumes[len(sets) + i]) for i, name in enumerate(sets[1:])},
        "weighted": weighted,
        "points": [
            {**point._asdict(), "means": means[i].tolist(), "dominated": not best[i]}
            for i, point in enumerate(points)
        ],
    }
    return "\n".join(lines) + "\n", table


def draw(path: Path, points: Sequence[Point], means: NDArray[np.float64]) -> None:
    """Every pair of objectives, each point where it lies in them; dominated ones pale."""
    kind = np.array([point.kind for point in points])
    pairs = list(combinations(range(len(OBJECTIVES)), 2))
    with picture_file(path, (10.0, 7.0)) as figure:
        axes = figure.subplots(2, 3)
        for axis, (x, y) in zip(axes.flat, pairs, strict=True):
            for name, color, pale, size in (
                ("constants", GREY, "#d5d8dd", 14),
                ("policy", BLUE, "#bfd5e8", 26),
            ):
                each = means[kind == name]
                on = front(each)
                axis.scatter(*each[~on][:, (x, y)].T, size, pale, linewidths=0)
                label = f"{name}, non-dominated (pale: dominated)"
                axis.scatter(*each[on][:, (x, y)].T, size, color, linewidths=0, label=label)
            named = [(point, i) for i, point in enumerate(points) if point.kind == "agents"]
            for place, (point, i) in enumerate(named):
                marker = _MARKERS[place % len(_MARKERS)]
                axis.scatter(
                    *means[i, [x, y]],
                    42,
                    ORANGE,
                    marker=marker,
                    edgecolors=INK,
                    linewidths=0.6,
                    label=point.label,
                )
            axis.set_xlabel(OBJECTIVES[x])
            axis.set_ylabel(OBJECTIVES[y])
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)


def _agent(folder: Path, task: Task, point: Point) -> Agent:
    if point.kind == "policy":
        return PolicyAgent(load_policy(folder), preference=point.plays)
    if point.kind == "constants":
        return ConstantAgent(to_action(task.grid.at([point.plays])[0]))
    return load_agent(point.plays, task)


def _mixture(preference: NDArray[np.float64]) -> str:
    """A preference in a table's words: "0.5 goodput + 0.5 quality"."""
    parts = zip(preference, OBJECTIVES, strict=True)
    return " + ".join(f"{weight:g} {name}" for weight, name in parts if weight)


def _setting(task: Task, action: NDArray[np.void]) -> str:
    """What of a constant the task grants."""
    values = to_action(action[0]).model_dump(mode="json")
    return ", ".join(f"{name} {values[name]}" for name in task.controls)


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except InputError as error:
        sys.exit(f"pareto: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
