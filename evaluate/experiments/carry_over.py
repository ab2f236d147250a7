"""Whether agents rank on a real vLLM as they rank in the simulator: both play the same episodes.

    python -m evaluate.experiments.carry_over --choose
    python -m evaluate.experiments.carry_over --live http://127.0.0.1:8101 --picture out/carry-over.png

The task, the profile that its simulator runs on, and the agents are in evaluate/carry_over. `--choose`
searches the best constant and tunes the rule, in simulation and on training seeds, as the policy is trained.
Without `--live` the agents play in the simulator alone.

A live episode takes as long as the task says. Agents take turns, seed by seed, so that all of them meet the
same moods of the machine. Every episode is kept when it ends: the same command goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro
from pydantic import BaseModel, ConfigDict, ValidationError
from tqdm import tqdm

from evaluate.evaluate import choose_seeds
from evaluate.experiments.carry_over_report import Compared, draw, table
from evaluate.search import PlanPlayer, best_constants
from evaluate.tune import tune_rule
from llmserve_env import __version__
from llmserve_env.agents import ReactiveAgent, ReactiveRule, Shield, play, shield_settings
from llmserve_env.agents.constant import ConstantAgent
from llmserve_env.agents.policy import PolicyAgent, load_policy
from llmserve_env.agents.shield import RULES
from llmserve_env.controls import to_action
from llmserve_env.disk.append_log import AppendLog, read_lines
from llmserve_env.errors import InputError, as_input_error
from llmserve_env.files import write_atomic
from llmserve_env.live.episode import LiveEpisode
from llmserve_env.live.settings import EndpointSettings
from llmserve_env.play import play_batch
from llmserve_env.report.figures import check_suffix
from llmserve_env.report.provenance import made_by
from llmserve_env.schema import QuantizationTier, ServeAction
from llmserve_env.tasks import TRAINING_SEEDS, Task, load_task

if TYPE_CHECKING:
    from llmserve_env.agents import Agent
    from llmserve_env.episode import EpisodeBatch

FOLDER = Path("evaluate/carry_over")

CAUTIOUS = ServeAction(batch_cap=8, admission_rate=3.0)
"""A constant of somebody who wants all that is let in to be in time."""

EXPECTED = ("patience", "admission rate")
"""Why requests fail by the task's rules; whatever else happens is the server's or the network's."""

MOST_UNEXPECTED = 0.01
"""Share of an episode's requests that may fail for other reasons."""

SETTLE_S = 1.0
"""Between two live episodes, for what was cancelled to leave the server (s)."""

WARM_UP_WINDOWS = 5
"""Served before the first episode, and forgotten."""


@dataclass
class Arguments:
    """What to play.

    Attributes:
        live: URL of the server, with what may follow it as for `llmserve gateway --upstream`; none for the
            simulator alone.
        model: name of the model at the server.
        token_ids: range of the random token ids that prompts hold, from the first to below the last.
        control: folder of the server's LiveScheduler, where it was started with one.
        profile: profile of the simulator (default: the task's).
        episodes: episodes of each agent, 2 or more.
        choose: whether to search the constant and tune the rule, write them to FOLDER/agents.toml, and end.
        folder: folder of task.toml, agents.toml and policy.
        json: file of the results; episodes are kept beside it, in a file that ends in .jsonl.
        picture: file to draw to.
        first_seed: first seed (default: the first of evaluation).
        other_seeds: whether seeds may be none of evaluation; the results are marked so.
    """

    live: str | None = None
    model: str = "tiny"
    token_ids: tuple[int, int] = (300, 4000)
    control: Path | None = None
    profile: Path | None = None
    episodes: int = 10
    choose: bool = False
    folder: Path = FOLDER
    json: Path = Path("out/carry_over/carry_over.json")
    picture: Path | None = None
    first_seed: int | None = None
    other_seeds: bool = False


class Chosen(BaseModel):
    """What was chosen for the task, in simulation and on training seeds.

    Attributes:
        best_constant: fields of an action.
        reactive: the rule, its batch caps within those of the task.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    best_constant: ServeAction
    reactive: ReactiveRule


@dataclass(frozen=True)
class Entrant:
    """An agent of the comparison.

    Attributes:
        make: makes it anew.
        known_by: what it is, JSON-ready.
    """

    make: Callable[[], Agent]
    known_by: Any


@dataclass(frozen=True)
class LiveResult:
    """What came of a live episode, as a line of the file in which they are kept.

    Attributes:
        agent: label.
        seed: of the episode.
        key: of agent, task and prompts; a result counts for the same ones only.
        score: mean reward.
        arrived: requests.
        failures: requests without a complete answer, by reason.
        interventions: windows in which a shield overrode the agent, by rule.
        ended_s: when it ended (Unix time, s).
    """

    agent: str
    seed: int
    key: str
    score: float
    arrived: int
    failures: dict[str, int]
    interventions: dict[str, int]
    ended_s: float


def choose(task: Task, *, episodes: int = 6000, seeds: int = 24) -> tuple[Chosen, dict[str, float]]:
    """The best constant and the tuned rule, and their mean scores on the seeds that they were chosen on."""
    player = PlanPlayer(task)
    training = TRAINING_SEEDS[:seeds]
    constants, means = best_constants(player, training)
    with tqdm(total=episodes, unit="episode", desc="rule") as bar:
        rule, _ = tune_rule(task, training, episodes, bar.update)
    low, high = (int(end) for end in task.grid.ends("batch_cap"))
    caps = {name: min(max(getattr(rule, name), low), high) for name in ("batch_cap", "crowd_batch_cap")}
    rule = rule.model_copy(update=caps)  # the search goes beyond what the server was started with
    scores = {
        "best_constant": float(means[0]),
        "reactive": float(play(ReactiveAgent(rule), task, training).scores.mean()),
    }
    return Chosen(best_constant=to_action(constants[0]), reactive=rule), scores


def entrants(task: Task, folder: Path) -> dict[str, Entrant]:
    """The agents by label, in the order of the tables.

    Raises:
        InputError: a file is missing or cannot be used; names it.
    """
    chosen, policy = _read_chosen(folder / "agents.toml"), load_policy(folder / "policy")
    weights = hashlib.sha256((folder / "policy" / "policy.safetensors").read_bytes()).hexdigest()
    constants = {
        "defaults": task.start,
        "cautious constant": CAUTIOUS,
        "best constant": chosen.best_constant,
    }
    found = {
        label: Entrant(lambda action=action, label=label: ConstantAgent(action, label), _json(action))  # type: ignore[misc]
        for label, action in constants.items()
    }
    found["reactive rule"] = Entrant(lambda: ReactiveAgent(chosen.reactive), _json(chosen.reactive))
    found["ppo"] = Entrant(lambda: PolicyAgent(policy, "ppo"), weights)
    found["shielded ppo"] = Entrant(
        lambda: Shield(PolicyAgent(policy, "ppo")), [weights, _json(shield_settings())]
    )
    return found


def play_live(
    agent: Agent, task: Task, seed: int, settings: EndpointSettings
) -> tuple[float, dict[str, Any]]:
    """Play an episode on a server, in real time.

    Returns:
        Its score, and what the last observation's metadata say of it.

    Raises:
        InputError: the deployment cannot apply what the task grants, requests had to be cut to be sent, or
            too many failed for reasons that are none of the task's.
    """
    batch = LiveEpisode(task, settings).batch
    try:
        play_batch(_Checked(agent, batch), batch, [seed])
    finally:
        batch.close()
    info = batch.info()
    told = info["live"]
    cut = {name: count for name, count in told["cuts"].items() if count and name != "requests"}
    if cut or not told["ignore_eos"]:
        raise InputError(
            f"requests were not sent as the task has them: {cut or 'the server does not take ignore_eos'}"
        )
    others = {reason: count for reason, count in told["failures"].items() if reason not in EXPECTED}
    if sum(others.values()) > MOST_UNEXPECTED * told["cuts"]["requests"]:
        raise InputError(f"of {told['cuts']['requests']} requests failed: {others}", field="live")
    return float(info["score"]), told


class _Checked:
    """An agent who plays only where everything that the task grants can be applied.

    Args:
        agent: plays.
        batch: what it plays.
    """

    def __init__(self, agent: Agent, batch: EpisodeBatch) -> None:
        self.name = agent.name
        self.act = agent.act
        self._agent = agent
        self._batch = batch

    def reset(self, task: Task, seeds: Sequence[int]) -> None:
        """Begin, with an error where a field cannot be applied."""
        ways = self._batch.backend.capabilities()
        for name in task.grid.granted:
            if ways[name].startswith("not applied"):
                raise InputError(f"the task grants it: {ways[name]}", field=name)
        self._agent.reset(task, seeds)


def play_all_live(
    agents: dict[str, Entrant],
    task: Task,
    seeds: Sequence[int],
    settings: EndpointSettings,
    path: Path,
) -> dict[tuple[str, int], LiveResult]:
    """Play what is not in the file yet, and add it there, episode by episode.

    Returns:
        Results by label and seed.
    """
    found = read_results(path, agents, task, settings)
    turns = [(label, seed) for i, seed in enumerate(seeds) for label in _rotated(list(agents), i)]
    missing = [turn for turn in turns if turn not in found]
    if missing:
        _warm_up(task, settings)
    with tqdm(total=len(missing), unit="episode", disable=not missing or None) as bar:
        for label, seed in missing:
            time.sleep(SETTLE_S)
            bar.set_postfix_str(label)
            agent = agents[label].make()
            score, told = play_live(agent, task, seed, settings)
            overridden = agent.interventions[0].tolist() if isinstance(agent, Shield) else []
            result = LiveResult(
                label,
                seed,
                _key(agents[label], task, settings),
                score,
                told["cuts"]["requests"],
                told["failures"],
                dict(zip(RULES, overridden, strict=False)),
                time.time(),
            )
            found[label, seed] = result
            _keep(path, result)
            bar.update()
    return found


def read_results(
    path: Path, agents: dict[str, Entrant], task: Task, settings: EndpointSettings
) -> dict[tuple[str, int], LiveResult]:
    """Results that were kept, of these agents and this task; others are passed over."""
    keys = {label: _key(agent, task, settings) for label, agent in agents.items()}
    found = {}
    for result in _lines(path):
        if keys.get(result.agent) == result.key:
            found[result.agent, result.seed] = result
    return found


def main(arguments: Arguments) -> None:
    """Play, write the files and print the tables."""
    task = open_task(arguments)
    if arguments.choose:
        chosen, scores = choose(task)
        write_atomic(arguments.folder / "agents.toml", _toml(chosen, scores))
        print(_toml(chosen, scores) + f"wrote {arguments.folder / 'agents.toml'}")
        return
    if arguments.picture is not None:
        check_suffix(arguments.picture)
    seeds = choose_seeds(arguments.episodes, arguments.first_seed, arguments.other_seeds)
    agents = entrants(task, arguments.folder)
    simulated = {label: play(agent.make(), task, seeds).scores for label, agent in agents.items()}
    live = None
    if arguments.live is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        path = arguments.json.with_suffix(".jsonl")
        results = play_all_live(agents, task, seeds, _settings(arguments), path)
        live = {label: np.array([results[label, seed].score for seed in seeds]) for label in agents}
    compared = Compared(simulated, live)
    text = table(compared, official=not arguments.other_seeds)
    print(text)
    if live is None:
        return
    content = {
        "task": task.model_dump(mode="json"),
        "profile": task.profile.name,
        "seeds_of": "other" if arguments.other_seeds else "evaluation",
        "seeds": seeds,
        "made_by": made_by(),
        "agents": {label: agent.known_by for label, agent in agents.items()},
        **compared.to_json(),
    }
    write_atomic(arguments.json, json.dumps(content, indent=1) + "\n")
    write_atomic(arguments.json.with_suffix(".md"), text)
    print(f"wrote {arguments.json} and {arguments.json.with_suffix('.md')}")
    if arguments.picture is not None:
        draw(arguments.picture, compared)
        print(f"wrote {arguments.picture}")


def open_task(arguments: Arguments) -> Task:
    """The task, on the profile that is asked for."""
    changes = {} if arguments.profile is None else {"profile": str(arguments.profile)}
    return load_task(arguments.folder / "task.toml", **changes)


def _settings(arguments: Arguments) -> EndpointSettings:
    control = "" if arguments.control is None else f",control={arguments.control}"
    return EndpointSettings(
        f"{arguments.live}{control}",
        arguments.model,
        max_requests_per_step=10_000,
        max_prompt_tokens=1_000_000,
        max_completion_tokens=1_000_000,
        token_ids=arguments.token_ids,
        precision=QuantizationTier.FP16,
    )


def _warm_up(task: Task, settings: EndpointSettings) -> None:
    """What a server does for the first time takes longer."""
    episode = LiveEpisode(task, settings)
    try:
        episode.reset(TRAINING_SEEDS[0])
        for _ in range(min(WARM_UP_WINDOWS, task.windows)):
            episode.step(task.start)
    finally:
        episode.close()


def _rotated(labels: list[str], by: int) -> list[str]:
    by %= len(labels)
    return labels[by:] + labels[:by]


def _key(agent: Entrant, task: Task, settings: EndpointSettings) -> str:
    """Of all that a live episode hangs on beside the server: not the profile, which it does not need."""
    made_of = task.model_dump(mode="json", exclude={"cell": {"profile"}})
    content = json.dumps([made_of, agent.known_by, settings.token_ids, __version__], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _keep(path: Path, result: LiveResult) -> None:
    try:
        with AppendLog(path) as log:
            log.append(json.dumps(asdict(result)).encode())
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror or error}", file=str(path)) from error


def _lines(path: Path) -> Iterator[LiveResult]:
    if not path.exists():
        return
    try:
        for line in read_lines(path):
            if line.whole:  # else a process was killed that wrote it
                yield _result(line.content, path, line.number)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", file=str(path)) from error


def _result(line: bytes, path: Path, number: int) -> LiveResult:
    try:
        return LiveResult(**json.loads(line))
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError("is no episode of this command", file=str(path), line=number) from error


def _json(model: BaseModel) -> Any:
    return model.model_dump(mode="json")


def _read_chosen(path: Path) -> Chosen:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return Chosen.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise InputError("is missing: --choose makes it", file=str(path)) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"cannot be read: {error}", file=str(path)) from error
    except ValidationError as error:
        raise as_input_error(error, str(path)) from error


def _toml(chosen: Chosen, scores: dict[str, float]) -> str:
    lines = ["# python -m evaluate.experiments.carry_over --choose"]
    for name, model in chosen:
        lines += ["", f"[{name}] # mean on the seeds that it was chosen on: {scores[name]:.3f}"]
        values = model.model_dump(mode="json", exclude_none=True).items()
        lines += [f"{field} = {json.dumps(value)}" for field, value in values]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except InputError as error:
        sys.exit(f"carry_over: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from here")
