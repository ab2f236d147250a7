"""Behaviour cloning: a network that does what a teacher does, for PPO to begin with or to stand alone.

    python -m train.bc --teacher reactive --task-id bursty_workload --out out/clone
    python -m train.bc --decisions decisions.jsonl --out out/clone    # what was done in a live service

In the first round the teacher plays and the network learns its choices, control by control. In every later
one the clone plays, the teacher says in each window what it would have set there, and the network learns from
all rounds (DAgger, Ross et al. 2011): the clone's mistakes lead where the teacher never was.

After each round the clone plays the validation episodes, those of `train.ppo`, with the teacher beside it.
The clone that agrees with it most often is kept, not the one that scores best: that may be one which learned
little. Ctrl-C ends the training with it; --resume goes on from the last finished round, bit for bit.

Decision logs of live services take the place of the teacher's episodes: what was in force, the shield's and
the limits' doing included, is what the network learns. There is one round, since nobody can be asked what to
set in a window that never was. Windows in which the fallback decided teach nothing, as it looked at nothing,
nor do those of dry runs. Agreement and moves are then those of the held-out windows.

What is printed of each round:
    loss         cross entropy on episodes that were held out, summed over heads, the mean of a window (nats)
    agreement    share of the validation windows, as the clone plays them, in which it sets all controls as
                 the teacher would
    moves        the same of those windows in which the teacher would change something: 0 for a clone that
                 never moves
    validation   mean score of the clone on the validation seeds; the teacher's stands at the beginning
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from tqdm import tqdm

import llmserve_env
from llmserve_env.agents import Agent, play
from llmserve_env.agents.find import find_agent
from llmserve_env.agents.policy import (
    CLIP,
    Policy,
    PolicyAgent,
    PolicyConfig,
    save_policy,
    stack,
)
from llmserve_env.controls import to_array
from llmserve_env.episode import EpisodeBatch
from llmserve_env.errors import InputError
from llmserve_env.files import open_atomic
from llmserve_env.live.pilot.decision_log import Stretch, one_task, read_decisions
from llmserve_env.observation import feature_names
from llmserve_env.play import play_batch
from llmserve_env.report.provenance import made_on
from llmserve_env.tasks import Task, load_task
from train.network import Network
from train.ppo import VALIDATION, note_run


@dataclass
class Arguments:
    """How to clone."""

    teacher: str = "reactive"
    """Name of an agent, or folder of a policy."""
    task_id: str = "bursty_workload"
    """Id of a task."""
    out: Path = Path("out/bc")
    """Folder of the policy and the checkpoint."""
    decisions: list[Path] = field(default_factory=list)
    """Decision logs to learn from: task and actions are theirs, there is one round."""
    rounds: int = 6
    """Rounds: the first one watches the teacher, the clone plays in the others."""
    episodes: int = 64
    """Episodes played in each round."""
    held_out: float = 0.1
    """Share of the episodes that the network does not learn from."""
    epochs: int = 60
    """Passes of a round over all windows so far, at most."""
    patience: int = 6
    """Passes without a lower loss on the held-out episodes after which a round ends."""
    batch: int = 512
    """Windows of a step; episodes' worth of them with a GRU."""
    learning_rate: float = 1e-3
    """Learning rate of Adam."""
    seed: int = 1
    """Random seed; training seeds are counted from here."""
    hidden: int = 128
    """Width of the layers."""
    frames: int = 1
    """Observations that the policy sees at once."""
    recurrent: bool = False
    """Whether the policy has a GRU."""
    resume: bool = False
    """Whether to go on from OUT's checkpoint, with its arguments."""


@dataclass
class Watched:
    """Episodes as the learner gets them; time is the first axis.

    Attributes:
        observations: float32[windows, n, features], as they were seen.
        current: int64[windows, n, controls], indices of the values that were set.
        chosen: int64[windows, n, controls], indices of what was set then.
        labels: int64[windows, n, controls], indices of what the teacher would set.
        there: bool[windows, n], whether the episode had not ended before.
        scores: float64[n], of the episodes.
    """

    observations: np.ndarray
    current: np.ndarray
    chosen: np.ndarray
    labels: np.ndarray
    there: np.ndarray
    scores: np.ndarray

    def agreement(self) -> dict[str, float]:
        """How often what was set is what the teacher would have set: always, and where it would change."""
        right = (self.chosen == self.labels).all(axis=2)[self.there]
        moves = (self.labels != self.current).any(axis=2)[self.there]
        of_moves = float(right[moves].mean()) if moves.any() else float("nan")
        return {"agreement": float(right.mean()), "moves": of_moves}


def watch(task: Task, seeds: range, teacher: Agent, player: Agent | None = None) -> Watched:
    """Play episodes and note what the teacher would set in each window.

    Args:
        task: what is played.
        seeds: of the episodes.
        teacher: is asked in every window from the first on, and so remembers the episode as it came about.
        player: whose actions are played (default: the teacher's). In either case the nearest of the task's
            grid are: what a network can choose.
    """
    lesson = _Lesson(teacher, player)
    there = [np.ones(len(seeds), bool)]
    batch = play_batch(
        lesson, EpisodeBatch(task, len(seeds)), seeds, lambda batch, _: there.append(~batch.over)
    )
    columns = [np.stack(column) for column in zip(*lesson.rows, strict=True)]
    return Watched(*columns, np.stack(there[:-1]), batch.scores)


class _Lesson:
    """Plays what a network can choose, the player's or the teacher's, and notes what the teacher would set.

    Attributes:
        rows: of each window, as `Watched` has them: observations, current, chosen, labels.
    """

    def __init__(self, teacher: Agent, player: Agent | None) -> None:
        self.name = teacher.name
        self._teacher = teacher
        self._player = player
        self.rows: list[tuple[np.ndarray, ...]] = []

    def reset(self, task: Task, seeds: Sequence[int]) -> None:
        """Begin episodes."""
        for agent in {id(each): each for each in (self._teacher, self._player) if each is not None}.values():
            agent.reset(task, seeds)
        self._grid = task.grid
        self._current = np.repeat(task.grid.indices(to_array([task.start])), len(seeds), axis=0)

    def act(self, observations: np.ndarray, windows: np.ndarray) -> np.ndarray:
        """ACTION[n], points of the grid."""
        labels = self._grid.indices(self._teacher.act(observations, windows))
        chosen = labels
        if self._player is not None:
            chosen = self._grid.indices(self._player.act(observations, windows))
        self.rows.append((observations, self._current, chosen, labels))
        self._current = chosen
        return self._grid.actions(chosen)


def logged(stretches: list[Stretch], task: Task, held_out: float) -> tuple[Watched, Watched]:
    """What decision logs have, in pieces: those to learn from, and those held out, evenly among them.

    Args:
        stretches: of the logs.
        task: of all of them.
        held_out: share that is held out.

    Raises:
        InputError: there is too little to learn from.
    """
    total = sum(len(each.decisions) for each in stretches)
    size = max(1, min(task.windows, total // _PIECES))
    pieces: list[tuple[np.ndarray, ...]] = []
    for stretch in stretches:
        applied = task.grid.indices(to_array([each.applied for each in stretch.decisions]))
        before = task.grid.indices(to_array([stretch.before]))
        current = np.concatenate([before, applied[:-1]])
        teaches = np.array([each.by != "fallback" and not each.dry_run for each in stretch.decisions])
        columns = (stretch.observations[:-1], current, applied, applied, teaches)
        pieces += [
            tuple(column[low : low + size] for column in columns) for low in range(0, len(applied), size)
        ]
    pieces = [piece for piece in pieces if piece[-1].any()]
    every = round(1 / held_out)
    if len(pieces) < every:
        raise InputError(
            f"expected {_PIECES} windows or more in which an agent decided and not the fallback, found "
            f"{sum(int(piece[-1].sum()) for piece in pieces)} of {total}",
            field="decisions",
        )
    held = pieces[every - 1 :: every]
    learned = [piece for i, piece in enumerate(pieces) if (i + 1) % every]
    return _side_by_side(learned, size), _side_by_side(held, size)


def _side_by_side(pieces: list[tuple[np.ndarray, ...]], size: int) -> Watched:
    """Pieces of up to so many windows as episodes; what lies behind their ends is not there."""
    columns = [
        np.stack(
            [np.pad(rows, [(0, size - len(rows))] + [(0, 0)] * (rows.ndim - 1)) for rows in column], axis=1
        )
        for column in zip(*pieces, strict=True)
    ]
    return Watched(*columns, np.full(len(pieces), np.nan))


@dataclass
class Samples:
    """What a step learns from; see `Network.sequence`."""

    stacked: torch.Tensor
    current: torch.Tensor
    labels: torch.Tensor
    there: torch.Tensor


@dataclass
class Cloner:
    """Everything that cloning changes.

    Attributes:
        args: how to clone.
        round: rounds that are done.
        best: agreement of the policy that is kept ...
        score: ... and its score.
        told: what was printed of each round.
        wall_s: spent on them (s).
    """

    args: Arguments
    round: int = 0
    best: float = -np.inf
    score: float = float("nan")
    told: list[dict[str, float]] = field(default_factory=list)
    wall_s: float = 0.0

    def __post_init__(self) -> None:
        self.made_on = made_on()
        self.teacher: Agent | None
        self.stretches = read_decisions(self.args.decisions, print)
        if self.args.decisions:
            if not self.stretches:
                raise InputError("no window whose outcome is known", field="decisions")
            self.task = one_task(self.stretches)
            self.teacher = None
        else:
            self.task = load_task(self.args.task_id)
            self.teacher = find_agent(self.args.teacher, self.task)
        self.config = PolicyConfig(
            package_version=llmserve_env.__version__,
            task_id=self.task.id,
            features=self.stretches[0].beginning.features if self.stretches else feature_names(self.task),
            controls={name: list(values) for name, values in self.task.grid.values.items()},
            frames=self.args.frames,
            hidden=self.args.hidden,
            recurrent=self.args.recurrent,
        )
        torch.manual_seed(self.args.seed)
        self.net = Network(self.config)
        with torch.no_grad():
            self.net.stay.zero_()  # what keeps a beginner steady keeps a clone from ever moving
        self.nvec = self.task.grid.nvec.tolist()
        self.learned: list[Watched] = []
        self.held_out: list[Watched] = []
        self.teacher_score = float("nan")

    def collect(self) -> None:
        """Play a round's episodes and part them into those to learn from and those held out."""
        if self.teacher is None:
            learned, held_out = logged(self.stretches, self.task, self.args.held_out)
            self.learned, self.held_out = [learned], [held_out]
            return
        count, held = self.args.episodes, max(1, round(self.args.episodes * self.args.held_out))
        first = self.args.seed * _APART + self.round * count
        player = PolicyAgent(self.net.policy()) if self.round else None
        for kept, seeds in (
            (self.held_out, range(first, first + held)),
            (self.learned, range(first + held, first + count)),
        ):
            kept.append(watch(self.task, seeds, self.teacher, player))

    def learn(self, bar: tqdm) -> dict[str, float]:  # type: ignore[type-arg]
        """Fit the network to all rounds until the held-out loss falls no more; what there is to say of it."""
        generator = torch.Generator().manual_seed(self.args.seed * 1000 + self.round)
        self._rescale()
        samples, held = self._samples(self.learned), self._samples(self.held_out)
        optimizer = torch.optim.Adam(self.net.parameters(), lr=self.args.learning_rate)
        least, since, kept = self._loss(held).item(), 0, copy.deepcopy(self.net.state_dict())
        for _ in range(self.args.epochs):
            for part in self._parts(samples, generator):
                optimizer.zero_grad()
                self._loss(part).backward()
                torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
                optimizer.step()
            with torch.no_grad():
                loss = self._loss(held).item()
            bar.set_postfix(round=self.round + 1, loss=f"{loss:.4f}", agreement=f"{self.best:.4f}")
            since += 1
            if loss < least:
                least, since, kept = loss, 0, copy.deepcopy(self.net.state_dict())
            if since >= self.args.patience:
                break
        self.net.load_state_dict(kept)
        return {"loss": least}

    def validate(self, told: dict[str, float]) -> None:
        """Play the validation seeds; keep the policy if none has agreed with the teacher more often."""
        if self.teacher is None:
            told |= self._on_held_out().agreement()
        else:
            found = watch(self.task, VALIDATION, self.teacher, PolicyAgent(self.policy()))
            told |= {**found.agreement(), "validation": float(found.scores.mean())}
        self.told.append(told)
        if told["agreement"] > self.best:
            self.best, self.score = told["agreement"], told.get("validation", told["agreement"])
            save_policy(self.args.out, self.policy())

    def _on_held_out(self) -> Watched:
        """Logged windows that were held out, with what the network would set in them."""
        if not self.held_out:
            self.collect()
        held = self.held_out[0]
        with torch.no_grad():
            heads = self._logits(self._samples([held])).split(self.nvec, 1)
        chosen = torch.stack([head.argmax(1) for head in heads], 1).numpy().reshape(held.labels.shape)
        return replace(held, chosen=chosen)

    def policy(self) -> Policy:
        """The clone as it is now, with how it came about."""
        made = {
            "arguments": json.loads(json.dumps(asdict(self.args), default=str)),
            **self.made_on,
            "rounds": self.told,
        }
        if self.teacher is None:
            made["runs"] = sorted({each.beginning.run for each in self.stretches})
        else:
            made["teacher_validation"] = self.teacher_score
            made["validation_seeds"] = f"{VALIDATION.start}..{VALIDATION.stop - 1}"
        return self.net.policy(self.config.model_copy(update={"training": made}))

    def save(self) -> None:
        """Write the checkpoint."""
        state = {name: getattr(self, name) for name in _STATE}
        state |= {"arguments": asdict(self.args), "net": self.net.state_dict()}
        with open_atomic(self.args.out / "checkpoint.pt") as file:
            torch.save(state, file)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint of the same arguments."""
        for name in _STATE:
            setattr(self, name, state[name])
        self.net.load_state_dict(state["net"])

    def _rescale(self) -> None:
        """Scale observations by all that were seen to learn from."""
        seen = np.concatenate([each.observations[each.there] for each in self.learned]).astype(np.float64)
        spread = np.sqrt(seen.var(0) + 1e-4)  # what hardly varies is not blown up
        self.net.mean.copy_(torch.from_numpy(seen.mean(0).astype(np.float32)))
        self.net.std.copy_(torch.from_numpy(spread.astype(np.float32)))

    def _samples(self, watched: list[Watched]) -> Samples:
        """Windows of all rounds side by side: [windows, episodes, ...]."""
        longest = max(len(each.there) for each in watched)

        def joined(name: str) -> np.ndarray:
            padded = [
                np.pad(rows, [(0, longest - len(rows))] + [(0, 0)] * (rows.ndim - 1))
                for rows in (getattr(each, name) for each in watched)
            ]
            return np.concatenate(padded, axis=1)

        mean, std = self.net.mean.numpy(), self.net.std.numpy()
        scaled = np.clip((joined("observations") - mean) / std, -CLIP, CLIP)
        frames: list[np.ndarray] = []
        for latest in scaled:
            frames.append(stack(frames[-1] if frames else None, latest, self.args.frames))
        arrays = (np.stack(frames), joined("current"), joined("labels"), joined("there"))
        return Samples(*(torch.from_numpy(array) for array in arrays))

    def _parts(self, samples: Samples, generator: torch.Generator) -> Any:
        """All samples in random parts: of windows, or of whole episodes where there is a memory."""
        columns = [samples.stacked, samples.current, samples.labels, samples.there]
        size = self.args.batch
        if self.args.recurrent:
            size = max(1, size // len(samples.there))
        else:
            columns = [column.flatten(0, 1)[None, samples.there.flatten()] for column in columns]
        order = torch.randperm(columns[0].shape[1], generator=generator)
        for chosen in order.split(size):
            yield Samples(*(column[:, chosen] for column in columns))

    def _logits(self, samples: Samples) -> torch.Tensor:
        """float32[windows * episodes, values]."""
        episodes = samples.there.shape[1]
        begins = torch.zeros(samples.there.shape)
        logits, _ = self.net.sequence(
            samples.stacked, samples.current, torch.zeros(episodes, self.config.hidden), begins
        )
        return logits

    def _loss(self, samples: Samples) -> torch.Tensor:
        """Cross entropy summed over heads, the mean over windows."""
        there, labels = samples.there.flatten(), samples.labels.flatten(0, 1)
        heads = self._logits(samples)[there].split(self.nvec, 1)
        losses = [
            torch.nn.functional.cross_entropy(head, labels[there, control])
            for control, head in enumerate(heads)
        ]
        return torch.stack(losses).sum()


_APART = 1_000_003
"""Between the training seeds of one `seed` and the next."""

_PIECES = 20
"""Into so many pieces at least the windows of decision logs are cut."""

_STATE = ("round", "best", "score", "told", "wall_s", "learned", "held_out", "teacher_score")


_OF_TEACHER = ("teacher", "task_id", "rounds", "episodes")
"""Arguments that mean nothing where decision logs teach."""


def clone(args: Arguments) -> float:
    """Clone a teacher, or what was done in live services.

    Returns:
        The score on the validation seeds of the clone that is kept; of decision logs, the share of the
        held-out windows in which it agrees.

    Raises:
        InputError: the teacher, the task or a log cannot be used, or there is no checkpoint to go on from.
    """
    checkpoint = args.out / "checkpoint.pt"
    state = None
    if args.resume:
        if not checkpoint.exists():
            raise InputError("there is none to go on from", file=str(checkpoint))
        state = torch.load(checkpoint, weights_only=False)  # our own file: it holds arrays, too
        args = Arguments(**{**state["arguments"], "out": args.out, "rounds": args.rounds, "resume": True})
    elif args.decisions:
        given = [name for name in _OF_TEACHER if getattr(args, name) != getattr(Arguments(), name)]
        if given:
            raise InputError("decision logs say it themselves", field=given[0])
    if args.decisions:
        args = replace(args, rounds=1)
    if not 0 <= args.seed * _APART <= VALIDATION.start - args.rounds * args.episodes:
        raise InputError(f"expected 0 to {VALIDATION.start // _APART - 1}, found {args.seed}", field="seed")
    cloner = Cloner(args)
    args.out.mkdir(parents=True, exist_ok=True)
    if state is not None:
        cloner.restore(state)
    elif cloner.teacher is not None:
        cloner.teacher_score = float(play(cloner.teacher, cloner.task, VALIDATION).scores.mean())
        print(f"{args.teacher} on the validation seeds: {cloner.teacher_score:.4f}")
    begun = time.perf_counter() - cloner.wall_s
    with tqdm(total=args.rounds, initial=cloner.round, unit="round") as bar:
        try:
            while cloner.round < args.rounds:
                cloner.collect()
                told = cloner.learn(bar)
                cloner.validate(told)
                cloner.round += 1
                cloner.wall_s = time.perf_counter() - begun
                cloner.save()
                bar.update()
                bar.write(
                    f"{cloner.round}: " + ", ".join(f"{name} {value:.4f}" for name, value in told.items())
                )
        except KeyboardInterrupt:
            if cloner.best == -np.inf:
                cloner.validate({})
            print("stopped; --resume goes on from the last finished round")
    note_run(args.out, rounds=cloner.round, wall_s=round(cloner.wall_s, 1))
    return cloner.score


if __name__ == "__main__":
    torch.set_num_threads(1)  # fastest for layers as small as these
    try:
        arguments = tyro.cli(Arguments, description=__doc__)
        found = clone(arguments)
        what = "agrees in {:.1%} of the held-out windows" if arguments.decisions else "scores {:.4f}"
        print(f"the clone that was kept {what.format(found)}; it is in {arguments.out}")
    except InputError as error:
        sys.exit(f"bc: {error}")
