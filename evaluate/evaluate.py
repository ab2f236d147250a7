"""Scores of an agent, on seeds that nothing was trained or tuned on.

    python -m evaluate.evaluate --agent reactive --task all --episodes 50
    python -m evaluate.evaluate --agent out/bursty --task bursty_workload --load 1.5

An agent is a name (see `llmserve_env.agents.load_agent`), the folder of a trained policy, in which "{task}"
stands for the task's id, or llm:MODEL@URL, a language model (see `evaluate.llm`). The same command goes on
where it was stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from evaluate.jobs import Job, Setting, play_job
from evaluate.runners import play_jobs
from evaluate.scores import Scores, begin_scores, profile_name, scores_path
from llmserve_env.agents import lacks_weights
from llmserve_env.agents.find import SHIELDED, find_agent
from llmserve_env.agents.llm import LLM, llm_label
from llmserve_env.errors import InputError
from llmserve_env.report.stats import interval
from llmserve_env.tasks import EVALUATION_SEEDS, Task, list_tasks

PART = 10
"""Episodes of a job. Jobs begin at fixed places, so that what is played side by side, and with it the last
bit of a network's output, depends on neither the processes nor where the work was stopped."""

OUT = Path("out/evaluate")


def choose_seeds(episodes: int, first_seed: int | None, other_seeds: bool) -> list[int]:
    """Seeds to play: the first ones of evaluation unless others are asked for.

    Args:
        episodes: number of episodes, 2 or more.
        first_seed: where they begin.
        other_seeds: that seeds which are none of evaluation are meant.

    Raises:
        InputError: seeds are none of evaluation and `other_seeds` does not say so, or they are and it does.
    """
    if episodes < 2:
        raise InputError(f"expected 2 or more, found {episodes}", field="episodes")
    first = EVALUATION_SEEDS.start if first_seed is None else first_seed
    seeds = list(range(first, first + episodes))
    within = [seed in EVALUATION_SEEDS for seed in seeds]
    if first < 0 or (not all(within) and not other_seeds):
        raise InputError(
            f"expected seeds of evaluation, {EVALUATION_SEEDS.start} to {EVALUATION_SEEDS.stop - 1}; scores "
            "on others are no results to report, and --other-seeds marks them so",
            field="first_seed",
        )
    if any(within) and other_seeds:
        raise InputError("these are seeds of evaluation: leave it out", field="other_seeds")
    return seeds


def measure(
    agents: Mapping[str, str],
    settings: Sequence[Setting],
    seeds: Sequence[int],
    out: Path,
    *,
    processes: int = 1,
    cluster: str | None = None,
    official: bool = True,
    llm_episodes: int | None = None,
) -> dict[tuple[str, Setting], Scores]:
    """Play agents in settings, or what is not there yet, and write their scores.

    Args:
        agents: what `find_agent` takes, by the names under which they are reported.
        settings: what is played.
        seeds: the same for all.
        out: folder of the files, see `scores_path`.
        processes: to play in.
        cluster: address of a Ray cluster to play on instead.
        official: whether the seeds are those of evaluation.
        llm_episodes: of a language model, the first ones (default: all).

    Returns:
        Scores by agent and setting; those of an agent that a task does not suit are left out.

    Raises:
        InputError: an agent or a setting cannot be used, or a file holds something else.
    """
    found: dict[tuple[str, Setting], Scores] = {}
    jobs: list[Job] = []
    labels = {plays: label for label, plays in agents.items()}
    tasks = {setting: setting.open() for setting in settings}
    for setting, task in tasks.items():
        for label, plays in agents.items():
            if lacks_weights(plays, task.id):
                print(f"{label} does not play {task.id}: there are no weights for it", file=sys.stderr)
                continue
            asked = plays.startswith(LLM)
            if not asked and not _suits(label, plays, task, seeds):
                continue
            path = scores_path(out, label, setting, official=official)
            scores = begin_scores(path, label, plays, setting, task, official=official)
            found[label, setting] = scores
            parts = _jobs(plays, setting, seeds[:llm_episodes] if asked else seeds)
            if scores.seeds and not asked:
                _check_same(path, scores, plays, setting)
            jobs += [job for job in parts if not set(job.seeds) <= set(scores.seeds)]
    with tqdm(total=sum(len(job.seeds) for job in jobs), unit="episode", disable=not jobs or None) as bar:
        for job, played in play_jobs(jobs, processes, cluster):
            label = labels[job.agent]
            scores = found[label, job.setting]
            scores.add(job.seeds, played)
            scores.save(scores_path(out, label, job.setting, official=official))
            bar.update(len(job.seeds))
    return found


def _suits(label: str, plays: str, task: Task, seeds: Sequence[int]) -> bool:
    """Whether an agent can play a task; says why not."""
    agent = find_agent(plays, task)
    try:
        agent.reset(task, seeds[:1])
    except InputError as error:
        print(f"{label} does not play {task.id}: {error}", file=sys.stderr)
        return False
    return True


def _jobs(plays: str, setting: Setting, seeds: Sequence[int]) -> list[Job]:
    parts: dict[int, list[int]] = {}
    size = 1 if plays.startswith(LLM) else PART  # a model's answers are paid for: each episode is kept
    for seed in seeds:
        parts.setdefault(seed // size, []).append(seed)
    return [Job(plays, setting, tuple(part)) for part in parts.values()]


def _check_same(path: Path, scores: Scores, plays: str, setting: Setting) -> None:
    """Refuse scores that today's code would not give: the first seed is always played again."""
    again = float(play_job(Job(plays, setting, (scores.seeds[0],))).scores[0])
    if abs(again - scores.scores[0]) > 1e-9:
        raise InputError(
            f"seed {scores.seeds[0]} scored {scores.scores[0]}, and now {again}: the agent or the simulator "
            "has changed; remove it or give another --out",
            file=str(path),
        )


@dataclass
class Arguments:
    """What to play.

    Attributes:
        agent: name of an agent, or folder of a policy.
        task: id of a task, path of a task file, or all.
        episodes: number of episodes, 2 or more.
        workload: URI that takes the place of the task's traffic.
        profile: hardware and model that take the place of the task's.
        load: factor on all arrival rates, 0.5 to 2.
        jobs: number of processes.
        ray: address of a Ray cluster to play on, auto or HOST:PORT; local starts one of `jobs` processes.
        out: folder of the results.
        first_seed: first seed (default: the first of evaluation).
        other_seeds: whether seeds may be none of evaluation; the results are marked so.
    """

    agent: str
    task: str = "all"
    episodes: int = 50
    workload: str | None = None
    profile: str | None = None
    load: float = 1.0
    jobs: int = 2
    ray: str | None = None
    out: Path = OUT
    first_seed: int | None = None
    other_seeds: bool = False


def main(arguments: Arguments) -> None:
    """Play, write the files and print the table."""
    seeds = choose_seeds(arguments.episodes, arguments.first_seed, arguments.other_seeds)
    settings = open_settings(
        list_tasks() if arguments.task == "all" else (arguments.task,),
        workload=arguments.workload,
        profiles=(arguments.profile,),
        loads=(arguments.load,),
    )
    label = agent_labels([arguments.agent])
    found = measure(
        label,
        settings,
        seeds,
        arguments.out,
        processes=arguments.jobs,
        cluster=arguments.ray,
        official=not arguments.other_seeds,
    )
    if not found:
        raise InputError("plays none of the tasks", field="agent")
    print(table(found, seeds))
    for name, setting in found:
        print(f"wrote {scores_path(arguments.out, name, setting, official=not arguments.other_seeds)}")


def open_settings(
    tasks: Sequence[str],
    *,
    workload: str | None = None,
    profiles: Sequence[str | None] = (None,),
    loads: Sequence[float] = (1.0,),
) -> list[Setting]:
    """Every task with every profile and load."""
    from pydantic import ValidationError

    from llmserve_env.errors import as_input_error

    try:
        return [
            Setting(task=task, workload=workload, profile=profile, load=load)
            for task in tasks
            for profile in profiles
            for load in loads
        ]
    except ValidationError as error:
        raise as_input_error(error) from error


def agent_labels(agents: Sequence[str]) -> dict[str, str]:
    """What to play by the name under which it is reported.

    Args:
        agents: each as `find_agent` takes it, llm:MODEL@URL, or LABEL=AGENT; without a label a policy is
            reported under the name of its folder.

    Raises:
        InputError: two have the same label, or one is given twice.
    """
    found: dict[str, str] = {}
    for agent in agents:
        label, equals, plays = agent.partition("=")
        if agent.startswith(LLM):
            label, plays = llm_label(agent), agent
        elif not equals:
            shielded = SHIELDED if agent.startswith(SHIELDED) else ""
            label, plays = shielded + Path(agent.removeprefix(SHIELDED)).name, agent
        if label in found or plays in found.values():
            raise InputError(f"'{agent}' is there already; LABEL=AGENT gives it a name", field="agents")
        found[label] = plays
    return found


def table(found: Mapping[tuple[str, Setting], Scores], seeds: Sequence[int]) -> str:
    """Scores, their parts and what became of the requests, as Markdown."""
    names = list(next(iter(found.values())).components)
    header = ["task", "agent", "score", *names, "within SLO", "failed"]
    lines = ["| " + " | ".join(header) + " |", "|---|---|" + "---:|" * (len(header) - 2)]
    for (label, setting), scores in found.items():
        chosen = [i for i, seed in enumerate(scores.seeds) if seed in set(seeds)]
        parts = [np.mean(np.array(scores.components[name])[chosen]) for name in names]
        arrived = np.array(scores.requests["arrived"])[chosen].sum()
        shares = [np.array(scores.requests[name])[chosen].sum() / arrived for name in ("in_slo", "failed")]
        cells = [setting_label(setting), label, str(interval(scores.of(list(seeds))))]
        cells += [f"{part:.3f}" for part in parts] + [f"{share:.1%}" for share in shares]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"Interquartile mean over {len(seeds)} seeds with its 95% interval; parts are means."]
    if any(scores.seeds_of == "other" for scores in found.values()):
        lines.append("**These are not seeds of evaluation: no results to report.**")
    return "\n".join(lines)


def setting_label(setting: Setting) -> str:
    """A setting in a table's words."""
    parts = [Path(setting.task).stem]
    if setting.load != 1.0:
        parts.append(f"× {setting.load:g}")
    if setting.profile is not None:
        parts.append(f"on {profile_name(setting.profile)}")
    if setting.workload is not None:
        parts.append(f"with {setting.workload}")
    return " ".join(parts)


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except InputError as error:
        sys.exit(f"evaluate: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from here")
