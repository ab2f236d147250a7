"""The WebSocket: OpenEnv's messages and ours, a session for each connection."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fastapi import WebSocket, WebSocketDisconnect
from openenv.core.env_server.types import WSErrorCode
from pydantic import ValidationError
from starlette.websockets import WebSocketState

from llmserve_env.errors import InputError
from llmserve_env.schema import ServeAction
from server.hosted import task_list
from server.messages.errors import message
from server.messages.models import json_bytes, single, steps
from server.messages.refusals import AtCapacity, Conflict, Refusal
from server.messages.requests import GradeData, ResetRequest, StepsData
from server.wire.bodies import read_json

if TYPE_CHECKING:
    from server.service import Service
    from server.sessions import Session

Handler = Callable[["Service", "Session", dict[str, Any]], Awaitable[dict[str, Any]]]
_NORMAL, _GOING_AWAY, _RESTARTS, _TRY_AGAIN = 1000, 1001, 1012, 1013


async def serve(websocket: WebSocket, service: Service) -> None:
    """Serve a connection to its end."""
    await websocket.accept()
    named = websocket.query_params.get("session_id")
    try:
        session = _attach(service, named) if named else service.sessions.open()
    except Refusal as error:
        await _send(websocket, message(error))
        await websocket.close(_TRY_AGAIN if isinstance(error, AtCapacity) else _NORMAL)
        return
    session.connected = True
    loop = asyncio.get_running_loop()
    closings: set[asyncio.Task[None]] = set()  # the loop itself holds tasks weakly

    def hang_up() -> None:
        closings.add(loop.create_task(_close(websocket, _GOING_AWAY)))

    session.hang_up = hang_up
    try:
        received = await _receive(websocket)
        while received is not None:
            session.touch()
            if service.live:
                goes_on, received = await _answer_live(websocket, service, session, received)
            else:
                goes_on = await _answer(websocket, service, session, received)
                received = await _receive(websocket) if goes_on else None
            if not goes_on:
                break
    except WebSocketDisconnect:
        pass
    finally:
        session.connected = False
        session.hang_up = None
        session.touch()
        if not named:
            service.sessions.close(session)


async def _answer(websocket: WebSocket, service: Service, session: Session, received: str | bytes) -> bool:
    """Answer a message; returns whether the connection goes on."""
    service.answering += 1
    try:
        reply = await _reply(service, session, received)
        if reply is None:
            await _close(websocket, _NORMAL)
            return False
        await _send(websocket, reply)
    finally:
        service.answering -= 1
    if service.stopping:
        await _close(websocket, _RESTARTS)
    return not service.stopping


async def _answer_live(
    websocket: WebSocket, service: Service, session: Session, received: str | bytes
) -> tuple[bool, str | bytes | None]:
    """Answer a message while there is somebody to answer.

    Returns:
        Whether the connection goes on, and the next message; None at its end.
    """
    answering = asyncio.ensure_future(_answer(websocket, service, session, received))
    coming = asyncio.ensure_future(_receive(websocket))
    try:
        await asyncio.wait([answering, coming], return_when=asyncio.FIRST_COMPLETED)
        if coming.done() and coming.result() is None:
            answering.cancel()  # no further window is served for nobody
        goes_on = await answering
        return goes_on, await coming if goes_on else None
    except asyncio.CancelledError:
        if not answering.done():  # the server ends
            answering.cancel()
            raise
        return False, None
    finally:
        coming.cancel()


def _attach(service: Service, session_id: str) -> Session:
    session = service.sessions.get(session_id)
    if session.connected:
        raise Conflict("another WebSocket holds this session")
    return session


async def _receive(websocket: WebSocket) -> str | bytes | None:
    """The next message; None at the end of the connection."""
    event = await websocket.receive()
    if event["type"] == "websocket.disconnect":
        return None
    text: str | None = event.get("text")
    return event["bytes"] if text is None else text


async def _reply(service: Service, session: Session, received: str | bytes) -> dict[str, Any] | None:
    """The answer to a message; None to one that asks to close."""
    try:
        content = read_json(received)
    except ValueError as error:
        return _fault(f"expected JSON: {error}", WSErrorCode.INVALID_JSON)
    if not isinstance(content, dict):
        return _fault("expected an object with a type", WSErrorCode.INVALID_JSON)
    kind, data = content.get("type"), content.get("data", {})
    if kind == "close":
        return None
    if not isinstance(kind, str) or kind not in _HANDLERS:
        known = ", ".join([*_HANDLERS, "close"])
        return _fault(f"expected a type of {known}", WSErrorCode.UNKNOWN_TYPE)
    for name in content:
        if name not in ("type", "data"):
            return _fault(f"expected type and data, found {name[:99]}", WSErrorCode.VALIDATION_ERROR)
    if not isinstance(data, dict):
        return _fault("data: expected an object", WSErrorCode.VALIDATION_ERROR)
    try:
        return await _HANDLERS[kind](service, session, data)
    except (Refusal, InputError, ValidationError) as error:
        return message(error)


async def _reset(service: Service, session: Session, data: dict[str, Any]) -> dict[str, Any]:
    observation = await service.reset(session, ResetRequest.model_validate(data))
    return {"type": "observation", "data": single(observation)}


async def _step(service: Service, session: Session, data: dict[str, Any]) -> dict[str, Any]:
    data.pop("metadata", None)  # OpenEnv's clients send an empty one with every action
    observations = await service.step(session, [ServeAction.model_validate(data)])
    return {"type": "observation", "data": single(observations[0])}


async def _step_n(service: Service, session: Session, data: dict[str, Any]) -> dict[str, Any]:
    wanted = StepsData.model_validate(data)
    return {"type": "steps", "data": steps(await service.step(session, wanted.actions), wanted.every)}


async def _state(service: Service, session: Session, data: dict[str, Any]) -> dict[str, Any]:
    return {"type": "state", "data": session.state.model_dump(mode="json")}


async def _grade(service: Service, session: Session, data: dict[str, Any]) -> dict[str, Any]:
    log = GradeData.model_validate(data).episode_log
    result = await (service.grade(session) if log is None else service.grade_log(log))
    return {"type": "grade", "data": result.model_dump(mode="json")}


async def _log(service: Service, session: Session, data: dict[str, Any]) -> dict[str, Any]:
    return {"type": "log", "data": session.log().model_dump(mode="json")}


async def _tasks(service: Service, session: Session, data: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tasks", "data": task_list()}


async def _mcp(service: Service, session: Session, data: dict[str, Any]) -> dict[str, Any]:
    assert service.answer_mcp is not None
    return {"type": "mcp", "data": await service.answer_mcp(data, session)}


_HANDLERS: dict[str, Handler] = {
    "reset": _reset,
    "step": _step,
    "step_n": _step_n,
    "state": _state,
    "grade": _grade,
    "log": _log,
    "tasks": _tasks,
    "mcp": _mcp,
}


def _fault(text: str, code: WSErrorCode) -> dict[str, Any]:
    return {"type": "error", "data": {"message": text, "code": code.value, "status": 422}}


async def _send(websocket: WebSocket, data: dict[str, Any]) -> None:
    if websocket.application_state != WebSocketState.CONNECTED:  # the session was closed meanwhile
        raise WebSocketDisconnect
    await websocket.send_text(json_bytes(data).decode())


async def _close(websocket: WebSocket, code: int) -> None:
    with suppress(RuntimeError):  # the client was quicker
        await websocket.close(code)
