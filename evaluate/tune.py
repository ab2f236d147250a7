"""Tune the reactive rule to a task: random search, then changes to the best rules found.

    python -m evaluate.tune --task bursty_workload --out tuned.toml

The budget is counted in episodes, as that of the search for the best constant action: the two compare.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import annotated_types
import numpy as np
import tyro
from tqdm import tqdm

from llmserve_env.agents.reactive import ReactiveAgent, ReactiveRule
from llmserve_env.errors import InputError
from llmserve_env.files import write_atomic
from llmserve_env.play import play
from llmserve_env.tasks import TRAINING_SEEDS, Task, load_task

Progress = Callable[[int], object]
"""Called with the number of episodes that were played."""

FIRST_SEEDS = 4
"""Episodes in which every random rule is tried."""

KEPT = 8
"""Rules that are carried on; each round tries as many changed ones."""


@dataclass
class Found:
    """The best rule so far.

    Attributes:
        rule: its parameters.
        score: its mean score over the tuning seeds that it was played on.
        episodes: episodes played so far by all rules.
    """

    rule: ReactiveRule
    score: float
    episodes: int = 0


def tune_rule(
    task: Task,
    seeds: Sequence[int],
    episodes: int,
    progress: Progress | None = None,
    best: Found | None = None,
) -> tuple[ReactiveRule, float]:
    """The rule with the best mean score over seeds, of those that a budget of episodes can try.

    A third of the budget plays random rules on the first seeds, half of them with only some parameters
    redrawn; the rest plays changed copies of the best on all seeds. The search itself is fixed by the seeds.

    Args:
        task: what is played.
        seeds: training seeds; every later rule plays all of them.
        episodes: budget, at least enough for one round on all seeds.
        progress: called after each round.
        best: kept up to date with the best so far, for whoever interrupts.

    Returns:
        The rule and its mean score over `seeds`.

    Raises:
        InputError: a seed is none of training, or the budget is too small.
    """
    if not all(seed in TRAINING_SEEDS for seed in seeds) or not len(seeds):
        raise InputError(
            f"expected seeds of training, {TRAINING_SEEDS.start} to {TRAINING_SEEDS.stop - 1}", field="seeds"
        )
    least = len(seeds) * 2 * KEPT + min(FIRST_SEEDS, len(seeds))
    if episodes < least:
        raise InputError(f"expected {least} or more, found {episodes}", field="episodes")
    best = best or Found(ReactiveRule(), -np.inf)
    best.rule, best.score, best.episodes = ReactiveRule(), -np.inf, 0
    rng = np.random.default_rng(len(seeds))
    names = tunable(task)

    def means(rules: Sequence[ReactiveRule], on: Sequence[int]) -> list[float]:
        pairs = [(rule, seed) for rule in rules for seed in on]
        scores = []
        for low in range(0, len(pairs), 128):
            part = pairs[low : low + 128]
            agent = ReactiveAgent([rule for rule, _ in part])
            scores.append(play(agent, task, [seed for _, seed in part], size=128, threads=None).scores)
        best.episodes += len(pairs)
        if progress is not None:
            progress(len(pairs))
        return [float(mean) for mean in np.concatenate(scores).reshape(len(rules), -1).mean(axis=1)]

    first = list(seeds[:FIRST_SEEDS])
    count = max(episodes // 3 // len(first), 1)
    drawn = [ReactiveRule()]
    drawn += [changed(drawn[0], rng, names, share=0.3 if i % 2 else 1.0) for i in range(count - 1)]
    pool: list[tuple[float, ReactiveRule]] = []
    tried: list[tuple[float, ReactiveRule]] = []
    for low in range(0, count, 32):
        part = drawn[low : low + 32]
        tried += zip(means(part, first), part, strict=True)
        score, rule = max(tried, key=_score)
        best.rule, best.score = rule, score
    children = [rule for _, rule in sorted(tried, key=_score, reverse=True)[: 2 * KEPT]]
    while best.episodes + len(children) * len(seeds) <= episodes:
        pool += zip(means(children, seeds), children, strict=True)
        pool = sorted(pool, key=_score, reverse=True)[:KEPT]
        best.score, best.rule = pool[0]
        spread = 1.0 - best.episodes / episodes  # from bold to careful
        children = [_child(pool, rng, names, spread) for _ in range(KEPT)]
    return best.rule, best.score


def tunable(task: Task) -> list[str]:
    """Parameters that are searched: those of admission where the task grants it, and all others."""
    granted = "admission_rate" in task.controls
    return [name for name in ReactiveRule.model_fields if granted or not name.startswith("admission_")]


def _child(
    pool: Sequence[tuple[float, ReactiveRule]], rng: np.random.Generator, names: Sequence[str], spread: float
) -> ReactiveRule:
    """One of the best rules with parameters of another and a few changed ones."""
    mother, father = (pool[min(int(rng.geometric(0.3)) - 1, len(pool) - 1)][1] for _ in range(2))
    mixed = {name: getattr(father if rng.random() < 0.2 else mother, name) for name in names}
    if rng.random() < 0.3:
        return changed(ReactiveRule(**mixed), rng, names, share=0.1)
    return changed(ReactiveRule(**mixed), rng, names, share=0.2, spread=0.05 + 0.15 * spread)


def changed(
    rule: ReactiveRule,
    rng: np.random.Generator,
    names: Sequence[str],
    share: float,
    spread: float | None = None,
) -> ReactiveRule:
    """A rule with some parameters changed, at least one.

    Args:
        rule: is copied.
        rng: draws.
        names: of the parameters that may change.
        share: of the parameters that change.
        spread: standard deviation of a change, as a share of the parameter's range, on a logarithmic scale
            where the range spans a decade; None draws them anew, uniformly on that scale.
    """
    chosen = [name for name in names if rng.random() < share] or [names[int(rng.integers(len(names)))]]
    values = rule.model_dump()
    for name in chosen:
        values[name] = _drawn(name, values[name], rng, spread)
    return ReactiveRule(**values)


def _drawn(name: str, value: Any, rng: np.random.Generator, spread: float | None) -> Any:
    field = ReactiveRule.model_fields[name]
    choices = get_args(field.annotation)
    if choices:
        return choices[rng.integers(len(choices))]
    low = next(float(mark.ge) for mark in field.metadata if isinstance(mark, annotated_types.Ge))  # type: ignore[arg-type]
    high = next(float(mark.le) for mark in field.metadata if isinstance(mark, annotated_types.Le))  # type: ignore[arg-type]
    logarithmic = low > 0 and high / low >= 10
    ends = np.log([low, high]) if logarithmic else np.array([low, high])
    if spread is None:
        place = rng.uniform(*ends)
    else:
        here = np.log(value) if logarithmic else value
        place = np.clip(here + rng.normal(0.0, spread) * (ends[1] - ends[0]), *ends)
    drawn = float(np.exp(place) if logarithmic else place)
    if field.annotation is int:
        step = round(drawn)
        if spread is not None and step == value:  # a change of an integer is one step or more
            step += int(rng.choice([-1, 1]))
        return int(np.clip(step, low, high))
    return float(np.clip(float(f"{drawn:.3g}"), low, high))


def _score(entry: tuple[float, ReactiveRule]) -> float:
    return entry[0]


def to_toml(task: str, found: Found, source: str, seeds: Sequence[int]) -> str:
    """The rule as a table of llmserve_env/agents/data/tuned.toml."""
    lines = [f"{name} = {value}" for name, value in found.rule.model_dump().items()]
    lines += [f"episodes = {found.episodes}", f"score = {found.score:.4f}"]
    lines += [f'seeds = "{seeds[0]}..{seeds[-1]}"', f'source = "{source}"']
    return "\n".join([f"[{task}.reactive]", *lines, ""])


@dataclass
class Arguments:
    """Tune the reactive rule to a task, on seeds of training.

    Attributes:
        task: id of a task, or a task file.
        out: file of the tuned parameters, a table as in agents/data/tuned.toml.
        episodes: budget of episodes.
        seeds: number of seeds on which every rule is judged in the end: 0, 1, ...
    """

    task: str
    out: Path
    episodes: int = 6000
    seeds: int = 24


def main(arguments: Arguments) -> int:
    """Tune and write; after Ctrl-C the best so far."""
    task, seeds = load_task(arguments.task), range(arguments.seeds)
    best, status = Found(ReactiveRule(), -np.inf), 0
    with tqdm(total=arguments.episodes, unit="episode") as bar:

        def progress(count: int) -> None:
            bar.update(count)
            bar.set_postfix_str(f"best {best.score:.4f}")

        try:
            tune_rule(task, seeds, arguments.episodes, progress, best)
        except KeyboardInterrupt:
            print("interrupted: this is the best so far", file=sys.stderr)
            status = 130
    source = f"python -m evaluate.tune --task {task.id} --episodes {arguments.episodes}"
    table = to_toml(task.id, best, f"{source} --seeds {arguments.seeds}", seeds)
    write_atomic(arguments.out, table)
    print(table + f"wrote {arguments.out}")
    return status


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Arguments, description=__doc__)))
    except InputError as error:
        sys.exit(f"tune: {error}")
