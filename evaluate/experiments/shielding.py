"""What a shield does for agents: each with and without it, on the same episodes.

    python -m evaluate.experiments.shielding --picture docs/images/shielding.png
    python -m evaluate.experiments.shielding --task bursty_workload --agents random defaults mine=out/policy

Of every episode it measures

- the score and the goodput: requests within their SLO per second;
- how long the service takes to recover after a surge: from its end to the beginning of the first `SPAN_S`
  seconds in which `RECOVERED` of the requests that arrive are answered in time. Where that does not come
  before the next surge or the end, the time until then counts, so that the true time is longer;
- how even latency is: the standard deviation over windows of the mean time to first token, of the requests
  whose first token came in the window;
- the autonomy rate, the share of windows in which the agent's own action stood, and interventions by rule.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro

from evaluate.evaluate import agent_labels, choose_seeds
from evaluate.experiments.spiral import in_time_after, surges_of
from llmserve_env.agents import Shield
from llmserve_env.agents.find import SHIELDED, find_agent
from llmserve_env.agents.shield import RULES
from llmserve_env.episode import prepare
from llmserve_env.errors import InputError
from llmserve_env.files import write_atomic
from llmserve_env.play import play
from llmserve_env.report.figures import BLUE, GREY, INK, ORANGE, check_suffix, picture_file
from llmserve_env.report.provenance import made_by
from llmserve_env.report.stats import Interval, interval, iqm, paired_difference
from llmserve_env.tasks import Task, load_task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

SPAN_S = 30.0
"""Time over which it is seen whether a service has recovered (s): the clients' deadline in `death_spiral`."""

RECOVERED = 0.8
"""Share of the arrivals within their SLO from which on it has."""

MEASURES = {
    "score": ("score", 3),
    "goodput": ("goodput (/s)", 2),
    "recovery_s": ("time to recover (s)", 0),
    "recovered": ("surges recovered from", 2),
    "in_time_after": ("in time after surges", 2),
    "ttft_sd_s": ("sd of TTFT (s)", 2),
}
"""Titles of columns, and their digits."""


@dataclass
class Arguments:
    """Who plays what.

    Attributes:
        task: id of a task, or path of a task file.
        agents: names or folders of policies, each with LABEL= before it if it is to be called otherwise.
        episodes: episodes of each agent with and without the shield, 2 or more.
        jobs: number of processes.
        out: folder of shielding-TASK.md and .json.
        picture: file to draw an episode to.
        episode: index of the episode that is drawn.
        first_seed: first seed (default: the first of evaluation).
        other_seeds: whether seeds may be none of evaluation; the results are marked so.
    """

    task: str = "death_spiral"
    agents: tuple[str, ...] = ("random", "defaults", "best-constant", "reactive", "aimd", "ppo")
    episodes: int = 50
    jobs: int = 2
    out: Path = Path("out/shielding")
    picture: Path | None = None
    episode: int = 2
    first_seed: int | None = None
    other_seeds: bool = False


@dataclass
class Measured:
    """What came of an agent's episodes.

    Attributes:
        values: float64[seeds] by the names of `MEASURES`; nan where an episode has no such time.
        autonomy: float64[seeds], None without a shield.
        interventions: int64[seeds, rules], in the order of RULES; None without a shield.
        arrived: float64[windows, seeds], requests per second that arrive.
        in_slo: float64[windows, seeds], and those within their SLO.
        waiting: int64[windows, seeds], requests that wait at the end.
    """

    values: dict[str, NDArray[np.float64]]
    autonomy: NDArray[np.float64] | None
    interventions: NDArray[np.int64] | None
    arrived: NDArray[np.float64] = field(repr=False)
    in_slo: NDArray[np.float64] = field(repr=False)
    waiting: NDArray[np.int64] = field(repr=False)


def recovery_s(
    surges: Sequence[tuple[float, float]],
    start_s: NDArray[np.float64],
    end_s: NDArray[np.float64],
    arrived: NDArray[np.int64],
    in_slo: NDArray[np.int64],
) -> list[tuple[float, bool]]:
    """How long a service took after each surge of an episode, and whether it has recovered at all.

    Args:
        surges: begin and end of each (s).
        start_s: float64[windows].
        end_s: float64[windows].
        arrived: int64[windows], requests.
        in_slo: int64[windows], requests within their SLO.

    Returns:
        (seconds, recovered) of each surge that leaves `SPAN_S` or more before the next one or the end.
    """
    found = []
    begins = [begin_s for begin_s, _ in surges[1:]] + [float(end_s.max())]
    for (_, over_s), until_s in zip(surges, begins, strict=True):
        if until_s - over_s < SPAN_S:
            continue
        for window in np.flatnonzero((start_s >= over_s) & (start_s + SPAN_S <= until_s)):
            span = (start_s >= start_s[window]) & (end_s <= start_s[window] + SPAN_S)
            if in_slo[span].sum() >= RECOVERED * arrived[span].sum():
                found.append((float(start_s[window] - over_s), True))
                break
        else:
            found.append((until_s - over_s, False))
    return found


def measure(plays: str, task_source: str, seeds: Sequence[int]) -> Measured:
    """Play an agent's episodes.

    Args:
        plays: as `find_agent` takes it.
        task_source: id or path of the task.
        seeds: of the episodes.
    """
    task = load_task(task_source)
    agent, rows = find_agent(plays, task), []
    played = play(
        agent, task, seeds, size=len(seeds), watch=lambda batch, _: rows.append(batch.windows.copy())
    )
    windows = np.array(rows)
    windows[1:][windows["end_s"][1:] == windows["end_s"][:-1]] = 0  # of episodes that were over before
    in_slo = windows["tenant_in_slo"].sum(axis=2)
    values = {
        "score": played.scores,
        "goodput": in_slo.sum(axis=0) / task.horizon_s,
        "ttft_sd_s": _spread(windows),
        **_after_surges(task, seeds, windows, in_slo),
    }
    shield = agent if isinstance(agent, Shield) else None
    return Measured(
        values,
        None if shield is None else shield.autonomy_rate,
        None if shield is None else shield.interventions,
        windows["arrived"] / task.window_s,
        in_slo / task.window_s,
        windows["waiting"],
    )


def _spread(windows: NDArray[np.void]) -> NDArray[np.float64]:
    """float64[seeds], standard deviation over windows of the mean TTFT (s), of those with a first token."""
    ttft_s = np.where(windows["first_tokens"] > 0, windows["mean_ttft_s"], np.nan)
    spread: NDArray[np.float64] = np.nanstd(ttft_s, axis=0)
    return spread


def _after_surges(
    task: Task, seeds: Sequence[int], windows: NDArray[np.void], in_slo: NDArray[np.int64]
) -> dict[str, NDArray[np.float64]]:
    """Time to recover, share of surges recovered from and requests in time after surges, float64[seeds]."""
    if task.scenario is None or not any("surge" in regime.name for regime in task.scenario.regimes):
        return {}
    mean_s, share = np.full(len(seeds), np.nan), np.full(len(seeds), np.nan)
    for column, seed in enumerate(seeds):
        one = windows[:, column]
        found = recovery_s(
            surges_of(task, seed), one["start_s"], one["end_s"], one["arrived"], in_slo[:, column]
        )
        if found:
            mean_s[column], share[column] = np.mean(found, axis=0)
    return {"recovery_s": mean_s, "recovered": share, "in_time_after": in_time_after(task, seeds, windows)}


def main(arguments: Arguments) -> None:
    """Play, write the files and print the tables."""
    seeds = choose_seeds(arguments.episodes, arguments.first_seed, arguments.other_seeds)
    if not 0 <= arguments.episode < len(seeds):
        raise InputError(f"expected 0 to {len(seeds) - 1}, found {arguments.episode}", field="episode")
    if arguments.picture is not None:
        check_suffix(arguments.picture)
    task, agents = load_task(arguments.task), agent_labels(arguments.agents)
    for plays in agents.values():
        if plays.startswith(SHIELDED):
            raise InputError(f"expected agents without a shield, found {plays}", field="agents")
        find_agent(plays, task).reset(task, seeds[:1])  # refuses what cannot play, before anything is played
    names = [(label, plays) for label in agents for plays in (agents[label], SHIELDED + agents[label])]
    jobs = ([plays for _, plays in names], repeat(arguments.task), repeat(seeds))
    if arguments.jobs < 2:
        found = list(map(measure, *jobs))
    else:
        prepare()
        with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
            found = list(pool.map(measure, *jobs))
    pairs = {label: (found[2 * i], found[2 * i + 1]) for i, label in enumerate(agents)}
    text = report(pairs, task, seeds, official=not arguments.other_seeds)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"shielding-{task.id}.md"
    write_atomic(path, text)
    content: dict[str, Any] = {
        "task": task.id,
        "seeds_of": "other" if arguments.other_seeds else "evaluation",
        "seeds": seeds,
    }
    content |= {"made_by": made_by(), "agents": {label: _json(*pair) for label, pair in pairs.items()}}
    write_atomic(path.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
    print(text + f"\nwrote {path}\nwrote {path.with_suffix('.json')}")
    if arguments.picture is not None:
        _draw(arguments.picture, task, seeds[arguments.episode], arguments.episode, pairs)
        print(f"wrote {arguments.picture}")


def report(
    pairs: Mapping[str, tuple[Measured, Measured]], task: Task, seeds: Sequence[int], *, official: bool
) -> str:
    """The tables as Markdown.

    Args:
        pairs: by agent, without and with the shield.
        task: that was played.
        seeds: of the episodes.
        official: whether they are those of evaluation.
    """
    shown = [name for name in MEASURES if name in next(iter(pairs.values()))[0].values]
    titles = [MEASURES[name][0] for name in shown]
    levels, differences, rules = [], [], []
    for label, (bare, shielded) in pairs.items():
        for name, each in ((label, bare), (f"{label}, shielded", shielded)):
            levels.append([name, *(_cell(_level(each, key), MEASURES[key][1]) for key in shown)])
        differences.append(
            [label, *(_cell(_difference(bare, shielded, key), MEASURES[key][1]) for key in shown)]
        )
        assert shielded.autonomy is not None
        assert shielded.interventions is not None
        by_rule = [f"{mean:.1f}" for mean in shielded.interventions.mean(axis=0)]
        rules.append([label, _cell(interval(shielded.autonomy, np.mean), 3), *by_rule])
    title = (
        f"`{task.id}`, {len(seeds)} seeds, {seeds[0]} to {seeds[-1]}, the same for all. Scores are "
        "interquartile means, all else means over episodes, with 95% intervals."
    )
    if not official:
        title += " **These are not seeds of evaluation: no results to report.**"
    parts = [
        title,
        _table(["", *titles], levels),
        "Shielded − bare, seed by seed:",
        _table(["", *titles], differences),
        f"Share of windows in which the agent's own action stood, and interventions in an episode of "
        f"{task.windows} windows:",
        _table(["", "autonomy rate", *(rule.upper() for rule in RULES)], rules),
    ]
    return "\n\n".join(parts) + "\n"


def _level(measured: Measured, name: str) -> Interval | None:
    values = measured.values[name]
    values = values[np.isfinite(values)]
    return interval(values, iqm if name == "score" else np.mean) if len(values) > 1 else None


def _difference(bare: Measured, shielded: Measured, name: str) -> Interval | None:
    both = np.isfinite(bare.values[name]) & np.isfinite(shielded.values[name])
    if both.sum() < 2:
        return None
    return paired_difference(shielded.values[name][both], bare.values[name][both])


def _cell(found: Interval | None, digits: int) -> str:
    if found is None:
        return "–"
    estimate, low, high = (f"{round(end, digits) + 0.0:.{digits}f}" for end in asdict(found).values())
    return f"{estimate} [{low}, {high}]"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _json(bare: Measured, shielded: Measured) -> dict[str, Any]:
    """Every episode's figures; null where an episode has no such time."""

    def listed(measured: Measured) -> dict[str, Any]:
        return {
            name: [value if np.isfinite(value) else None for value in values.tolist()]
            for name, values in measured.values.items()
        }

    assert shielded.autonomy is not None
    assert shielded.interventions is not None
    differences = {name: _difference(bare, shielded, name) for name in bare.values}
    return {
        "bare": listed(bare),
        "shielded": {
            **listed(shielded),
            "autonomy_rate": shielded.autonomy.tolist(),
            "interventions": dict(zip(RULES, shielded.interventions.T.tolist(), strict=True)),
        },
        "shielded_minus_bare": {name: found and asdict(found) for name, found in differences.items()},
    }


def _draw(
    path: Path, task: Task, seed: int, column: int, pairs: Mapping[str, tuple[Measured, Measured]]
) -> None:
    """Goodput and queue of an episode, an agent a row."""
    with picture_file(path, (10.0, 0.9 + 1.15 * len(pairs))) as figure:
        panels = figure.subplots(len(pairs), 2, sharex=True, sharey="col", squeeze=False)
        for (left, right), (label, (bare, shielded)) in zip(panels, pairs.items(), strict=True):
            time_s = task.window_s * np.arange(1, len(bare.in_slo) + 1)
            for axes in (left, right):
                _mark_surges(axes, task, seed)
            left.plot(time_s, bare.arrived[:, column], color=INK, lw=0.7, label="requests that arrive")
            for measured, colour, name in ((bare, GREY, "without shield"), (shielded, BLUE, "with shield")):
                left.plot(time_s, measured.in_slo[:, column], color=colour, lw=1.3, label=name)
                right.plot(time_s, measured.waiting[:, column], color=colour, lw=1.3)
            left.set_ylabel(label, rotation=0, ha="right", va="center")
            left.set_xlim(0, task.horizon_s)
            right.set_yscale("symlog", linthresh=10)
        panels[0, 1].set_ylim(bottom=0)  # of all, now that all is drawn
        panels[0, 0].set_title("requests within their SLO per second")
        panels[0, 1].set_title("waiting requests")
        for axes in panels[-1]:
            axes.set_xlabel("time (s)")
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def _mark_surges(axes: Axes, task: Task, seed: int) -> None:
    surges = [] if task.scenario is None else surges_of(task, seed)
    for number, (begin_s, end_s) in enumerate(surges):
        axes.axvspan(begin_s, end_s, color=ORANGE, alpha=0.12, lw=0, label="" if number else "surge")


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except InputError as error:
        sys.exit(f"shielding: {error}")
