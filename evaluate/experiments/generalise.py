"""What trained policies keep of their advantage elsewhere: on real traces, other hardware and other loads.

    python -m evaluate.experiments.generalise --azure FILE --mooncake FILE --servegen FILE \
        --servegen-lengths FILE

plays the policies, and what they are compared with, on the tasks that they were trained on and on these tasks
with something changed; docs/generalisation.md says how traces are fitted to a task. Traces are not shipped,
and those that are not given are left out:

    AzureLLMInferenceTrace_conv.csv   github.com/Azure/AzurePublicDataset, data/; CC-BY-4.0
    conversation_trace.jsonl          github.com/kvcache-ai/Mooncake, FAST25-release/traces/; Apache-2.0
    ServeGen's clients, their lengths github.com/alibaba/ServeGen, data/**/chunk-*-trace.csv, -dataset.json,
                                      as tables that docs/workloads.md describes (servegen://); Apache-2.0

The same command goes on where it was stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import tyro

from evaluate.constants import Found, search_constants
from evaluate.evaluate import agent_labels, choose_seeds, measure, open_settings
from evaluate.experiments.generalise_report import CONSTANT, Place, write_report
from evaluate.fit import Fit, fit_servegen, fit_trace, write_tenants
from evaluate.jobs import Setting
from llmserve_env.errors import InputError
from llmserve_env.hardware import load_profile

TASKS = ("bursty_workload", "adversarial_multitenant", "death_spiral", "static_workload")
PROFILES = (
    "rtxpro6000-llama-3.1-8b",
    "a100-llama-3.1-8b",
    "h100-llama-3.1-8b",
    "h100x4-llama-3.1-70b",
)
"""What can serve the tasks: a card of 24 GB, at their rates, cannot, and one like another adds nothing."""


@dataclass
class Arguments:
    """Who plays where.

    Attributes:
        policies: folders of policies of several training seeds, whose mean is reported as "ppo"; "{task}" in
            them stands for the task's id.
        references: names of agents to show beside them and the best constant.
        tasks: ids of tasks, or paths of task files.
        azure: Azure's conversation trace of 2023.
        mooncake: Mooncake's conversation trace.
        servegen: ServeGen's client table.
        servegen_lengths: ServeGen's table of its clients' length quantiles.
        servegen_model: name of the model in ServeGen's tables.
        profiles: hardware and model that take the place of a task's; its own is left out.
        loads: factors on all arrival rates, 0.5 to 2.
        episodes: episodes of each agent in each place, 2 or more.
        constants: configurations that are tried anew in each place, for a constant that fits it; 0 for none.
        jobs: number of processes.
        out: folder of the results.
        first_seed: first seed (default: the first of evaluation).
        other_seeds: whether seeds may be none of evaluation; the results are marked so.
    """

    policies: tuple[str, ...] = ("ppo-1", "ppo-2", "ppo-3")
    references: tuple[str, ...] = ("defaults", "reactive", "bc")
    tasks: tuple[str, ...] = TASKS
    azure: Path | None = None
    mooncake: Path | None = None
    servegen: Path | None = None
    servegen_lengths: Path | None = None
    servegen_model: str = "language/m-large"
    profiles: tuple[str, ...] = PROFILES
    loads: tuple[float, ...] = (0.5, 0.75, 1.5, 2.0)
    episodes: int = 20
    constants: int = 64
    jobs: int = 2
    out: Path = Path("out/generalise")
    first_seed: int | None = None
    other_seeds: bool = False


def main(arguments: Arguments) -> None:
    """Play what is missing, and report."""
    seeds = choose_seeds(arguments.episodes, arguments.first_seed, arguments.other_seeds)
    policies = agent_labels(arguments.policies)
    agents = {CONSTANT: CONSTANT, **agent_labels(arguments.references), **policies}
    for name in ("azure", "mooncake", "servegen"):
        if getattr(arguments, name) is None:
            print(f"without --{name}: see --help for where it comes from", file=sys.stderr)
    places: dict[str, list[Place]] = {task: list(_places(task, arguments)) for task in arguments.tasks}
    settings = [place.setting for each in places.values() for place in each]
    found = measure(
        agents,
        settings,
        seeds,
        arguments.out,
        processes=arguments.jobs,
        official=not arguments.other_seeds,
    )
    constants: Mapping[Setting, Found] = {}
    if arguments.constants:
        constants = search_constants(
            settings,
            seeds,
            arguments.constants,
            arguments.out / "constants",
            processes=arguments.jobs,
        )
    print(write_report(found, constants, places, policies=list(policies), seeds=seeds, out=arguments.out))


def _places(task_id: str, arguments: Arguments) -> Iterator[Place]:
    """The task itself, then where else it is played."""
    (own,) = open_settings([task_id])
    task = own.open()
    yield Place("the task itself", own)
    for load in arguments.loads:
        if load != 1.0:
            yield Place(f"{load:g} times the load", open_settings([task_id], loads=[load])[0])
    for profile in arguments.profiles:
        name = load_profile(profile).name
        if name != task.profile.name:
            yield Place(f"on {name}", open_settings([task_id], profiles=[profile])[0])
    fits: dict[str, Fit] = {}
    if any((arguments.azure, arguments.mooncake, arguments.servegen)):
        mix = write_tenants(task, arguments.out / "tenants")
        for name in ("azure", "mooncake"):
            path = getattr(arguments, name)
            if path is not None:
                fits[f"traffic of {name.capitalize()}"] = fit_trace(task, path, mix)
        if arguments.servegen is not None:
            if arguments.servegen_lengths is None:
                raise InputError("expected the clients' length quantiles", field="servegen_lengths")
            fits["traffic of ServeGen"] = fit_servegen(
                task, arguments.servegen, arguments.servegen_lengths, arguments.servegen_model, mix
            )
    for label, fit in fits.items():
        yield Place(label, open_settings([task_id], workload=fit.workload)[0], fit)


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except InputError as error:
        sys.exit(f"generalise: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from here")
