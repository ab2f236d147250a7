"""Trainers keep the policy that validates best, and say what it came to."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from _small import trainer_of

from llmserve_env.agents.continuous_policy import load_continuous_policy
from llmserve_env.agents.policy import load_policy
from train import ppo, sac


def ppo_trainer(out):
    return trainer_of(ppo, 1)(out)


def sac_trainer(out):
    return sac.Trainer(sac.Arguments(out=out, envs=2, hidden=16, replay=150, device="cpu"))


@pytest.mark.parametrize(
    ("module", "make", "load"),
    [(ppo, ppo_trainer, load_policy), (sac, sac_trainer, load_continuous_policy)],
    ids=["ppo", "sac"],
)
@pytest.mark.parametrize(("scores", "best"), [([0.5, 0.8, 0.7, 0.8], 1), ([0.6, 0.5], 0), ([0.1, 0.2], 1)])
def test_the_first_of_the_best_is_kept(tmp_path, monkeypatch, module, make, load, scores, best):
    left = iter(scores)
    monkeypatch.setattr(module, "play", lambda *_: SimpleNamespace(scores=np.array([next(left)])))
    trainer = make(tmp_path)
    for number in range(len(scores)):
        with torch.no_grad():
            for weights in (trainer.net if module is ppo else trainer.actor).parameters():
                weights.fill_(number)
        trainer.validate()
    kept = load(tmp_path)
    (number,) = np.unique(kept.weights["first.weight"])
    assert number == best
    assert trainer.best == kept.config.training["validation"]["score"] == max(scores)
