"""PPO on a task: a policy that sets every control, trained on many episodes side by side.

    python -m train.ppo --task-id bursty_workload --out out/bursty

The policy is kept as it was best on validation episodes, whose seeds are none of those that training draws.
Ctrl-C ends the training as if its steps were over; --resume goes on from the last checkpoint, bit for bit.

What is logged (TensorBoard, in OUT/log):
    score            mean score of the episodes that ended since the last line
    validation       mean score of the likeliest actions on the validation seeds
    approx_kl        how far an update moved the policy (nats)
    clip_fraction    share of samples whose ratio was clipped
    explained        variance of the returns that the critic explains
    entropy/CONTROL  of each head (nats)
    steps_per_s      windows served per second, learning included
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode
from tqdm import tqdm

import llmserve_env
from llmserve_env.agents import play
from llmserve_env.agents.policy import (
    CLIP,
    Policy,
    PolicyAgent,
    PolicyConfig,
    load_policy,
    save_policy,
    stack,
)
from llmserve_env.controls import to_array
from llmserve_env.errors import InputError
from llmserve_env.files import open_atomic
from llmserve_env.observation import feature_names
from llmserve_env.report.provenance import made_on
from llmserve_env.tasks import TRAINING_SEEDS, Task
from train.network import Network, log_prob, sample

VALIDATION = range(TRAINING_SEEDS.stop - 64, TRAINING_SEEDS.stop)
"""Seeds on which the best policy is chosen. Training draws one of them once in 30 million episodes."""


@dataclass
class Arguments:
    """How to train."""

    task_id: str = "bursty_workload"
    """Id of a task."""
    out: Path = Path("out/ppo")
    """Folder of the policy, the checkpoint and the log."""
    steps: int = 3_000_000
    """Windows to play."""
    minutes: float = 0.0
    """Wall time after which to stop (min); 0 for none."""
    seed: int = 1
    """Random seed."""
    envs: int = 256
    """Episodes side by side."""
    threads: int = 1
    """Simulator threads."""
    rollout: int = 32
    """Windows between two updates."""
    epochs: int = 2
    """Passes over what an update learns from."""
    minibatches: int = 8
    """Parts of a pass."""
    learning_rate: float = 1.5e-3
    """Learning rate of Adam, falling to zero in a straight line."""
    gamma: float = 0.99
    """Discount of a window."""
    gae_lambda: float = 0.95
    """Lambda of the generalised advantages."""
    clip: float = 0.2
    """PPO clip range of the probability ratio."""
    entropy: float = 0.01
    """Weight of the entropy, falling to zero in a straight line."""
    value: float = 0.5
    """Weight of the critic's loss."""
    max_grad_norm: float = 0.5
    """Largest norm of a gradient; longer ones are scaled down to it."""
    hidden: int = 128
    """Width of the layers."""
    frames: int = 1
    """Observations that the policy sees at once."""
    recurrent: bool = False
    """Whether the policy has a GRU."""
    unseen: list[str] = field(default_factory=list)
    """Entries of the observation that the policy is not to see, such as what a live service does not tell: in
    its file they have so great a spread that they count as nothing, wherever it plays."""
    init: Path | None = None
    """Folder of a policy to begin with, such as a clone."""
    init_kl: float = 1.0
    """Weight of the divergence from that policy, falling to zero over the first half."""
    init_warmup: int = 10
    """Updates of the critic alone, before its policy changes."""
    validations: int = 10
    """Number of times that the policy is measured, to keep the best."""
    device: str = "auto"
    """Device of the network: cpu or cuda; auto takes CUDA where it is."""
    wandb: str | None = None
    """Project at Weights & Biases to log to, beside TensorBoard."""
    resume: bool = False
    """Whether to go on from OUT's checkpoint, with its arguments."""


@dataclass
class Statistics:
    """Running mean and variance (Chan et al., 1979)."""

    mean: Any = 0.0
    variance: Any = 1.0
    count: float = 1e-4

    def add(self, values: np.ndarray) -> None:
        """Take in values, along the first axis."""
        total = self.count + len(values)
        shift = values.mean(0) - self.mean
        squares = self.variance * self.count + values.var(0) * len(values)
        self.variance = (squares + shift**2 * self.count * len(values) / total) / total
        self.mean = self.mean + shift * len(values) / total
        self.count = total


class Trainer:
    """Everything that training changes, so that a checkpoint can hold it.

    What other trainers do otherwise is in methods of their own: where episodes come from, what of them is
    learned from, by what a policy is chosen.

    Args:
        args: how to train.
    """

    VALUES = 1
    """Sums of rewards that the critic foretells."""
    STATE: tuple[str, ...] = ("observed", "returns", "update", "best", "wall_s", "finished", "stacked",
                              "current", "begins", "memory", "running", "history")  # fmt: skip
    """Attributes that a checkpoint holds as they are."""

    def __init__(self, args: Arguments) -> None:
        self.args = args
        self.made_on = made_on()
        cuda = args.device == "auto" and torch.cuda.is_available()
        self.device = torch.device("cuda" if cuda else "cpu" if args.device == "auto" else args.device)
        torch.manual_seed(args.seed)
        self.generator = torch.Generator(self.device).manual_seed(args.seed)
        self.env = self.make_env()
        assert self.env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP, "see `collect`"
        self.task = self.env.unwrapped.task
        self.unseen = _places(args, self.task)
        grid = self.task.grid
        self.config = self.make_config()
        self.clone: Policy | None = None
        if args.init is not None:
            self.clone, task_config = load_policy(args.init), self.config
            self.config = self.clone.config
            for part in ("features", "controls"):
                if list(getattr(self.config, part)) != list(getattr(task_config, part)):
                    raise InputError(f"expected a policy of all {part} of '{self.task.id}'", field="init")
        self.net = Network(self.config, self.VALUES).to(self.device)
        self.teacher: Network | None = None
        if self.clone is not None:
            self.net.load(self.clone)
            self.teacher = Network(self.config, self.VALUES).to(self.device)
            self.teacher.load(self.clone)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=args.learning_rate, eps=1e-5)
        self.nvec = grid.nvec.tolist()
        self.start = grid.indices(to_array([self.task.start]))[0]
        names = feature_names(self.task)
        self.observed = Statistics(np.zeros(len(names)), np.ones(len(names)))
        self.returns = Statistics()
        self.update = 0
        self.best = -np.inf
        self.wall_s = 0.0
        self.finished: list[float] = []
        drawn = np.random.default_rng(args.seed).choice(VALIDATION.start, args.envs, replace=False)
        observations, _ = self.env.reset(seed=[int(seed) for seed in drawn])
        self.mask = torch.from_numpy(_mask(self.env)).to(self.device)
        if self.clone is None:
            self._rescale(observations)
        self.stacked = stack(None, self._scaled(observations), self.config.frames)
        self.current = np.tile(self.start, (args.envs, 1))
        self.begins = np.ones(args.envs, np.float32)
        self.memory = torch.zeros(args.envs, self.config.hidden, device=self.device)
        self.running = np.zeros(args.envs)  # discounted sums of rewards, for their scale
        self.history = np.zeros((self.task.windows, args.envs, len(self.nvec)), np.int16)

    @property
    def updates(self) -> int:
        """How many there are to be."""
        return max(1, self.args.steps // (self.args.envs * self.args.rollout))

    def make_env(self) -> Any:
        """The episodes side by side."""
        args = self.args
        return gym.make_vec("LLMServe-v0", num_envs=args.envs, task_id=args.task_id, threads=args.threads)

    def make_config(self) -> PolicyConfig:
        """What is to be trained."""
        args = self.args
        return PolicyConfig(
            package_version=llmserve_env.__version__,
            task_id=self.task.id,
            features=feature_names(self.task),
            controls={name: list(values) for name, values in self.task.grid.values.items()},
            frames=args.frames,
            hidden=args.hidden,
            recurrent=args.recurrent,
        )

    def scaled_rewards(self, rewards: np.ndarray, info: dict[str, Any], over: np.ndarray) -> np.ndarray:
        """What the critic foretells the sum of, in standard deviations of returns.

        Args:
            rewards: of a window of n episodes, as the environment gives them.
            info: that came with them.
            over: bool[n], episodes that ended with it.

        Returns:
            float32[n], or [n, VALUES] if there are several.
        """
        self.running = self.running * self.args.gamma + rewards
        self.returns.add(self.running)
        self.running[over] = 0.0
        return (rewards / np.sqrt(self.returns.variance + 1e-8)).astype(np.float32)

    def weighed(self, rollout: dict[str, torch.Tensor]) -> torch.Tensor:
        """float32[time, n], the advantages by which the policy learns: one number of several."""
        return rollout["advantages"]

    def collect(self) -> dict[str, torch.Tensor]:
        """Play a rollout; what the update learns from, with time as the first axis."""
        args, count = self.args, self.args.envs
        kept: dict[str, list[Any]] = {name: [] for name in _KEPT}
        before = self.memory
        for _ in range(args.rollout):
            stacked, current = self._tensor(self.stacked), self._tensor(self.current)
            self.memory = self.memory * (1 - self._tensor(self.begins))[:, None]
            with torch.no_grad():
                logits, values, self.memory = self.net(stacked, current, self.memory)
                chosen = sample(logits, self.nvec, self.mask, self.generator)
                logs, _ = log_prob(logits, chosen, self.nvec, self.mask)
            actions = chosen.cpu().numpy()
            self.history[self.env.unwrapped.batch.steps, np.arange(count)] = actions
            observations, rewards, terminated, truncated, info = self.env.step(actions)
            over = terminated | truncated
            rewards = self.scaled_rewards(rewards, info, over)
            if self.clone is None and self.update < self.updates // 10:
                self._rescale(observations)
            bootstrap = torch.zeros_like(values)
            scaled = self._scaled(observations)
            if over.any():
                # Same-step resets: what is seen is the next episode's first, the last one is in the info. An
                # episode that is cut off at its horizon would have gone on: the critic says how well.
                ended = np.flatnonzero(over)
                last = self._scaled(np.stack([info["final_obs"][i] for i in ended]))
                final = self._tensor(stack(self.stacked[ended], last, self.config.frames))
                with torch.no_grad():
                    _, ahead, _ = self.net(final, self._tensor(actions[ended]), self.memory[ended])
                ahead[self._tensor(~truncated[ended])] = 0.0
                bootstrap[self._tensor(ended)] = ahead
                self.finished += info["final_info"]["score"][ended].tolist()
            row = {
                "stacked": stacked, "current": current, "begins": self._tensor(self.begins),
                "actions": chosen, "logs": logs, "values": values,
                "rewards": self._tensor(rewards), "over": self._tensor(over), "bootstrap": bootstrap,
            }  # fmt: skip
            for name in _KEPT:
                kept[name].append(row[name])
            self.stacked = stack(self.stacked, scaled, self.config.frames)
            self.stacked[over] = stack(None, scaled[over], self.config.frames)
            self.current = np.where(over[:, None], self.start, actions)
            self.begins = over.astype(np.float32)
        rollout = {name: torch.stack(rows) for name, rows in kept.items()}
        with torch.no_grad():
            memory = self.memory * (1 - self._tensor(self.begins))[:, None]
            _, following, _ = self.net(self._tensor(self.stacked), self._tensor(self.current), memory)
        rollout["advantages"] = self._advantages(rollout, following)
        rollout["returns"] = rollout["advantages"] + rollout["values"]
        rollout["advantages"] = self.weighed(rollout)
        rollout["memory"] = before
        return rollout

    def learn(self, rollout: dict[str, torch.Tensor]) -> dict[str, float]:
        """Update the network from a rollout; what is logged of it."""
        args = self.args
        left = 1.0 - self.update / self.updates
        for group in self.optimizer.param_groups:
            group["lr"] = args.learning_rate * left
        warming = self.clone is not None and self.update < args.init_warmup
        pull = args.init_kl * max(0.0, 2 * left - 1) if self.clone is not None else 0.0
        told: dict[str, list[float]] = {}
        for _ in range(args.epochs):
            for part in self._parts(rollout):
                logits, values = self.net.sequence(
                    part["stacked"], part["current"], part["memory"], part["begins"]
                )
                flat = {
                    name: part[name].flatten(0, 1) for name in ("actions", "logs", "advantages", "returns")
                }
                logs, entropies = log_prob(logits, flat["actions"], self.nvec, self.mask)
                shift = logs - flat["logs"]
                ratio = shift.exp()
                advantages = flat["advantages"]
                advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
                clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
                policy_loss = -torch.min(ratio * advantages, clipped * advantages).mean()
                value_loss = 0.5 * (values - flat["returns"]).square().mean()
                loss = args.value * value_loss
                if not warming:
                    loss = loss + policy_loss - args.entropy * left * entropies.sum(1).mean()
                    if pull:
                        loss = loss + pull * self._divergence(part, logits)
                self.optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.net.parameters(), args.max_grad_norm)
                self.optimizer.step()
                with torch.no_grad():
                    line = {
                        "approx_kl": (ratio - 1 - shift).mean(),
                        "clip_fraction": ((ratio - 1).abs() > args.clip).float().mean(),
                        "value_loss": value_loss.detach(),
                    }
                    spread = dict(zip(self.config.controls, entropies.mean(0), strict=True))
                    line |= {f"entropy/{name}": value for name, value in spread.items()}
                for name, figure in line.items():
                    told.setdefault(name, []).append(float(figure))
        left_over = rollout["returns"] - rollout["values"]
        explained = 1.0 - float(left_over.var() / (rollout["returns"].var() + 1e-8))
        self.update += 1
        return {name: float(np.mean(figures)) for name, figures in told.items()} | {"explained": explained}

    def validate(self) -> dict[str, float]:
        """Mean score of the likeliest actions on the validation seeds; keeps the policy if it is the best."""
        score = float(play(PolicyAgent(self.policy()), self.task, VALIDATION).scores.mean())
        self.keep(score)
        return {"validation": score}

    def keep(self, merit: float) -> bool:
        """Write the policy, if it has more merit than all before; whether it has."""
        better = merit > self.best
        if better:
            self.best = merit
            save_policy(self.args.out, self.policy())
        return better

    def save(self) -> None:
        """Write the checkpoint. Of the episodes it holds seeds and actions: they are replayed."""
        batch = self.env.unwrapped.batch
        state = {name: getattr(self, name) for name in self.STATE}
        state |= {
            "arguments": asdict(self.args), "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state(),
            "seeds": batch.seeds.copy(), "steps": batch.steps.copy(),
            "draws": [draw.bit_generator.state for draw in self.env.unwrapped.np_random],
        }  # fmt: skip
        with open_atomic(self.args.out / "checkpoint.pt") as file:
            torch.save(state, file)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint of the same arguments."""
        for name in self.STATE:
            setattr(self, name, state[name])
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        env = self.env.unwrapped
        env.reset(seed=state["seeds"].tolist())
        for step in range(int(state["steps"].max())):
            env.batch.step(self.task.grid.actions(self.history[step].astype(np.int64)), state["steps"] > step)
        for draw, at in zip(env.np_random, state["draws"], strict=True):
            draw.bit_generator.state = at

    def policy(self) -> Policy:
        """The policy as it is now, with how it came about."""
        made = {
            "arguments": json.loads(json.dumps(asdict(self.args), default=str)),
            **self.made_on,
            "steps": self.update * self.args.envs * self.args.rollout,
            "wall_s": round(self.wall_s, 1),
            "validation": self.validation(),
        }
        return self.net.policy(self.config.model_copy(update={"training": made}))

    def validation(self) -> dict[str, Any]:
        """What the policy that is kept came to when it was validated."""
        return {"seeds": f"{VALIDATION.start}..{VALIDATION.stop - 1}", "score": self.best}

    def _advantages(self, rollout: dict[str, torch.Tensor], following: torch.Tensor) -> torch.Tensor:
        """Generalised advantage estimates (Schulman et al., 2016), of each value by itself."""
        args, advantage = self.args, torch.zeros_like(following)
        advantages = torch.zeros_like(rollout["rewards"])
        for t in reversed(range(args.rollout)):
            over = rollout["over"][t].view(-1, *(1 for _ in following.shape[1:]))
            ahead = torch.where(over, rollout["bootstrap"][t], following)
            surprise = rollout["rewards"][t] + args.gamma * ahead - rollout["values"][t]
            advantage = surprise + args.gamma * args.gae_lambda * torch.where(over, 0.0, advantage)
            advantages[t] = advantage
            following = rollout["values"][t]
        return advantages

    def _parts(self, rollout: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """The rollout in random parts: of windows, or of whole sequences where there is a memory."""
        memory = rollout["memory"]
        rows = {name: rollout[name] for name in (*_KEPT, "advantages", "returns")}
        if not self.config.recurrent:
            rows = {name: value.flatten(0, 1)[None] for name, value in rows.items()}
        count = rows["actions"].shape[1]
        order = torch.randperm(count, generator=self.generator, device=self.device)
        for chosen in order.chunk(self.args.minibatches):
            part = {name: value[:, chosen] for name, value in rows.items()}
            yield part | {"memory": memory[chosen] if self.config.recurrent else memory}

    def _divergence(self, part: dict[str, torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
        """KL from the policy that training began with to the present one, summed over heads."""
        assert self.teacher is not None
        with torch.no_grad():
            before, _ = self.teacher.sequence(
                part["stacked"], part["current"], part["memory"], part["begins"]
            )
        total = torch.zeros((), device=self.device)
        for old, new in zip(before.split(self.nvec, 1), logits.split(self.nvec, 1), strict=True):
            old, new = torch.log_softmax(old, 1), torch.log_softmax(new, 1)
            total = total + (old.exp() * (old - new)).sum(1).mean()
        return total

    def _rescale(self, observations: np.ndarray) -> None:
        count = len(self.observed.mean)
        self.observed.add(observations[:, :count].astype(np.float64))
        self.net.mean[:count].copy_(torch.from_numpy(self.observed.mean.astype(np.float32)))
        spread = np.sqrt(self.observed.variance + 1e-4)  # what hardly varies is not blown up
        spread[self.unseen] = _ENDLESS
        self.net.std[:count].copy_(torch.from_numpy(spread.astype(np.float32)))

    def _scaled(self, observations: np.ndarray) -> np.ndarray:
        mean, std = self.net.mean.cpu().numpy(), self.net.std.cpu().numpy()
        return np.clip((observations - mean) / std, -CLIP, CLIP)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


_KEPT = ("stacked", "current", "begins", "actions", "logs", "values", "rewards", "over", "bootstrap")


def train(args: Arguments, make: type[Trainer] = Trainer) -> float:
    """Train a policy; its score on the validation seeds."""
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "checkpoint.pt"
    state = None
    if args.resume:
        state = torch.load(checkpoint, weights_only=False)  # our own file: it holds NumPy's states, too
        args = type(args)(**{**state["arguments"], "out": args.out, "steps": args.steps, "resume": True})
    trainer = make(args)
    if state is not None:
        trainer.restore(state)
    begun = time.perf_counter() - trainer.wall_s
    every = max(1, trainer.updates // args.validations)
    per_update = args.envs * args.rollout
    with logger(args) as log, tqdm(total=trainer.updates * per_update, initial=trainer.update * per_update,
                                    unit="window", unit_scale=True) as bar:  # fmt: skip
        if trainer.clone is not None and trainer.update == 0:
            log(trainer.validate(), 0)  # the first to beat is the clone itself
        try:
            while trainer.update < trainer.updates:
                rollout = trainer.collect()
                told = trainer.learn(rollout)
                trainer.wall_s = time.perf_counter() - begun
                late = bool(args.minutes) and trainer.wall_s > 60 * args.minutes
                if trainer.update % every == 0 or trainer.update == trainer.updates or late:
                    told |= trainer.validate()
                    trainer.wall_s = time.perf_counter() - begun
                    trainer.save()
                if trainer.finished:
                    told["score"] = float(np.mean(trainer.finished))
                    trainer.finished = []
                bar.update(per_update)
                bar.set_postfix(best=f"{trainer.best:.4f}")
                log(
                    told | {"steps_per_s": trainer.update * per_update / trainer.wall_s},
                    trainer.update * per_update,
                )
                if late:
                    break
        except KeyboardInterrupt:
            trainer.validate()
            print("stopped; --resume goes on from the last checkpoint")
    note_run(args.out, steps=trainer.update * per_update, wall_s=round(trainer.wall_s, 1))
    return trainer.best


def note_run(folder: Path, **run: float) -> None:
    """Write into a policy's file how long the whole run took; it says itself when the policy was kept."""
    policy = load_policy(folder)
    training = {**policy.config.training, "run": run}
    save_policy(folder, Policy(policy.config.model_copy(update={"training": training}), policy.weights))


@contextmanager
def logger(args: Any) -> Iterator[Any]:
    """Something that takes figures by name, and the windows played so far; `args` has `out` and `wandb`."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(args.out / "log")
    run = None
    if args.wandb is not None:
        import wandb

        run = wandb.init(project=args.wandb, config=asdict(args), dir=args.out)

    def log(figures: dict[str, float], steps: int) -> None:
        for name, figure in figures.items():
            writer.add_scalar(name, figure, steps)
        if run is not None:
            run.log(figures, step=steps)

    try:
        yield log
    finally:
        writer.close()
        if run is not None:
            run.finish()


_ENDLESS = 1e30


def _places(args: Arguments, task: Task) -> list[int]:
    """Of the entries that are not to be seen."""
    names = feature_names(task)
    for name in args.unseen:
        if name not in names:
            raise InputError(f"expected entries of the observation, found '{name}'", field="unseen")
    if args.unseen and args.init is not None:
        raise InputError("expected none beside --init: its policy has its own scaling", field="unseen")
    return [names.index(name) for name in args.unseen]


def _mask(env: Any) -> np.ndarray:
    """bool[values], what the cell can apply."""
    from llmserve_env.envs import spaces

    return spaces.action_mask(env.unwrapped.task.grid, env.unwrapped.batch.backend.not_applied)


if __name__ == "__main__":
    torch.set_num_threads(1)  # fastest for layers as small as these
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        print(f"best on the validation seeds: {train(arguments):.4f}, in {arguments.out}")
    except InputError as error:
        sys.exit(f"ppo: {error}")
