"""An agent's episodes as a Minari dataset, and a clone of it learned from nothing else.

    python examples/minari_dataset.py --agent reactive --episodes 50

`llmserve dataset` records the same. The dataset knows its environment: the clone is scored in the one that
`recover_environment` gives, and the metadata tell what each entry of an observation means.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import minari
import numpy as np
import torch
import tyro
from torch import nn
from torch.nn import functional
from tqdm import trange

from llmserve_env.commands.dataset import dataset


@dataclass
class Arguments:
    """What to record, and how much to learn from it.

    Attributes:
        task_id: id of a task.
        agent: name of an agent, or folder of a policy.
        episodes: number of episodes to record.
        epochs: passes over the data.
        out: folder of datasets (default: one that is removed at the end).
    """

    task_id: str = "bursty_workload"
    agent: str = "reactive"
    episodes: int = 20
    epochs: int = 20
    out: Path | None = None


def main(arguments: Arguments) -> dict[str, float]:
    """Record, clone, play; returns the teacher's and the clone's scores and how often they agree."""
    with tempfile.TemporaryDirectory() as folder:
        out = arguments.out or Path(folder)
        print(f"recording {arguments.episodes} episodes of {arguments.agent}, then cloning it", flush=True)
        name = f"llmserve/{arguments.task_id}/{arguments.agent}-v0"
        dataset(
            task=arguments.task_id, agent=arguments.agent, episodes=arguments.episodes, name=name, out=out
        )
        return clone(minari.MinariDataset(out / name / "data"), arguments.epochs)


def clone(data: minari.MinariDataset, epochs: int) -> dict[str, float]:
    """Learn the recorded actions from what was seen before them, and play an episode."""
    torch.manual_seed(0)
    episodes = list(data.iterate_episodes())
    seen = torch.from_numpy(np.concatenate([episode.observations[:-1] for episode in episodes]))
    done = torch.from_numpy(np.concatenate([episode.actions for episode in episodes]))
    sizes = data.action_space.nvec.tolist()
    network = nn.Sequential(nn.Linear(seen.shape[1], 64), nn.Tanh(), nn.Linear(64, sum(sizes)))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in trange(epochs, unit="epoch"):
        for part in torch.randperm(len(seen)).split(256):
            heads = network(seen[part]).split(sizes, dim=1)
            loss = sum(functional.cross_entropy(head, done[part, i]) for i, head in enumerate(heads))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def choose(observations: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.stack([head.argmax(1) for head in network(observations).split(sizes, dim=1)], 1)

    env = data.recover_environment()
    observation, _ = env.reset(seed=1_000_000)
    over = False
    while not over:
        action = choose(torch.from_numpy(observation)[None])[0].numpy()
        observation, _, terminated, truncated, info = env.step(action)
        over = terminated or truncated
    found = {
        "teacher": float(np.mean([episode.rewards.mean() for episode in episodes])),
        "clone": info["score"],
        "agreement": float((choose(seen) == done).float().mean()),
    }
    print(", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    return found


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
