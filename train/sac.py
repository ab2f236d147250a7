"""SAC on the continuous form of a task: soft actor-critic (Haarnoja et al., 2018), from a replay buffer.

    python -m train.sac --task-id bursty_workload --out out/sac

Noise in every window would restart engines in every window: precision and split are parts of the box, too.
So the mean of an untrained policy is what is set, its spread is small, least where a change restarts
engines, and in place of the entropy stands the divergence from that policy (Galashov et al., 2019): a move
has to be worth its nats. The temperature holds the divergence within a budget. What lies farther away is
seen first: in the first part, and in some episodes ever after, a random setting is held for many windows.

The policy is kept as it was best on validation episodes, whose seeds are none of those that training draws.
Ctrl-C ends the training as if its steps were over; --resume goes on from the last checkpoint, bit for bit.

What is logged (TensorBoard, in OUT/log):
    score            mean score of the episodes that the policy ended since the last line
    validation       mean score of the mean actions on the validation seeds
    critic_loss      mean squared surprise of the critics, in the scaled reward's unit
    value            mean of what the critics expect, in the same unit
    divergence       of the policy from one that leaves things alone (nats a window)
    temperature      what a nat of it costs
    spread/CONTROL   mean standard deviation, before the squash
    steps_per_s      windows served per second, learning included
"""

from __future__ import annotations

import json
import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode
from torch import Tensor, nn
from tqdm import tqdm

import llmserve_env
from llmserve_env.agents import play
from llmserve_env.agents.continuous_policy import (
    EDGE,
    ContinuousConfig,
    ContinuousPolicy,
    ContinuousPolicyAgent,
)
from llmserve_env.agents.policy import CLIP, save_policy
from llmserve_env.controls import SPECS, BoxActions, to_array
from llmserve_env.files import open_atomic
from llmserve_env.observation import feature_names
from train.ppo import VALIDATION, Statistics, logger

SPREAD, SPREAD_OF_RESTARTS = 0.3, 0.12
"""Standard deviations at first, before the squash; of precision and split, whose change restarts engines."""
RANGE = 1.5
"""Farthest that the logarithm of a spread goes from where it began."""


@dataclass
class Arguments:
    """How to train."""

    task_id: str = "bursty_workload"
    """Id of a task."""
    out: Path = Path("out/sac")
    """Folder of the policy, the checkpoint and the log."""
    steps: int = 400_000
    """Windows to play."""
    minutes: float = 0.0
    """Wall time after which to stop (min); 0 for none."""
    seed: int = 1
    """Random seed."""
    envs: int = 64
    """Episodes side by side."""
    threads: int = 1
    """Simulator threads."""
    first: int = 50_000
    """Windows of the first part, in which random settings are held and nothing is learned."""
    held: float = 0.004
    """Probability that a control's random setting gives way to another in a window."""
    explorers: float = 0.125
    """Share of the episodes side by side in which random settings go on being held."""
    replay: int = 300_000
    """Windows that are remembered."""
    updates: int = 8
    """Updates between two windows of all episodes."""
    batch: int = 256
    """Windows of an update."""
    learning_rate: float = 1e-3
    """Learning rate of Adam, falling to zero in a straight line."""
    gamma: float = 0.99
    """Discount of a window."""
    tau: float = 0.01
    """Share of the way that the targets follow the critics in an update."""
    warmup: int = 600
    """Updates of the critics alone, before the policy changes."""
    temperature: float = 0.1
    """Cost of a nat of divergence at first, in the scaled reward's unit."""
    temperature_least: float = 0.01
    """Least cost of a nat, however little of the budget is used."""
    temperature_rate: float = 3e-3
    """Learning rate of Adam for the temperature's logarithm."""
    nats: float = 1.0
    """Divergence that the temperature allows in a window, in the mean."""
    max_grad_norm: float = 10.0
    """Largest norm of a gradient; longer ones are scaled down to it."""
    hidden: int = 128
    """Width of the layers."""
    validations: int = 10
    """Number of times that the policy is measured, to keep the best."""
    device: str = "auto"
    """Device of the network: cpu or cuda; auto takes CUDA where it is."""
    wandb: str | None = None
    """Project at Weights & Biases to log to, beside TensorBoard."""
    resume: bool = False
    """Whether to go on from OUT's checkpoint, with its arguments."""


class Actor(nn.Module):
    """A Gaussian around what is set, to be squashed. Its mean is what `ContinuousPolicy` computes.

    Args:
        config: of the policy.
        granted: bool[controls], those that the task grants.
    """

    def __init__(self, config: ContinuousConfig, granted: np.ndarray) -> None:
        super().__init__()
        self.config = config
        width, inputs, controls = config.hidden, len(config.features), len(config.controls)
        self.first = nn.Linear(inputs, width)
        self.second = nn.Linear(width, width)
        self.move = nn.Linear(width, controls)
        self.stay = nn.Parameter(torch.ones(controls))
        self.spread = nn.Linear(width, controls)
        for layer in (self.move, self.spread):  # an untrained policy leaves everything as it is
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        narrow = [SPREAD_OF_RESTARTS if SPECS[name].declared.restarts else SPREAD for name in config.controls]
        self.register_buffer("narrow", torch.tensor(narrow).log())
        self.register_buffer("granted", torch.from_numpy(granted))
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("std", torch.ones(inputs))

    def forward(self, observations: Tensor, current: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means, what they would be if all stayed as it is, and logarithms of the spreads, before the squash.

        Args:
            observations: float32[n, features], as they are seen.
            current: float32[n, controls], what is set, in the box.
        """
        x = torch.tanh(self.first(self.scaled(observations)))
        x = torch.tanh(self.second(x))
        place = torch.atanh(current.clamp(-EDGE, EDGE))
        return self.stay * place + self.move(x), place, self.narrow + RANGE * torch.tanh(self.spread(x))

    def sample(self, observations: Tensor, current: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions in the box, float32[n, controls], and the divergence from an untrained policy, float32[n].

        Both are of the granted controls only. The squash changes nothing in a divergence.
        """
        mean, place, log_spread = self(observations, current)
        box = torch.tanh(mean + log_spread.exp() * noise) * self.granted
        wider = log_spread - self.narrow
        farther = (mean - place) / self.narrow.exp()
        divergence = 0.5 * ((2 * wider).exp() + farther.square() - 1) - wider
        return box, (divergence * self.granted).sum(1)

    def scaled(self, observations: Tensor) -> Tensor:
        """float32[n, features], in standard deviations."""
        return ((observations - self.mean) / self.std).clamp(-CLIP, CLIP)

    def policy(self, config: ContinuousConfig) -> ContinuousPolicy:
        """The mean as it is now, for NumPy."""
        left_out = ("spread.", "narrow", "granted")
        weights = {name: value.detach().cpu().numpy().copy() for name, value in self.state_dict().items()
                   if not name.startswith(left_out)}  # fmt: skip
        return ContinuousPolicy(config, weights)


class Critics(nn.Module):
    """Two networks that say what an action will come to, from what is seen and what is set.

    Args:
        inputs: entries of the observation.
        controls: entries of the box.
        width: of the layers.
    """

    def __init__(self, inputs: int, controls: int, width: int) -> None:
        super().__init__()

        def network() -> nn.Sequential:
            return nn.Sequential(nn.Linear(inputs + 2 * controls, width), nn.LayerNorm(width), nn.ReLU(),
                                 nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU(),
                                 nn.Linear(width, 1))  # fmt: skip

        self.one, self.other = network(), network()

    def forward(self, scaled: Tensor, current: Tensor, box: Tensor) -> Tensor:
        """float32[2, n]."""
        x = torch.cat([scaled, current, box], 1)
        return torch.stack([self.one(x)[:, 0], self.other(x)[:, 0]])


class Replay:
    """The last windows of all episodes, in arrays that are made once.

    Args:
        size: windows that are remembered.
        features: entries of an observation.
        controls: entries of the box.
    """

    def __init__(self, size: int, features: int, controls: int) -> None:
        shapes = {"observations": features, "current": controls, "box": controls,
                  "following": features, "set": controls}  # fmt: skip
        self.rows = {name: np.empty((size, width), np.float32) for name, width in shapes.items()}
        self.rows["rewards"] = np.empty(size, np.float32)
        self.rows["terminated"] = np.empty(size, np.float32)
        self.size, self.count, self.next = size, 0, 0

    def add(self, **rows: np.ndarray) -> None:
        """Remember windows, over the oldest where there is no room left."""
        places = (self.next + np.arange(len(rows["rewards"]))) % self.size
        for name, kept in self.rows.items():
            kept[places] = rows[name]
        self.next = int(places[-1] + 1) % self.size
        self.count = min(self.count + len(places), self.size)

    def sample(self, count: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
        """Windows drawn at random, with replacement."""
        places = generator.integers(self.count, size=count)
        return {name: kept[places] for name, kept in self.rows.items()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        rows = {name: torch.from_numpy(kept[: self.count]) for name, kept in self.rows.items()}
        return {"rows": rows, "next": self.next}

    def restore(self, state: dict[str, Any]) -> None:
        """As it was."""
        self.next, self.count = state["next"], len(state["rows"]["rewards"])
        for name, kept in self.rows.items():
            kept[: self.count] = state["rows"][name].numpy()


class Trainer:
    """Everything that training changes, so that a checkpoint can hold it.

    Args:
        args: how to train.
    """

    def __init__(self, args: Arguments) -> None:
        self.args = args
        cuda = args.device == "auto" and torch.cuda.is_available()
        self.device = torch.device("cuda" if cuda else "cpu" if args.device == "auto" else args.device)
        torch.manual_seed(args.seed)
        self.generator = torch.Generator(self.device).manual_seed(args.seed)
        self.random = np.random.default_rng(args.seed)
        self.env = gym.make_vec(
            "LLMServeContinuous-v0", num_envs=args.envs, task_id=args.task_id, threads=args.threads
        )
        assert self.env.unwrapped.autoreset_mode is AutoresetMode.SAME_STEP, "see `play`"
        self.task = self.env.unwrapped.task
        self.actions = BoxActions(self.task.grid)
        self.granted = self.task.grid.nvec > 1
        self.config = ContinuousConfig(
            package_version=llmserve_env.__version__,
            task_id=self.task.id,
            features=feature_names(self.task),
            controls={name: list(values) for name, values in self.task.grid.values.items()},
            hidden=args.hidden,
        )
        self.actor = Actor(self.config, self.granted).to(self.device)
        count = len(self.config.features)
        self.critics = Critics(count, len(self.config.controls), args.hidden).to(self.device)
        self.targets = deepcopy(self.critics).requires_grad_(False)
        self.log_temperature = torch.tensor(np.log(args.temperature), dtype=torch.float32, device=self.device)
        self.log_temperature.requires_grad_(True)
        self.optimizers = {
            "actor": torch.optim.Adam(self.actor.parameters(), lr=args.learning_rate),
            "critics": torch.optim.Adam(self.critics.parameters(), lr=args.learning_rate),
            "temperature": torch.optim.Adam([self.log_temperature], lr=args.temperature_rate),
        }
        self.replay = Replay(args.replay, count, len(self.config.controls))
        self.observed = Statistics(np.zeros(count), np.ones(count))
        self.returns = Statistics()
        self.step = 0
        self.update = 0
        self.best = -np.inf
        self.wall_s = 0.0
        self.finished: list[float] = []
        drawn = self.random.choice(VALIDATION.start, args.envs, replace=False)
        self.observations, _ = self.env.reset(seed=[int(seed) for seed in drawn])
        self.start = self.actions.box(to_array([self.task.start]))[0]
        self.current = np.tile(self.start, (args.envs, 1))
        self.holding = self.random.uniform(-1, 1, self.current.shape).astype(np.float32)
        self.running = np.zeros(args.envs)  # discounted sums of rewards, for their scale
        self.history = np.zeros((self.task.windows, args.envs, len(self.config.controls)), np.float32)

    @property
    def steps(self) -> int:
        """Windows that each episode side by side is to play."""
        return max(1, self.args.steps // self.args.envs)

    @property
    def exploring(self) -> bool:
        """Whether this is the first part."""
        return self.step * self.args.envs < self.args.first

    def play(self) -> None:
        """Play a window of every episode, and remember it."""
        args = self.args
        box = self._box()
        self.history[self.env.unwrapped.batch.steps, np.arange(args.envs)] = box
        observations, rewards, terminated, truncated, info = self.env.step(box)
        over = terminated | truncated
        following = observations
        if over.any():
            # Same-step resets: what is seen is the next episode's first, the last one is in the info.
            following = observations.copy()
            following[over] = np.stack([info["final_obs"][i] for i in np.flatnonzero(over)])
            policys = over & (self._explorers() == 0)
            self.finished += info["final_info"]["score"][policys].tolist()
        placed = self.actions.box(self.actions.records(box))
        # An episode that is cut off at its horizon would have gone on: only termination ends what is earned.
        self.replay.add(
            observations=self.observations, current=self.current, box=box, rewards=rewards,
            following=following, set=placed, terminated=terminated,
        )  # fmt: skip
        if self.exploring:
            self._rescale(self.observations)
            self.running = self.running * args.gamma + rewards
            self.returns.add(self.running)
            self.running[over] = 0.0
        self.observations = observations
        self.current = np.where(over[:, None], self.start, placed)
        self.step += 1

    def learn(self) -> dict[str, float]:
        """Update critics, actor, temperature and targets; what is logged of it."""
        args = self.args
        part = {name: torch.from_numpy(rows).to(self.device)
                for name, rows in self.replay.sample(args.batch, self.random).items()}  # fmt: skip
        left = 1.0 - self.step / (self.steps + 1)
        for name in ("actor", "critics"):
            for group in self.optimizers[name].param_groups:
                group["lr"] = args.learning_rate * left
        seen, current = part["observations"], part["current"]
        scaled = self.actor.scaled(seen)
        values = self.critics(scaled, current, part["box"])
        critic_loss = (values - self.returns_of(part)).square().mean()
        self._descend("critics", critic_loss, self.critics)

        box, divergence = self.actor.sample(seen, current, self._noise(len(seen)))
        if self.update >= args.warmup:
            self.critics.requires_grad_(False)
            value = self.critics(scaled, current, box).min(0).values
            self._descend("actor", (self._temperature() * divergence - value).mean(), self.actor)
            self.critics.requires_grad_(True)
            left_over = (args.nats - divergence.detach()).mean()
            self._descend("temperature", self.log_temperature * left_over, None)
        with torch.no_grad():
            self.log_temperature.clamp_(min=float(np.log(args.temperature_least)))
            for target, critic in zip(self.targets.parameters(), self.critics.parameters(), strict=True):
                target.lerp_(critic, args.tau)
        self.update += 1
        return {
            "critic_loss": float(critic_loss.detach()),
            "value": float(values.detach().mean()),
            "divergence": float(divergence.detach().mean()),
            "temperature": float(self._temperature()),
        }

    def returns_of(self, part: dict[str, Tensor]) -> Tensor:
        """float32[n], what windows came to: the scaled reward, and what the targets expect of the rest."""
        with torch.no_grad():
            following, placed = part["following"], part["set"]
            box, divergence = self.actor.sample(following, placed, self._noise(len(following)))
            ahead = self.targets(self.actor.scaled(following), placed, box).min(0).values
            ahead = ahead - self._temperature() * divergence
            rewards = part["rewards"] / float(np.sqrt(self.returns.variance + 1e-8))
            return rewards + self.args.gamma * (1 - part["terminated"]) * ahead

    def validate(self) -> float:
        """Mean score of the mean actions on the validation seeds; keeps the policy if it is the best."""
        score = float(play(ContinuousPolicyAgent(self.policy()), self.task, VALIDATION).scores.mean())
        if score > self.best:
            self.best = score
            save_policy(self.args.out, self.policy())
        return score

    def save(self) -> None:
        """Write the checkpoint. Of the episodes it holds seeds and actions: they are replayed."""
        batch = self.env.unwrapped.batch
        state = {name: getattr(self, name) for name in _STATE}
        state |= {name: getattr(self, name).state_dict() for name in _NETWORKS}
        state |= {
            "arguments": asdict(self.args), "replay": self.replay.state(),
            "log_temperature": self.log_temperature.detach(),
            "optimizers": {name: each.state_dict() for name, each in self.optimizers.items()},
            "generator": self.generator.get_state(), "random": self.random.bit_generator.state,
            "seeds": batch.seeds.copy(), "steps": batch.steps.copy(),
            "draws": [draw.bit_generator.state for draw in self.env.unwrapped.np_random],
        }  # fmt: skip
        with open_atomic(self.args.out / "checkpoint.pt") as file:
            torch.save(state, file)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint of the same arguments."""
        for name in _STATE:
            setattr(self, name, state[name])
        for name in _NETWORKS:
            getattr(self, name).load_state_dict(state[name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        with torch.no_grad():
            self.log_temperature.copy_(state["log_temperature"])
        self.replay.restore(state["replay"])
        self.generator.set_state(state["generator"])
        self.random.bit_generator.state = state["random"]
        env = self.env.unwrapped
        env.reset(seed=state["seeds"].tolist())
        for step in range(int(state["steps"].max())):
            env.batch.step(self.actions.records(self.history[step]), state["steps"] > step)
        for draw, at in zip(env.np_random, state["draws"], strict=True):
            draw.bit_generator.state = at

    def policy(self) -> ContinuousPolicy:
        """The policy as it is now, with how it came about."""
        made = {
            "arguments": json.loads(json.dumps(asdict(self.args), default=str)),
            "steps": self.step * self.args.envs,
            "wall_s": round(self.wall_s, 1),
            "validation": {"seeds": f"{VALIDATION.start}..{VALIDATION.stop - 1}", "score": self.best},
        }
        return self.actor.policy(self.config.model_copy(update={"training": made}))

    def spreads(self) -> dict[str, float]:
        """Mean spread of each granted control, where the episodes are now."""
        with torch.no_grad():
            _, _, log_spread = self.actor(*self._now())
        means = log_spread.exp().mean(0).tolist()
        found = zip(self.config.controls, means, self.granted, strict=True)
        return {f"spread/{name}": mean for name, mean, granted in found if granted}

    def _box(self) -> np.ndarray:
        """float32[envs, controls], what to set next: the policy's, or where it explores, random and held."""
        changed = self.random.random(self.holding.shape) < self.args.held
        anew = self.random.uniform(-1, 1, self.holding.shape).astype(np.float32)
        self.holding = np.where(changed, anew, self.holding)
        if self.exploring:
            return self.holding * self.granted
        with torch.no_grad():
            box, _ = self.actor.sample(*self._now(), self._noise(self.args.envs))
        return np.where(self._explorers()[:, None], self.holding * self.granted, box.cpu().numpy())

    def _explorers(self) -> np.ndarray:
        """bool[envs], the episodes in which random settings are held."""
        share = 1.0 if self.exploring else self.args.explorers
        return np.arange(self.args.envs) < share * self.args.envs

    def _now(self) -> tuple[Tensor, Tensor]:
        return (torch.from_numpy(self.observations).to(self.device),
                torch.from_numpy(self.current).to(self.device))  # fmt: skip

    def _noise(self, count: int) -> Tensor:
        return torch.randn((count, len(self.config.controls)), generator=self.generator, device=self.device)

    def _temperature(self) -> Tensor:
        return self.log_temperature.detach().exp()

    def _descend(self, name: str, loss: Tensor, module: nn.Module | None) -> None:
        self.optimizers[name].zero_grad()
        loss.backward()
        if module is not None:
            nn.utils.clip_grad_norm_(module.parameters(), self.args.max_grad_norm)
        self.optimizers[name].step()

    def _rescale(self, observations: np.ndarray) -> None:
        self.observed.add(observations.astype(np.float64))
        self.actor.mean.copy_(torch.from_numpy(self.observed.mean.astype(np.float32)))
        spread = np.sqrt(self.observed.variance + 1e-4)  # what hardly varies is not blown up
        self.actor.std.copy_(torch.from_numpy(spread.astype(np.float32)))


_STATE = ("observed", "returns", "step", "update", "best", "wall_s", "finished", "observations", "current",
          "holding", "running", "history")  # fmt: skip
_NETWORKS = ("actor", "critics", "targets")


def train(args: Arguments) -> float:
    """Train a policy; its score on the validation seeds."""
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "checkpoint.pt"
    state = None
    if args.resume:
        state = torch.load(checkpoint, weights_only=False)  # our own file: it holds NumPy's states, too
        args = Arguments(**{**state["arguments"], "out": args.out, "steps": args.steps, "resume": True})
    trainer = Trainer(args)
    if state is not None:
        trainer.restore(state)
    begun = time.perf_counter() - trainer.wall_s
    every = max(1, trainer.steps // args.validations)
    with logger(args) as log, tqdm(total=trainer.steps * args.envs, initial=trainer.step * args.envs,
                                   unit="window", unit_scale=True) as bar:  # fmt: skip
        try:
            while trainer.step < trainer.steps:
                trainer.play()
                told: dict[str, float] = {}
                if not trainer.exploring:
                    for _ in range(args.updates):
                        told = trainer.learn()
                bar.update(args.envs)
                trainer.wall_s = time.perf_counter() - begun
                late = bool(args.minutes) and trainer.wall_s > 60 * args.minutes
                due = trainer.step % every == 0 and not trainer.exploring
                measured = due or trainer.step == trainer.steps or late
                if not measured and trainer.step % 100:
                    continue
                if measured:
                    told["validation"] = trainer.validate()
                    trainer.save()
                if trainer.finished:
                    told["score"] = float(np.mean(trainer.finished))
                    trainer.finished = []
                bar.set_postfix(best=f"{trainer.best:.4f}")
                told["steps_per_s"] = trainer.step * args.envs / trainer.wall_s
                log(told | trainer.spreads(), trainer.step * args.envs)
                if late:
                    break
        except KeyboardInterrupt:
            trainer.validate()
            print("stopped; --resume goes on from the last checkpoint")
    return trainer.best


if __name__ == "__main__":
    torch.set_num_threads(1)  # fastest for layers as small as these
    arguments = tyro.cli(Arguments, description=__doc__)
    print(f"best on the validation seeds: {train(arguments):.4f}, in {arguments.out}")
