"""OpenEnv's own tab, the Playground: an environment for every visitor in the place of one for all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradio.context import LocalContext
from openenv.core.env_server.serialization import deserialize_action_with_preprocessing, serialize_observation
from pydantic import ValidationError

from llmserve_env.errors import InputError
from server.environment import ServeEnvironment
from server.messages.errors import message
from server.messages.models import ServiceAction
from server.messages.refusals import NotFound, Refusal

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from server.service import Service


class Playground:
    """The environments of the visitors. One ends when its visitor leaves, or when its session times out.

    Args:
        service: that plays.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._here: dict[str, ServeEnvironment] = {}

    def __len__(self) -> int:
        return len(self._here)

    def take_over(self, web_manager: Any) -> None:
        """Let OpenEnv's page play here; it looks up its manager's methods when it calls them."""
        web_manager.reset_environment = self.reset
        web_manager.step_environment = self.step
        web_manager.get_state = self.state

    async def reset(self, reset_kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
        """Begin an episode of the visitor whose request this is."""
        name = _visitor()
        environment = self._here.get(name)
        if environment is None:
            environment = ServeEnvironment(self._service)
            await _told(self._open(name, environment))
        observation = await _told(environment.reset_async(**(reset_kwargs or {})))
        wire: dict[str, Any] = serialize_observation(observation)
        return wire

    async def step(self, action_data: dict[str, Any]) -> dict[str, Any]:
        """Serve a window of the visitor's episode."""
        environment = self._here.get(_visitor())
        if environment is None:
            raise ValueError("the episode has ended, as nobody played it for long: reset to begin another")
        try:
            action = deserialize_action_with_preprocessing(action_data, ServiceAction)
        except ValidationError as error:
            raise ValueError(message(error)["data"]["message"]) from None
        wire: dict[str, Any] = serialize_observation(await _told(environment.step_async(action)))
        return wire

    def state(self) -> dict[str, Any]:
        """Where the visitor's episode stands.

        Raises:
            NotFound: none has begun.
        """
        environment = self._here.get(_visitor())
        if environment is None:
            raise NotFound("no episode has begun")
        state: dict[str, Any] = environment.state.model_dump(mode="json")
        return state

    def leave(self, name: str) -> None:
        """A visitor has gone: end the session."""
        if name in self._here:
            self._here[name].close()

    async def _open(self, name: str, environment: ServeEnvironment) -> None:
        # The session is opened here, so that it is noticed when something closes it.
        environment.session.hang_up = lambda: self._forget(name, environment)
        self._here[name] = environment

    def _forget(self, name: str, environment: ServeEnvironment) -> None:
        if self._here.get(name) is environment:
            del self._here[name]


def _visitor() -> str:
    """The name that Gradio gave to the browser tab whose event is handled."""
    request = LocalContext.request.get(None)
    return str(request.session_hash) if request is not None else ""


async def _told(asked: Awaitable[Any]) -> Any:
    """What was asked for; a refusal as an error whose text says all."""
    try:
        return await asked
    except (Refusal, InputError) as error:
        raise ValueError(message(error)["data"]["message"]) from None
