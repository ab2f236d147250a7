"""The service as an OpenEnv environment: for the package's own routes and page."""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import PackageNotFoundError, metadata
from typing import TYPE_CHECKING, Any

from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import EnvironmentMetadata

import llmserve_env
from llmserve_env.tasks import EVALUATION_SEEDS, TRAINING_SEEDS, list_tasks
from server.messages.models import ServiceAction, ServiceObservation, ServiceState
from server.messages.refusals import Conflict, NotFound
from server.messages.requests import ResetRequest

if TYPE_CHECKING:
    from llmserve_env.schema import ServeObservation
    from server.service import Service
    from server.sessions import Session

_SPLITS = {"train": (TRAINING_SEEDS, 1000), "test": (EVALUATION_SEEDS, 10)}
"""OpenEnv's splits: from which seeds, and with how many of them each task is listed."""


class ServeEnvironment(Environment):
    """A session of a service, for code that drives an OpenEnv `Environment` itself.

    Args:
        service: that plays. The session is opened by the first reset and ends with `close`.
    """

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, service: Service) -> None:
        super().__init__()
        self._service = service
        self._session: Session | None = None

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Any:
        """Not here: the service is asynchronous."""
        raise NotImplementedError("await reset_async")

    def step(self, action: Any, timeout_s: float | None = None, **kwargs: Any) -> Any:
        """Not here: the service is asynchronous."""
        raise NotImplementedError("await step_async")

    async def reset_async(
        self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any
    ) -> ServiceObservation:
        """Begin an episode; further arguments are those of `ResetRequest`."""
        request = ResetRequest(seed=seed, episode_id=episode_id, **kwargs)
        return _typed(await self._service.reset(self.session, request))

    async def step_async(
        self, action: ServiceAction, timeout_s: float | None = None, **kwargs: Any
    ) -> ServiceObservation:
        """Serve one window."""
        if self._session is None:
            raise Conflict("no episode has begun: reset first")
        return _typed((await self._service.step(self._session, [action]))[0])

    @property
    def session(self) -> Session:
        """The session, opened when it is first needed.

        Raises:
            AtCapacity: there is no room.
        """
        if self._session is None:
            self._session = self._service.sessions.open()
        return self._session

    @property
    def state(self) -> ServiceState:
        """Where the episode stands."""
        return ServiceState() if self._session is None else self._session.state

    def get_metadata(self) -> EnvironmentMetadata:
        """Name, description, version."""
        return EnvironmentMetadata(
            name="LLMServe",
            description=_description(),
            version=llmserve_env.__version__,
            author="LLMServe contributors",
        )

    def close(self) -> None:
        """End the session."""
        if self._session is not None:
            self._service.sessions.close(self._session)
            self._session = None

    def list_splits(self) -> list[dict[str, str]]:
        """OpenEnv's splits."""
        return [{"name": name, "type": name} for name in _SPLITS]

    def num_tasks(self, split: str) -> int:
        """How many episodes a split lists.

        Raises:
            NotFound: there is no such split.
        """
        return len(list_tasks()) * _split(split)[1]

    def get_task(self, split: str, index: int) -> dict[str, Any]:
        """An episode of a split: what to give to reset.

        Raises:
            NotFound: there is no such split.
            IndexError: it has fewer episodes.
        """
        seeds, _ = _split(split)
        if not 0 <= index < self.num_tasks(split):
            raise IndexError(f"expected 0..{self.num_tasks(split) - 1}, found {index}")
        number, task = divmod(index, len(list_tasks()))
        return {"task_id": list_tasks()[task], "seed": seeds[number]}

    def get_task_range(self, split: str, start: int | None = None, stop: int | None = None) -> list[Any]:
        """Episodes of a split, as a slice."""
        indices = range(self.num_tasks(split))[slice(start, stop)]
        return [self.get_task(split, index) for index in indices]

    def list_tasks(self, split: str) -> list[Any]:
        """All episodes of a split."""
        return self.get_task_range(split)


def _split(name: str) -> tuple[range, int]:
    if name not in _SPLITS:
        raise NotFound(f"no split {name!r}: expected one of {', '.join(_SPLITS)}")
    return _SPLITS[name]


def _typed(observation: ServeObservation) -> ServiceObservation:
    return ServiceObservation.model_validate(observation.model_dump())


@lru_cache(maxsize=1)
def _description() -> str:
    try:
        return metadata("llmserve-env")["Summary"]
    except PackageNotFoundError:  # run from a checkout that is not installed
        return llmserve_env.__doc__.splitlines()[0] if llmserve_env.__doc__ else "LLMServe"
