"""What upstreams answer to GETs of their other paths."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from .faults import STEP_S

if TYPE_CHECKING:
    pass

Side = "Callable[[UpstreamServer, str, Exchange], Awaitable[bool]]"
SIDES: dict[str, Side] = {}
"""How an upstream answers GETs, by name: whether the function answered."""


def side(function: Side) -> Side:
    SIDES[function.__name__] = function
    return function


@side
async def well(server, path, x):
    return False


@side
async def get_500(server, path, x):
    await x.plain("500 Internal Server Error", b"oh")
    return True


@side
async def health_flaps(server, path, x):
    server.flaps += 1
    if path == "/health" and server.flaps % 2:
        await x.plain("503 Service Unavailable", b"")
        return True
    return False


@side
async def get_hangs(server, path, x):
    await x.never()
    return True


@side
async def get_resets(server, path, x):
    x.reset()
    return True


@side
async def get_is_a_login_page(server, path, x):
    await x.plain("200 OK", b"<!doctype html><form>password</form>", "text/html")
    return True


@side
async def get_without_end(server, path, x):
    await x.head("200 OK", "content-type: text/plain", "transfer-encoding: chunked")
    for _ in range(1000):
        await x.chunk(b"x" * 65536)
        await asyncio.sleep(STEP_S)
    await x.never()
    return True


@side
async def get_redirects(server, path, x):
    if path.endswith("/"):
        return False
    await x.plain("307 Temporary Redirect", b"", "text/plain", f"location: {path}/")
    return True


def _metrics(name: str, text: bytes) -> None:
    async def tell(server, path, x):
        if path != "/metrics":
            return False
        await x.plain("200 OK", text, "text/plain; version=0.0.4")
        return True

    SIDES[name] = tell


_metrics("metrics_no_utf8", b'vllm:num_requests_running{model_name="\xff\xfe"} 1\n\xff\n')
_metrics("metrics_bad_number", b"vllm:generation_tokens_total{} " + b"9" * 400 + b"\n")
_metrics(
    "metrics_bad_bucket",
    b"# TYPE vllm:time_to_first_token_seconds histogram\n"
    b'vllm:time_to_first_token_seconds_bucket{le="soon"} 1\n'
    b"vllm:time_to_first_token_seconds_sum 1\nvllm:time_to_first_token_seconds_count 1\n",
)
_metrics("metrics_empty", b"")
