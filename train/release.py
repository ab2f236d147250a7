"""Ship trained policies: finished runs of `train.ppo` and `train.bc` go to weights/TASK/NAME, with cards.

    python -m train.release --runs out/bursty/bc out/bursty/ppo-1 out/bursty/ppo-2 out/bursty/ppo-3
    python -m evaluate.experiments.showdown --out evaluate/results/showdown
    python -m train.release                   # all cards once more, with these results

NAME is bc for a clone and ppo-SEED for PPO. A policy that another was made from (`--init`, a teacher) is
shipped before it, so that the command in its card can be given as it stands. Cards hold the scores that lie
in the folder of results, and say of what is not there that it has not been measured.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import tyro

from evaluate.experiments.showdown_report import clairvoyant_gap
from evaluate.jobs import Setting
from evaluate.scores import Scores, policy_digest, read_scores, scores_path
from llmserve_env.agents.policy import WEIGHTS, Policy, PolicyAgent, PolicyConfig, load_policy, save_policy
from llmserve_env.agents.trained import SHIPPED
from llmserve_env.errors import InputError
from llmserve_env.files import write_atomic
from llmserve_env.report.provenance import made_on
from llmserve_env.report.stats import gap_share, interval, paired_difference
from llmserve_env.tasks import EVALUATION_SEEDS, list_tasks, load_task
from train import bc, ppo

CARD = "README.md"
BESIDE = ("best-constant", "reactive")
"""Agents whose scores stand in every card."""
_POLICIES = {"init", "teacher"}
"""Arguments that may name the folder of a policy."""
_ELSEWHERE = {"out", "resume", "wandb"}
"""Arguments that say nothing about how the policy was made."""


@dataclass
class Arguments:
    """What to ship."""

    runs: tuple[Path, ...] = ()
    """Folders of finished runs."""
    results: Path = Path("evaluate/results/showdown")
    """Folder that `evaluate.experiments.showdown` wrote."""
    commit: str | None = None
    """Commit that the runs were trained with (default: as they say themselves). A run that does not say on
    what machine is taken to have been made on this one."""
    weights: Path = Path("weights")
    """Folder to ship to."""


def main(args: Arguments) -> None:
    """Ship the runs, and write all cards and the table of them."""
    for run in args.runs:
        print(f"wrote {release(run, args.weights, args.commit)}")
    shipped = {
        task_id: [name for name in SHIPPED if (args.weights / task_id / name).is_dir()]
        for task_id in sorted(list_tasks())
    }
    rows: list[str] = []
    for task_id, names in shipped.items():
        scores = measured(args.results, args.weights, task_id, names)
        for name in names:
            config = load_policy(args.weights / task_id / name).config
            write_atomic(args.weights / task_id / name / CARD, card(config, name, scores))
            rows.append(_index_row(config, name, scores))
    write_atomic(args.weights / CARD, _index(rows))
    print(f"wrote {len(rows)} cards and {args.weights / CARD}")


def release(run: Path, weights: Path, commit: str | None = None) -> Path:
    """Copy a run's policy to where it is shipped.

    Args:
        run: folder of a finished run.
        weights: folder to ship to.
        commit: that it was trained with, None for what the run says.

    Returns:
        The folder of the copy.

    Raises:
        InputError: the run is not finished, is none of these trainers', or cannot be shipped; names the file.
    """
    policy = load_policy(run)
    training, config_file = dict(policy.config.training), str(run / "policy.json")
    task_id = policy.config.task_id
    if task_id not in list_tasks():
        raise InputError(f"expected a task of {', '.join(list_tasks())}", file=config_file, field="task_id")
    PolicyAgent(policy).reset(load_task(task_id), [0])  # its grid may have changed since
    given = training.get("arguments", {})
    if _known(given) is None:
        raise InputError("expected arguments of train.ppo or train.bc", file=config_file, field="training")
    if commit is None and "commit" not in training:
        raise InputError("it does not say with which commit it was trained: --commit does", file=config_file)
    if "run" not in training:
        raise InputError(
            "it does not say how long it took: --resume adds that", file=config_file, field="run"
        )
    _check_finished(given, training["run"], run)
    name = "bc" if "teacher" in given else f"ppo-{given['seed']}"
    if name not in SHIPPED:
        raise InputError(f"'{name}' is none of {', '.join(SHIPPED)}", file=config_file, field="seed")
    folder = weights / task_id / name
    given = {**given, "out": f"out/{task_id}/{name}", "resume": False}
    given |= {each: _shipped(given[each], weights / task_id, run) for each in _POLICIES & set(given)}
    training = {**made_on(), **training, "arguments": given}
    if commit is not None:
        training["commit"] = commit
    save_policy(folder, Policy(policy.config.model_copy(update={"training": training}), policy.weights))
    return folder


def command(config: PolicyConfig) -> str:
    """The command that made a policy."""
    given = config.training["arguments"]
    module = _known(given)
    assert module is not None, "see `release`"
    usual = json.loads(json.dumps(dataclasses.asdict(module.Arguments()), default=str))
    flags = {"task_id": given["task_id"], "seed": given["seed"]}
    flags |= {each: value for each, value in given.items() if value != usual[each] and each not in _ELSEWHERE}
    flags["out"] = given["out"]
    parts = ["python", "-m", module.__name__]
    for each, value in flags.items():
        flag = each.replace("_", "-")
        if isinstance(value, bool):
            parts.append(f"--{'' if value else 'no-'}{flag}")
        else:
            parts += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(parts)


def measured(results: Path, weights: Path, task_id: str, names: Sequence[str]) -> dict[str, Scores]:
    """Scores on evaluation seeds, of the agents that are in a task's cards, as far as they are there.

    Raises:
        InputError: they are of other weights than those that are shipped; names the file.
    """
    found: dict[str, Scores] = {}
    for name in (*BESIDE, *names):
        path = scores_path(results, name, Setting(task=task_id), official=True)
        if not path.exists():
            continue
        scores = read_scores(path)
        if scores.setting.changed or scores.seeds_of != "evaluation":
            raise InputError("expected the task as it is shipped, on seeds of evaluation", file=str(path))
        if name in names and scores.policy != policy_digest(weights / task_id / name):
            raise InputError(
                f"was played with other weights than {weights / task_id / name}: remove it and run "
                "evaluate.experiments.showdown again",
                file=str(path),
                field="policy",
            )
        found[name] = scores
    return found


def card(config: PolicyConfig, name: str, scores: dict[str, Scores]) -> str:
    """The model card.

    Args:
        config: of the policy, as it is shipped.
        name: under which it is.
        scores: of all that the card compares.
    """
    training, task_id = config.training, config.task_id
    how = "a clone of an agent, by DAgger" if name == "bc" else "trained by PPO"
    facts = {
        "commit": training["commit"],
        "package": f"llmserve-env {config.package_version}",
        "training seed": training["arguments"]["seed"],
        **_steps(training),
        "wall time": _wall_time(training),
        "validation": _validation(training),
        "network": _network(config),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    grid = ", ".join(f"`{control}` {len(each)}" for control, each in config.controls.items() if len(each) > 1)
    return f"""---
license: apache-2.0
library_name: llmserve-env
pipeline_tag: reinforcement-learning
tags:
- reinforcement-learning
- LLMServe-v0
- {task_id}
---

# {name} on {task_id}

A policy that sets the configuration of an LLM inference service window by window, {how} on
[`{task_id}`](../../../docs/tasks/{task_id}.md). It needs NumPy and no torch:

```python
task = load_task("{task_id}")  # of llmserve_env.tasks
play(load_agent("{name}", task), task, range(8)).scores  # of llmserve_env.agents
```

## How it was made

```
{command(config)}
```

| | |
|---|---|
{table}

## Results

{_results(name, task_id, scores)}

## What it is not to be trusted with

- Tasks with other values to choose from than `{task_id}`
  ({grid}),
  and versions of the package that lack a feature which it reads: it is refused there.
- Other traffic, hardware or load than it was trained on: it plays there, and what it scores has to be
  measured (`python -m evaluate.experiments.showdown --agents best-constant {name} --tasks {task_id} \
--loads 0.5 1 2`).
- Real engines: it has seen the simulator alone, and nothing keeps it from a configuration that harms;
  `shielded:{name}` is the same policy with [rules that may overrule it](../../../docs/agents.md#shield).
"""


def _known(given: dict[str, Any]) -> ModuleType | None:
    """The trainer that takes these arguments."""
    module = bc if "teacher" in given else ppo
    there = {field.name for field in dataclasses.fields(module.Arguments)}
    return module if {"task_id", "seed", "out"} <= set(given) <= there else None


def _shipped(given: str | None, task: Path, run: Path) -> str | None:
    """What an argument names: an agent, or the shipped copy of the policy in a folder."""
    if given is None or not (os.sep in given or Path(given).is_dir()):
        return given
    for name in sorted(SHIPPED):  # the clone before policies that never left it
        copy, original = task / name / WEIGHTS, Path(given) / WEIGHTS
        if copy.is_file() and original.is_file() and copy.read_bytes() == original.read_bytes():
            return f"weights/{task.name}/{name}"
    raise InputError(f"was made from {given}, which is not shipped: ship that first", file=str(run))


def _check_finished(given: dict[str, Any], run: dict[str, Any], folder: Path) -> None:
    """A run that was stopped is not what its command makes."""
    if "rounds" in run:
        done, wanted = run["rounds"], given["rounds"]
    else:
        update = given["envs"] * given["rollout"]
        done = run["steps"]
        wanted = max(1, given["steps"] // update) * update if not given["minutes"] else done
    if done < wanted:
        raise InputError(f"stopped after {done:,} of {wanted:,}: --resume ends it", file=str(folder))


def _steps(training: dict[str, Any]) -> dict[str, str]:
    run, given = training["run"], training["arguments"]
    if "rounds" in run:
        told = training["rounds"]
        agrees = f"it agreed with its teacher in {told[-1]['agreement']:.1%} of the validation windows"
        teacher = f"`{given['teacher']}`, which scores {training['teacher_validation']:.4f} on validation"
        rounds = f"{run['rounds']} of {given['episodes']} episodes, kept as it was after round {len(told)}"
        return {"teacher": teacher, "rounds": f"{rounds}, when {agrees}"}
    return {"windows played": f"{run['steps']:,}, kept as it was after {training['steps']:,}"}


def _wall_time(training: dict[str, Any]) -> str:
    minutes, cores = training["run"]["wall_s"] / 60, f"{training['cores']} cores of {training['cpu']}"
    return f"{minutes:.1f} min on a machine with {cores}"


def _validation(training: dict[str, Any]) -> str:
    if "rounds" in training["run"]:
        score, seeds = training["rounds"][-1]["validation"], training["validation_seeds"]
    else:
        score, seeds = training["validation"]["score"], training["validation"]["seeds"]
        seeds += ", on which it was chosen"
    return f"{score:.4f}, mean score of training seeds {seeds}: no result to report"


def _network(config: PolicyConfig) -> str:
    layers = "a layer of {} tanh units and a GRU" if config.recurrent else "two layers of {} tanh units"
    seen = "the last observation" if config.frames == 1 else f"the last {config.frames} observations"
    values = sum(map(len, config.controls.values()))
    return (
        f"{layers.format(config.hidden)} on {seen} of {len(config.features)} features, "
        f"{len(config.controls)} heads with {values} values in all"
    )


def _results(name: str, task_id: str, scores: dict[str, Scores]) -> str:
    if name not in scores:
        return f"`{name}` has not been measured on evaluation seeds yet."
    seeds = _common(scores)
    rows = {label: each.of(seeds) for label, each in scores.items()}
    constant = rows.get("best-constant")
    gap = None if constant is None else clairvoyant_gap(task_id, constant, seeds)
    lines = ["| agent | score | minus best-constant | share of the gap |", "|---|---:|---:|---:|"]
    for label, row in rows.items():
        difference = share = "–"
        if constant is not None and label != "best-constant":
            difference = str(paired_difference(row, constant))
            if gap is not None:
                places, below, plan = gap
                share = str(gap_share(row[places], below, plan) or "–")
        shown = f"**{label}**" if label == name else label
        lines.append(f"| {shown} | {interval(row)} | {difference} | {share} |")
    table = "\n".join(lines)
    on = f"{len(gap[0])} seeds for which there is a plan" if gap is not None else "no seeds: there is no plan"
    return f"""{table}

Interquartile means over {len(seeds)} evaluation seeds, {seeds[0]} to {seeds[-1]}, mean differences seed by
seed, and the share of the gap between the best constant (0) and the clairvoyant plan (1) on the {on}
([evaluation](../../../docs/evaluation.md)), each with its 95% interval. Measured with commit
{scores[name].made_by["commit"]} by

```
{_showdown(task_id, list(rows), seeds)}
```"""


def _showdown(task_id: str, agents: Sequence[str], seeds: Sequence[int]) -> str:
    parts = ["python", "-m", "evaluate.experiments.showdown", "--agents", *agents, "--tasks", task_id]
    parts += ["--episodes", str(seeds[-1] - seeds[0] + 1)]
    if seeds[0] != EVALUATION_SEEDS.start:
        parts += ["--first-seed", str(seeds[0])]
    return shlex.join(parts)


def _common(scores: dict[str, Scores]) -> list[int]:
    """Seeds that all of them played."""
    common = sorted(set.intersection(*(set(each.seeds) for each in scores.values())))
    if len(common) < 2:
        raise InputError(
            f"expected two seeds or more that all of {', '.join(scores)} played", field="results"
        )
    return common


def _index_row(config: PolicyConfig, name: str, scores: dict[str, Scores]) -> str:
    training, score = config.training, "not measured"
    if name in scores:
        score = str(interval(scores[name].of(_common(scores))))
    took = f"{training['run']['wall_s'] / 60:.1f} min"
    where = f"[`{config.task_id}`]({config.task_id}/{name}/{CARD})"
    return f"| {where} | `{name}` | {training['arguments']['seed']} | {took} | {score} |"


def _index(rows: Sequence[str]) -> str:
    header = """| task | agent | training seed | trained in | score on evaluation seeds |
|---|---|---:|---:|---:|"""
    return f"""# Trained policies

`load_agent(NAME, task)` plays them, wherever the package is; `ppo` is `ppo-1`. Their cards say how they were
made, to the command, and what they score. `python -m train.release` writes the cards and this page.

{chr(10).join([header, *rows]) if rows else "There are none yet."}
"""


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except InputError as error:
        sys.exit(f"release: {error}")
