"""What the service's tests play, here and on a server."""

from __future__ import annotations

from typing import Any

import httpx
from pydantic_core import from_json, to_json
from websockets.sync.client import ClientConnection, connect

from llmserve_env import Episode, load_task
from llmserve_env.schema import EpisodeLog, ServeAction

TASK = "adversarial_multitenant"
HORIZON_S = 20.0
"""Four windows."""
BEGIN: dict[str, Any] = {"task_id": TASK, "seed": 5, "horizon_s": HORIZON_S}
ACTIONS: list[dict[str, Any]] = [
    {"batch_cap": 8, "priority_routing": True},
    {"batch_cap": 64, "quantization_tier": "INT8"},
    {"batch_cap": 64, "speculation_depth": 3},
    {"kv_budget_fraction": 0.5},
]


def local(seed: int = 5, actions: list[dict[str, Any]] | None = None) -> tuple[list[Any], EpisodeLog]:
    """What the episode shows when it is played here, as it stands on the wire, and its log."""
    episode = Episode(load_task(TASK, horizon_s=HORIZON_S))
    seen = [episode.reset(seed)]
    seen += [episode.step(ServeAction(**action)) for action in (ACTIONS if actions is None else actions)]
    wire = [
        {
            "observation": each.model_dump(mode="json", exclude={"reward", "done"}),
            "reward": each.reward,
            "done": each.done,
        }
        for each in seen
    ]
    return from_json(to_json(wire)), episode.log()


def bare(answer: dict[str, Any]) -> dict[str, Any]:
    """A window without the name of the session that played it."""
    observation = dict(answer["observation"])
    observation["metadata"] = {
        name: value for name, value in observation["metadata"].items() if name != "session_id"
    }
    return {"observation": observation, "reward": answer["reward"], "done": answer["done"]}


def client(url: str, session_id: str | None = None) -> httpx.Client:
    """A client that keeps cookies, or one that names a session in the header."""
    headers = {"X-Session-Id": session_id} if session_id else {}
    return httpx.Client(base_url=url, headers=headers, timeout=60)


def ok(response: httpx.Response) -> Any:
    """The content of an answer that is no refusal."""
    assert response.status_code == 200, response.text
    return response.json()


def open_ws(url: str, session_id: str | None = None) -> ClientConnection:
    """A connection, in a session of its own unless one is named."""
    query = f"?session_id={session_id}" if session_id else ""
    return connect(
        url.replace("http", "ws", 1) + f"/ws{query}", compression=None, max_size=None, open_timeout=60
    )


def ask(ws: ClientConnection, kind: str, data: dict[str, Any] | None = None) -> dict[str, Any]:
    """The answer to a message."""
    ws.send(to_json({"type": kind, "data": data or {}}).decode())
    answer: dict[str, Any] = from_json(ws.recv(timeout=60))
    return answer
