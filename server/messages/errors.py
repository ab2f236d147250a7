"""Errors on the wire: a status, and a detail that names the field and what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from openenv.core.env_server.types import WSErrorCode
from pydantic import ValidationError
from pydantic_core import to_json
from starlette.requests import ClientDisconnect

from llmserve_env.errors import InputError
from server.messages.refusals import AtCapacity, Conflict, NotFound, Refusal

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

UNUSABLE = 422
_LONGEST_ECHO = 200  # characters or digits of what was found that an error repeats
_CODES: dict[type[Refusal], WSErrorCode] = {
    AtCapacity: WSErrorCode.CAPACITY_REACHED,
    Conflict: WSErrorCode.EXECUTION_ERROR,
    NotFound: WSErrorCode.VALIDATION_ERROR,
}


def add_handlers(app: FastAPI) -> None:
    """Answer every refusal with its status and detail."""

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        headers = {"Retry-After": str(error.retry_after_s)} if isinstance(error, AtCapacity) else {}
        return _response(error.status, error.detail, headers)

    async def unusable(_: Request, error: Exception) -> Response:
        assert isinstance(error, InputError | RequestValidationError)
        return _response(UNUSABLE, details(error), {})

    async def gone(_: Request, error: Exception) -> Response:
        return Response(status_code=499)  # which nobody reads

    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(InputError, unusable)
    app.add_exception_handler(RequestValidationError, unusable)


def message(error: Refusal | InputError | ValidationError) -> dict[str, Any]:
    """The WebSocket message of an error."""
    if isinstance(error, Refusal):
        code = _CODES.get(type(error), WSErrorCode.EXECUTION_ERROR)
        data = {"message": error.detail, "code": code.value, "status": error.status}
        if isinstance(error, AtCapacity):
            data["retry_after_s"] = error.retry_after_s
    else:
        found = details(error)
        place = ".".join(str(part) for part in found[0]["loc"])
        text = f"{place}: {found[0]['msg']}" if place else found[0]["msg"]
        code = WSErrorCode.VALIDATION_ERROR
        data = {"message": text, "code": code.value, "status": UNUSABLE, "errors": found}
    return {"type": "error", "data": data}


def details(error: InputError | ValidationError | RequestValidationError) -> list[dict[str, Any]]:
    """For each fault its type, place, what was expected and, if short, what was found."""
    if isinstance(error, InputError):
        place = ["body", *(error.field.split(".") if error.field else ())]
        return [{"type": "value_error", "loc": place, "msg": error.reason}]
    faults: Sequence[Any] = error.errors()
    return [
        {"type": fault["type"], "loc": list(fault["loc"]), "msg": fault["msg"], **_echo(fault["input"])}
        for fault in faults[:20]
    ]


def _echo(found: object) -> dict[str, Any]:
    if isinstance(found, str):
        return {"input": found[:_LONGEST_ECHO]}
    short = not isinstance(found, int) or abs(found) < 10**_LONGEST_ECHO
    return {"input": found} if short and isinstance(found, bool | int | float | None) else {}


def _response(status: int, detail: object, headers: dict[str, str]) -> Response:
    content = to_json({"detail": detail}, inf_nan_mode="strings")
    return Response(content, status, headers, "application/json")
