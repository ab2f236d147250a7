"""What the service answers: OpenEnv's types with the fields of the schema."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from openenv.core.env_server.types import Action, Observation, State
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json

from llmserve_env.schema import ServeAction, ServeObservation, ServeState

_RESPONSE = ConfigDict(extra="allow", use_attribute_docstrings=True)


class ServiceAction(ServeAction, Action):
    """A `ServeAction` for OpenEnv."""


class ServiceObservation(ServeObservation, Observation):
    """A `ServeObservation` for OpenEnv."""

    reward: float
    """Reward of the window."""
    done: bool
    """Whether the episode is over."""


class ServiceState(ServeState, State):
    """A `ServeState` for OpenEnv."""


class ObservationResponse(BaseModel):
    """An observation as OpenEnv sends it."""

    model_config = _RESPONSE

    observation: dict[str, Any]
    """Fields of a `ServeObservation` but reward and done."""
    reward: float
    """Reward of the window; 0 after a reset."""
    done: bool
    """Whether the episode is over."""
    metadata: dict[str, Any]
    """The observation's metadata; session_id names the session."""


class WindowResponse(BaseModel):
    """One of several windows."""

    model_config = _RESPONSE

    observation: dict[str, Any]
    """Fields of a `ServeObservation` but reward and done."""
    reward: float
    """Reward of the window."""
    done: bool
    """Whether the episode is over."""


class StepsResponse(BaseModel):
    """Several windows."""

    model_config = _RESPONSE

    steps: list[WindowResponse]
    """The windows, or only the last."""
    rewards: list[float]
    """Reward of each window."""
    played: int
    """Windows that were played."""


class TaskList(BaseModel):
    """What can be played."""

    model_config = _RESPONSE

    tasks: list[dict[str, Any]]
    """One entry a task."""
    default: str
    """Task of a reset that names none."""
    seeds: dict[Literal["training", "evaluation"], Annotated[list[int], Field(min_length=2, max_length=2)]]
    """First and last seed for each."""


def window(observation: ServeObservation) -> dict[str, Any]:
    """An observation on the wire, one of several."""
    fields = observation.model_dump(mode="json", exclude={"reward", "done"})
    return {"observation": fields, "reward": observation.reward, "done": observation.done}


def single(observation: ServeObservation) -> dict[str, Any]:
    """An observation on the wire, by itself."""
    wire = window(observation)
    # OpenEnv's generic clients read it here, typed ones within the observation.
    return {**wire, "metadata": wire["observation"]["metadata"]}


def steps(observations: list[ServeObservation], every: bool) -> dict[str, Any]:
    """Several windows on the wire."""
    sent = observations if every else observations[-1:]
    return {
        "steps": [window(observation) for observation in sent],
        "rewards": [observation.reward for observation in observations],
        "played": len(observations),
    }


def json_bytes(data: dict[str, Any]) -> bytes:
    """As JSON, which has no infinite numbers: they stand as texts."""
    return to_json(data, inf_nan_mode="strings")
