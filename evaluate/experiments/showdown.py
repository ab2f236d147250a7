"""All agents on all tasks, on the same evaluation seeds: who is better, by how much, and how sure that is.

    python -m evaluate.experiments.showdown
    python -m evaluate.experiments.showdown --agents best-constant reactive ppo mine=out/{task} --loads 1 2

Writes each agent's scores in each setting, and from them the tables and pictures of `showdown_report` to the
same folder. The same command goes on where it was stopped; one with more agents plays only these.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from evaluate.evaluate import agent_labels, choose_seeds, measure, open_settings
from evaluate.experiments.showdown_report import write_report
from llmserve_env.agents import AGENTS, CONTROLLERS
from llmserve_env.agents.trained import SHIPPED
from llmserve_env.errors import InputError
from llmserve_env.tasks import list_tasks

OWN = "own"


@dataclass
class Arguments:
    """Who plays what.

    Attributes:
        agents: names of agents, folders of policies ("{task}" in them stands for the task's id) and
            llm:MODEL@URL, each with LABEL= before it if it is to be reported under another name.
        tasks: ids of tasks, or paths of task files.
        episodes: episodes of each agent in each setting, 2 or more.
        llm_episodes: episodes of them that a language model plays, the first ones, 2 or more.
        workload: URI that takes the place of the tasks' traffic.
        profiles: names of hardware and model; "own" for the task's.
        loads: factors on all arrival rates, 0.5 to 2.
        baseline: label of the agent with which the others are compared.
        jobs: number of processes.
        ray: address of a Ray cluster to play on, auto or HOST:PORT; local starts one of `jobs` processes.
        out: folder of the results.
        first_seed: first seed (default: the first of evaluation).
        other_seeds: whether seeds may be none of evaluation; the results are marked so.
    """

    agents: tuple[str, ...] = (*AGENTS, *CONTROLLERS, *SHIPPED)
    tasks: tuple[str, ...] = list_tasks()
    episodes: int = 50
    llm_episodes: int = 2
    workload: str | None = None
    profiles: tuple[str, ...] = (OWN,)
    loads: tuple[float, ...] = (1.0,)
    baseline: str = "best-constant"
    jobs: int = 2
    ray: str | None = None
    out: Path = Path("out/showdown")
    first_seed: int | None = None
    other_seeds: bool = False


def main(arguments: Arguments) -> None:
    """Play what is missing, and report."""
    seeds = choose_seeds(arguments.episodes, arguments.first_seed, arguments.other_seeds)
    if arguments.llm_episodes < 2:
        raise InputError(f"expected 2 or more, found {arguments.llm_episodes}", field="llm_episodes")
    agents = agent_labels(arguments.agents)
    if arguments.baseline not in agents:
        raise InputError(f"expected one of {', '.join(agents)}", field="baseline")
    settings = open_settings(
        arguments.tasks,
        workload=arguments.workload,
        profiles=[None if profile == OWN else profile for profile in arguments.profiles],
        loads=arguments.loads,
    )
    found = measure(
        agents,
        settings,
        seeds,
        arguments.out,
        processes=arguments.jobs,
        cluster=arguments.ray,
        official=not arguments.other_seeds,
        llm_episodes=arguments.llm_episodes,
    )
    print(write_report(found, seeds, arguments.baseline, arguments.out))


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except InputError as error:
        sys.exit(f"showdown: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from here")
