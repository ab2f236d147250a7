"""Agents that misbehave, and one that says what it is told."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np

from llmserve_env.controls import to_array
from llmserve_env.schema import ServeAction


@dataclass
class Scripted:
    """Answers each call with the next of its answers, with the last from then on.

    An answer is a ServeAction; an error, which it raises; an Event, for which it waits before it says
    `ServeAction(batch_cap=1)`; anything else is returned as it is.
    """

    answers: list[object]
    name: str = "scripted"
    seen: list[np.ndarray] = field(default_factory=list)

    def reset(self, task, seeds):
        self.seen = []

    def act(self, observations, windows):
        answer = self.answers[min(len(self.seen), len(self.answers) - 1)]
        self.seen.append(observations.copy())
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(answer, threading.Event):
            assert answer.wait(60)
            answer = ServeAction(batch_cap=1)
        return to_array([answer]) if isinstance(answer, ServeAction) else answer
