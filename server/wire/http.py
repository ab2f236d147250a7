"""Plain HTTP: a session for every client, found by its id in the body, a header or a cookie."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Body, Query, Request
from fastapi.responses import RedirectResponse, Response
from starlette.requests import ClientDisconnect

from llmserve_env.schema import EpisodeLog, GradeResult
from server.hosted import task_list
from server.messages.models import (
    ObservationResponse,
    ServiceState,
    StepsResponse,
    TaskList,
    json_bytes,
    single,
    steps,
)
from server.messages.refusals import Forbidden, NotFound, Unauthorized
from server.messages.requests import GradeRequest, ResetRequest, StepRequest, StepsRequest
from server.wire.keys import bears
from server.wire.prefix import redirect

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from llmserve_env.schema import ServeAction, ServeObservation
    from server.service import Service
    from server.sessions import Session

R = TypeVar("R")

HEADER = "X-Session-Id"
COOKIE = "llmserve_session"


def _errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    meanings = {
        401: "Wants the service's key",
        403: "Is off here, or asked for by a page of another site",
        404: "No such session or task",
        409: "Not in this state of the episode",
        413: "Body too large",
        422: "Names the field and what was expected",
        429: "At capacity; Retry-After says when to come again",
    }
    return {code: {"description": meanings[code]} for code in codes}


def router(service: Service) -> APIRouter:
    """The routes of a service."""
    routes = APIRouter()

    def find(request: Request, named: str | None) -> Session:
        session_id = named or request.headers.get(HEADER) or request.cookies.get(COOKIE)
        if session_id is None:
            raise NotFound(f"no session is named in the body, in {HEADER} or in a cookie: reset opens one")
        return service.sessions.get(session_id)

    @routes.post("/reset", tags=["Environment Control"], responses=_errors(404, 413, 422, 429))
    async def reset(
        request: Request, wanted: Annotated[ResetRequest | None, Body()] = None
    ) -> ObservationResponse:
        """Begin an episode; without a session's name in one that is the client's own from now on."""
        wanted = wanted or ResetRequest()
        named = wanted.session_id or request.headers.get(HEADER)
        session = _own(service, request) if named is None else service.sessions.get(named)
        try:
            observation = await service.reset(session, wanted)
        except BaseException:
            if named is None and session.begun is None:  # opened here, for nothing
                service.sessions.close(session)
            raise
        response = _answer(session, single(observation))
        if named is None:
            _set_cookie(request, response, session)
        return response  # type: ignore[return-value] # made already; the annotation documents it

    async def play(request: Request, session: Session, actions: list[ServeAction]) -> list[ServeObservation]:
        serving = service.step(session, actions)
        return await (while_connected(request, serving) if service.live else serving)

    @routes.post("/step", tags=["Environment Control"], responses=_errors(404, 409, 413, 422))
    async def step(request: Request, wanted: StepRequest) -> ObservationResponse:
        """Serve one window."""
        session = find(request, wanted.session_id)
        observations = await play(request, session, [wanted.action])
        return _answer(session, single(observations[0]))  # type: ignore[return-value]

    @routes.post("/step_n", tags=["Environment Control"], responses=_errors(404, 409, 413, 422))
    async def step_n(request: Request, wanted: StepsRequest) -> StepsResponse:
        """Serve a window for each action, or fewer where the episode ends before."""
        session = find(request, wanted.session_id)
        observations = await play(request, session, wanted.actions)
        return _answer(session, steps(observations, wanted.every))  # type: ignore[return-value]

    @routes.get("/state", tags=["State Management"], responses=_errors(404))
    async def state(request: Request) -> ServiceState:
        """Where the session's episode stands."""
        session = find(request, None)
        return _answer(session, session.state.model_dump(mode="json"))  # type: ignore[return-value]

    @routes.get("/log", tags=["State Management"], responses=_errors(404, 409))
    async def log(request: Request) -> EpisodeLog:
        """The log of the session's episode so far, as the grader takes it."""
        session = find(request, None)
        return _answer(session, session.log().model_dump(mode="json"))  # type: ignore[return-value]

    @routes.delete("/session", tags=["State Management"], status_code=204, responses=_errors(404))
    async def close(request: Request) -> None:
        """End the session."""
        service.sessions.close(find(request, None))

    @routes.post("/grader", tags=["Grading"], responses=_errors(404, 409, 413, 422, 429))
    async def grader(request: Request, wanted: Annotated[GradeRequest | None, Body()] = None) -> GradeResult:
        """Grade the session's finished episode, or a posted log, by replay."""
        if wanted is not None and wanted.episode_log is not None:
            return await service.grade_log(wanted.episode_log)
        session = find(request, wanted.session_id if wanted else None)
        return await service.grade(session)

    @routes.get("/tasks", tags=["Environment Info"])
    async def tasks() -> TaskList:
        """What can be played."""
        return Response(json_bytes(task_list()), media_type="application/json")  # type: ignore[return-value]

    @routes.get("/baseline", tags=["Grading"], responses=_errors(401, 403, 404, 422, 429))
    async def baseline(
        request: Request,
        mode: Literal["deterministic", "openai"] = "deterministic",
        task_id: Annotated[str | None, Query(max_length=255)] = None,
        episodes: Annotated[int, Query(ge=1, le=10)] = 3,
    ) -> dict[str, Any]:
        """Scores of the reference agents and the trained policy on evaluation seeds, played here and now.

        With `mode=openai` those of a language model at the owner's cost, for who has the service's key.
        """
        if mode == "deterministic":
            return await service.baselines.content(mode, task_id, episodes)
        _check_key(request, service.settings.key)
        return await while_connected(request, service.baselines.content(mode, task_id, episodes))

    @routes.get("/demo", include_in_schema=False)
    async def demo(request: Request) -> RedirectResponse:
        """The page."""
        return redirect(request, "web/")

    return routes


def _check_key(request: Request, key: str | None) -> None:
    if key is None:
        raise Forbidden("mode=openai costs the owner, and is off: the service has no --api-key")
    if not bears(request.headers.raw, key):
        raise Unauthorized("mode=openai costs the owner: expected Authorization: Bearer KEY, of the service")


async def while_connected(request: Request, work: Coroutine[Any, Any, R]) -> R:
    """The result of some work, which is cancelled when the client goes away.

    Raises:
        ClientDisconnect: it has.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        gone.cancel()
        working.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _own(service: Service, request: Request) -> Session:
    """The session of the client's cookie, or a new one."""
    known = request.cookies.get(COOKIE)
    if known is not None:
        try:
            return service.sessions.get(known)
        except NotFound:
            pass  # it has expired
    return service.sessions.open()


def _set_cookie(request: Request, response: Response, session: Session) -> None:
    # A Space shows the service in a frame of another site, which only cookies like these reach.
    secure = request.headers.get("x-forwarded-proto", request.url.scheme) == "https"
    response.set_cookie(
        COOKIE,
        session.id,
        path=request.scope.get("root_path") or "/",
        httponly=True,
        secure=secure,
        samesite="none" if secure else "lax",
    )


def _answer(session: Session, data: dict[str, Any]) -> Response:
    return Response(json_bytes(data), headers={HEADER: session.id}, media_type="application/json")
