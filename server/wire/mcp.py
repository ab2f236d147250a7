"""The tools of `llmserve_env.envs.tool_env` over MCP, in both dialects that are spoken at /mcp.

MCP clients initialize, and get a session whose id they send with every request (streamable HTTP). OpenEnv's
clients send plain JSON-RPC and open a session with `openenv/session/create`. Both are sessions like any
other: their id names them over HTTP and WebSocket, too.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from anyio import from_thread
from fastmcp import FastMCP
from fastmcp.exceptions import NotFoundError, ToolError
from fastmcp.exceptions import ValidationError as ArgumentError
from mcp.types import ClientRequest
from openenv.core.env_server.mcp_types import JsonRpcErrorCode, JsonRpcRequest, JsonRpcResponse
from pydantic import ValidationError
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

import llmserve_env
from llmserve_env.envs.tool_env import ServeToolEnv
from llmserve_env.errors import InputError, as_input_error
from llmserve_env.tasks.catalog import TaskInfo, catalog, task_info
from server.messages.refusals import AtCapacity, Conflict, Refusal
from server.messages.requests import ResetRequest
from server.wire.bodies import read_json

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import Message, Receive, Scope, Send

    from llmserve_env.schema import EpisodeLog, GradeResult, ServeAction, ServeObservation
    from server.service import Service
    from server.sessions import Session

PATH = "/mcp"
HEADER = "Mcp-Session-Id"
_OWN_HEADER = "X-Session-Id"
_TOOLS = ("list_tasks", "start_episode", "observe", "set_serving_config", "grade")
_WITHOUT_SESSION = ("list_tasks",)
_ABOUT = (
    "Run an LLM inference service: start_episode, then set_serving_config again and again, for one window of "
    "time or several each, until the episode is done; then grade. The score counts the requests that met "
    "their tenant's SLOs."
)

_session: ContextVar[Session] = ContextVar("session")


def mount_mcp(app: FastAPI, service: Service) -> Mcp:
    """Serve MCP at /mcp in the place of OpenEnv's routes, for as long as the application runs."""
    for chatty in ("mcp", "fastmcp"):  # they log every request, and what is wrong with one
        logging.getLogger(chatty).setLevel(logging.ERROR)
    mcp = Mcp(service)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) != PATH]
    app.router.routes += [
        Route(PATH, mcp, methods=["GET", "POST", "DELETE"], include_in_schema=False),
        WebSocketRoute(PATH, mcp.talk),
    ]
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(of: FastAPI) -> AsyncIterator[Any]:
        async with inner(of) as state, mcp.running():
            yield state

    app.router.lifespan_context = lifespan
    return mcp


class Mcp:
    """What answers at /mcp, as an ASGI application.

    Args:
        service: that plays.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._tools: FastMCP[Any] = FastMCP("LLMServe", instructions=_ABOUT, version=llmserve_env.__version__)
        env = _SessionTools(_OwnSession(service))
        for name in _TOOLS:
            self._tools.tool(getattr(env, name))
        # Nothing is kept between requests but the session of the service, so that its rules alone say how
        # many there may be and when one ends. Host and Origin are not looked at, as on no other path.
        self._streamable = self._tools.http_app(
            path=PATH, json_response=True, stateless_http=True, host_origin_protection=False
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """For as long as requests are served."""
        async with self._streamable.lifespan(self._streamable):
            yield

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request in the dialect that it is in."""
        request = Request(scope, receive)
        if request.method == "DELETE":
            await self._end(request)(scope, receive, send)
        elif request.method == "GET":  # a stream of the server's own messages, of which there are none
            await Response(status_code=405, headers={"Allow": "POST, DELETE"})(scope, receive, send)
        else:
            await self._post(request, scope, send)

    async def talk(self, websocket: WebSocket) -> None:
        """Serve OpenEnv's dialect over a WebSocket, in a session that ends with it."""
        await websocket.accept()
        try:
            session = self._service.sessions.open()
        except AtCapacity as error:
            await websocket.send_json(_error(JsonRpcErrorCode.SERVER_ERROR, error.detail))
            await websocket.close(1013)
            return
        session.connected = True
        try:
            while True:
                await websocket.send_json(await self._read(await websocket.receive_text(), session))
        except WebSocketDisconnect:
            pass
        finally:
            self._service.sessions.close(session)

    async def answer(self, content: Any, session: Session | None = None) -> dict[str, Any]:
        """The response to a request in OpenEnv's dialect.

        Args:
            content: JSON-RPC 2.0.
            session: of the connection that it came over, if that has one.
        """
        try:
            request = JsonRpcRequest.model_validate(content)
        except ValidationError as error:
            return _error(JsonRpcErrorCode.INVALID_REQUEST, f"Invalid request: {as_input_error(error)}")
        handlers = {
            "openenv/session/create": self._create,
            "openenv/session/close": self._close,
            "tools/list": self._list,
            "tools/call": self._call,
        }
        if request.method not in handlers:
            code, text = JsonRpcErrorCode.METHOD_NOT_FOUND, f"Method not found: {request.method}"
            return _error(code, text, request.id)
        try:
            result = await handlers[request.method](request.params, session)
        except AtCapacity as error:
            return _error(JsonRpcErrorCode.SERVER_ERROR, error.detail, request.id)
        except (Refusal, InputError, NotFoundError, ArgumentError, ToolError, ValidationError) as error:
            return _error(JsonRpcErrorCode.INVALID_PARAMS, str(error), request.id)
        return dict(JsonRpcResponse.success(result, request.id).model_dump())

    async def _post(self, request: Request, scope: Scope, send: Send) -> None:
        body = await request.body()
        content = _parsed(body)
        first = isinstance(content, dict) and content.get("method") == "initialize"
        admitted: Session | Response
        if first or _is_mcp(request):
            admitted = self._admit(request, content, first)
        else:
            admitted = JSONResponse(await self._read(body, None, request.headers.get(_OWN_HEADER)))
        if isinstance(admitted, Response):
            await admitted(scope, request.receive, send)
            return
        opening = _Opening(send, admitted.id)
        await self._stream(admitted, body, scope, request.receive, opening if first else send)
        if first and not opening.accepted:
            self._service.sessions.close(admitted)

    def _admit(self, request: Request, content: Any, first: bool) -> Session | Response:
        """The session of an MCP client's request, or the response to one that needs no tool."""
        try:
            session = None if first else self._named(request.headers.get(HEADER))
            response = _shortcut(content)
            if response is not None:
                return response
            return session or self._service.sessions.open()
        except (Refusal, InputError) as error:
            return _refused(error)

    async def _stream(
        self, session: Session, body: bytes, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Serve a request of an MCP client whose body has been read."""
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        session.touch()
        token = _session.set(session)
        try:
            await self._streamable(scope, replay, send)
        finally:
            _session.reset(token)

    def _end(self, request: Request) -> Response:
        try:
            self._service.sessions.close(self._named(request.headers.get(HEADER)))
        except (Refusal, InputError) as error:
            return _refused(error)
        return Response(status_code=204)

    def _named(self, session_id: str | None) -> Session:
        if session_id is None:
            raise InputError("expected the id that initialize answered with", field=HEADER)
        return self._service.sessions.get(session_id)

    async def _read(self, body: str | bytes, session: Session | None, named: str | None = None) -> Any:
        try:
            content = read_json(body)
            if session is None and named is not None:
                session = self._service.sessions.get(named)
        except (ValueError, RecursionError) as error:
            return _error(JsonRpcErrorCode.PARSE_ERROR, f"Parse error: {error}")
        except Refusal as error:
            return _error(JsonRpcErrorCode.INVALID_PARAMS, error.detail)
        return await self.answer(content, session)

    async def _create(self, params: dict[str, Any], session: Session | None) -> dict[str, Any]:
        return {"session_id": (session or self._service.sessions.open()).id}

    async def _close(self, params: dict[str, Any], session: Session | None) -> dict[str, Any]:
        found = self._asked(params, None)
        if found is None:
            raise InputError("expected the id of a session", field="session_id")
        if found is session:
            raise InputError("this session ends with its connection", field="session_id")
        self._service.sessions.close(found)
        return {"session_id": found.id, "closed": True}

    async def _list(self, params: dict[str, Any], session: Session | None) -> dict[str, Any]:
        tools = [tool.to_mcp_tool() for tool in await self._tools.list_tools()]
        return {"tools": [tool.model_dump(mode="json", exclude_none=True) for tool in tools]}

    async def _call(self, params: dict[str, Any], session: Session | None) -> dict[str, Any]:
        name, arguments = params.get("name"), params.get("arguments") or {}
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise InputError("expected the name of a tool, and arguments by name")
        found = self._asked(params, session)
        if found is None and name not in _WITHOUT_SESSION:
            raise InputError("expected one: openenv/session/create opens it", field="session_id")
        token = None if found is None else _session.set(found)
        try:
            result = await self._tools.call_tool(name, arguments)
        finally:
            if token is not None:
                _session.reset(token)
        content = [block.model_dump(mode="json", exclude_none=True) for block in result.content]
        # As the result of FastMCP's client, which is what OpenEnv's own route sends.
        return {"content": content, "data": content[0]["text"], "is_error": False}

    def _asked(self, params: dict[str, Any], session: Session | None) -> Session | None:
        """The session that a request names, or else that of its connection."""
        named = params.get("session_id")
        found = session if named is None else self._service.sessions.get(str(named))
        if found is not None:
            found.touch()
        return found


class _SessionTools(ServeToolEnv):
    """The tools, with one that begins an episode: trainers do that themselves, MCP clients cannot."""

    def start_episode(
        self, task_id: str = "static_workload", seed: int | None = None, horizon_s: float | None = None
    ) -> str:
        """Begin an episode of a task; one that is under way is given up.

        Args:
            task_id: Id of a task, see list_tasks.
            seed: Number that fixes the traffic; without one it is drawn.
            horizon_s: Length of the episode in seconds, a whole number of windows; the task's by default.

        Returns:
            JSON of the task with the tenants' SLOs and the controls, and the first observation.
        """
        try:
            return self.reset(task_id=task_id, seed=seed, horizon_s=horizon_s)
        except InputError as error:
            return json.dumps({"error": str(error)})


class _OwnSession:
    """Plays in the session of the request that is served, from the thread that runs the tool."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def tasks(self) -> list[TaskInfo]:
        return list(catalog())

    def reset(
        self, *, task_id: str | None, seed: int, horizon_s: float | None = None, records: bool = False
    ) -> ServeObservation:
        asked = {"task_id": task_id, "seed": seed, "horizon_s": horizon_s, "records": records}
        try:
            request = ResetRequest.model_validate({k: v for k, v in asked.items() if v is not None})
            return from_thread.run(self._service.reset, _session.get(), request)
        except ValidationError as error:
            raise as_input_error(error) from error
        except Refusal as error:
            raise InputError(error.detail) from error

    def step(self, actions: Sequence[ServeAction]) -> list[float]:
        self.observation()
        try:
            observations = from_thread.run(self._service.step, _session.get(), list(actions))
        except Refusal as error:
            raise InputError(error.detail) from error
        return [observation.reward for observation in observations]

    def observation(self) -> ServeObservation:
        try:
            return _session.get().observation()
        except Conflict as error:
            raise InputError("no episode has begun: start_episode") from error

    def task(self) -> TaskInfo:
        task = _session.get().task
        if task is None:
            raise InputError("no episode has begun: start_episode")
        return task_info(task)

    def grade(self) -> GradeResult:
        self.observation()
        try:
            return from_thread.run(self._service.grade, _session.get())
        except Refusal as error:
            raise InputError(error.detail) from error

    def log(self) -> EpisodeLog:
        self.observation()
        return _session.get().log()

    def close(self) -> None:
        self._service.sessions.close(_session.get())


def _parsed(body: bytes) -> Any:
    """The JSON of a body; None if it is none."""
    try:
        return read_json(body)
    except (ValueError, RecursionError):
        return None


def _shortcut(content: Any) -> Response | None:
    """The response to an MCP client's message that is no request, or none that the protocol has.

    The protocol's library answers such messages, too, but writes a page to the log for each.
    """
    if not isinstance(content, dict):
        error = _error(JsonRpcErrorCode.PARSE_ERROR, "expected a JSON-RPC message")
        return JSONResponse(error, 400)
    request_id, method = content.get("id"), content.get("method")
    if request_id is None or method is None:
        return Response(status_code=202)  # a notification, or an answer, of which nothing depends
    try:
        ClientRequest.model_validate(
            {name: content[name] for name in ("method", "params") if name in content}
        )
    except ValidationError:
        text = f"no such request, or not with these params: {str(method)[:99]}"
        known = request_id if isinstance(request_id, str | int) else None
        return JSONResponse(_error(JsonRpcErrorCode.INVALID_PARAMS, text, known))
    return None


def _is_mcp(request: Request) -> bool:
    """Whether a request is an MCP client's: those must accept streams, OpenEnv's do not."""
    return HEADER in request.headers or "text/event-stream" in request.headers.get("accept", "")


class _Opening:
    """Sends the response to initialize, with the session's name.

    Attributes:
        accepted: whether the client has been let in.
    """

    def __init__(self, send: Send, session_id: str) -> None:
        self._send = send
        self._session_id = session_id
        self.accepted = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.accepted = message["status"] == 200
            if self.accepted:
                MutableHeaders(raw=message["headers"])[HEADER] = self._session_id
        await self._send(message)


def _refused(error: Refusal | InputError) -> Response:
    """An MCP client's request refused, with the status that its protocol asks for."""
    headers = {"Retry-After": str(error.retry_after_s)} if isinstance(error, AtCapacity) else None
    status = error.status if isinstance(error, Refusal) else 400
    return JSONResponse(_error(JsonRpcErrorCode.SERVER_ERROR, str(error)), status, headers)


def _error(code: JsonRpcErrorCode, text: str, request_id: str | int | None = None) -> dict[str, Any]:
    return dict(JsonRpcResponse.error_response(code, text, request_id=request_id).model_dump())
