"""The torch side of `llmserve_env.agents.policy`: the same network, to be trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from llmserve_env.agents.policy import Policy, PolicyConfig
from llmserve_env.controls import SPECS

if TYPE_CHECKING:
    from numpy.typing import NDArray

STAY, STAY_OF_RESTARTS = 3.0, 6.0
"""What staying with a value is worth at first, in logits; more where a change restarts engines."""


class Network(nn.Module):
    """Actor and critic. Weights of the actor have the names and shapes that `Policy` expects.

    Args:
        config: of the policy.
        values: sums of rewards that the critic foretells.
    """

    def __init__(self, config: PolicyConfig, values: int = 1) -> None:
        super().__init__()
        self.config = config
        width, inputs = config.hidden, config.frames * len(config.features)
        self.nvec = [len(values) for values in config.controls.values()]
        self.first = _layer(inputs, width)
        if config.recurrent:
            self.gru = nn.GRUCell(width, width)
        else:
            self.second = _layer(width, width)
        self.heads = _layer(width, sum(self.nvec), 0.01)
        stay = [STAY_OF_RESTARTS if SPECS[name].declared.restarts else STAY for name in config.controls]
        self.stay = nn.Parameter(torch.tensor(stay))
        self.critic = nn.Sequential(_layer(inputs + (width if config.recurrent else 0), width), nn.Tanh(),
                                    _layer(width, width), nn.Tanh(), _layer(width, values, 1.0))  # fmt: skip
        counts = torch.tensor(self.nvec)
        self.register_buffer("offsets", counts.cumsum(0) - counts, persistent=False)
        self.register_buffer("counts", counts, persistent=False)
        self.register_buffer("mean", torch.zeros(len(config.features)))
        self.register_buffer("std", torch.ones(len(config.features)))

    def forward(self, stacked: Tensor, current: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One window of n episodes.

        Args:
            stacked: float32[n, frames * features], scaled.
            current: int64[n, controls], indices of the values that are set.
            memory: float32[n, hidden], of the GRU.

        Returns:
            Logits float32[n, values], values float32[n] (or [n, k], where the critic has k), the GRU's next
            state.
        """
        x = torch.tanh(self.first(stacked))
        if self.config.recurrent:
            x = memory = self.gru(x, memory)
            value = self.critic(torch.cat([stacked, memory.detach()], 1))
        else:
            x = torch.tanh(self.second(x))
            value = self.critic(stacked)
        return self._steady(self.heads(x), current), _flat(value), memory

    def sequence(
        self, stacked: Tensor, current: Tensor, memory: Tensor, begins: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Windows of n episodes, t in a row.

        Args:
            stacked: float32[t, n, frames * features], scaled.
            current: int64[t, n, controls].
            memory: float32[n, hidden], the GRU's state before the first.
            begins: float32[t, n], 1 where an episode begins.

        Returns:
            Logits float32[t * n, values] and values float32[t * n], or [t * n, k].
        """
        if not self.config.recurrent:
            logits, values, _ = self(stacked.flatten(0, 1), current.flatten(0, 1), memory)
            return logits, values
        x = torch.tanh(self.first(stacked))
        states = []
        for inputs, begin in zip(x, begins, strict=True):
            memory = self.gru(inputs, memory * (1 - begin)[:, None])
            states.append(memory)
        seen = torch.stack(states).flatten(0, 1)
        logits = self._steady(self.heads(seen), current.flatten(0, 1))
        return logits, _flat(self.critic(torch.cat([stacked.flatten(0, 1), seen.detach()], 1)))

    def _steady(self, logits: Tensor, current: Tensor) -> Tensor:
        places = torch.zeros_like(logits).scatter_(1, current + self.offsets, 1.0)
        return logits + places * self.stay.repeat_interleave(self.counts)

    def policy(self, config: PolicyConfig | None = None) -> Policy:
        """The actor as it is now, for NumPy."""
        weights: dict[str, NDArray[np.float32]] = {
            name: value.detach().cpu().numpy().copy()
            for name, value in self.state_dict().items()
            if not name.startswith("critic.")
        }
        return Policy(config or self.config, weights)

    def load(self, policy: Policy) -> None:
        """Take an actor's weights; the critic stays as it is."""
        found = {name: torch.from_numpy(value.copy()) for name, value in policy.weights.items()}
        self.load_state_dict({**self.state_dict(), **found})


def log_prob(logits: Tensor, actions: Tensor, nvec: list[int], mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of actions under their heads.

    Args:
        logits: float32[n, values].
        actions: int64[n, controls].
        nvec: number of values of each control.
        mask: bool[values], the values that the cell can apply.

    Returns:
        Log-probabilities float32[n], entropies of the heads float32[n, controls].
    """
    total = torch.zeros(len(logits), device=logits.device)
    entropies = []
    for control, head in enumerate(logits.masked_fill(~mask, -1e9).split(nvec, 1)):
        logs = torch.log_softmax(head, 1)
        total = total + logs.gather(1, actions[:, control : control + 1])[:, 0]
        entropies.append(-(logs.exp() * logs).sum(1))
    return total, torch.stack(entropies, 1)


def sample(logits: Tensor, nvec: list[int], mask: Tensor, generator: torch.Generator) -> Tensor:
    """int64[n, controls], drawn from every head."""
    noise = torch.empty(logits.shape, device=logits.device).exponential_(generator=generator)
    drawn = logits.masked_fill(~mask, -1e9) - noise.log()
    return torch.stack([head.argmax(1) for head in drawn.split(nvec, 1)], 1)


def _flat(value: Tensor) -> Tensor:
    """float32[n] of [n, 1]; of several values, all."""
    return value[:, 0] if value.shape[1] == 1 else value


def _layer(inputs: int, outputs: int, gain: float = 2**0.5) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer
