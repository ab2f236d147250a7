"""Episodes that an endpoint serves."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from llmserve_env.episode import Episode
from llmserve_env.live.endpoint import open_backend

if TYPE_CHECKING:
    from llmserve_env.live.settings import EndpointSettings
    from llmserve_env.tasks import Task


class LiveEpisode(Episode):
    """One episode of a task that an endpoint serves in real time: a step takes as long as a window.

    Rewards are the task's, of what was measured: nothing is earned for memory in a window in which not all
    servers told the usage of their KV caches, nor for quality where nobody states the weights' precision;
    idle time is a lower bound. A score is a share of the demand that was sent, after the settings' bounds.
    Scores of live episodes do not compare with simulated ones, and their grade is not `verified`: nothing can
    replay them.

    `metadata["live"]` of an observation has what was cut, what failed and why, what is unmeasured, and why
    the servers' metrics are stale, if they are.

    Args:
        task: what is played.
        settings: the endpoint.

    Example:
        >>> episode = LiveEpisode(task, EndpointSettings("http://127.0.0.1:8101/v1", "tiny"))
        >>> observation = episode.reset(seed=1)
        >>> while not observation.done:
        ...     observation = episode.step(ServeAction(batch_cap=8))
        >>> grade(episode.log()).verified
        False
    """

    def __init__(self, task: Task, settings: EndpointSettings) -> None:
        super().__init__(task, backend=partial(open_backend, settings=settings))
        self.settings = settings
