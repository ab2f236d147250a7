"""Load on an OpenAI-compatible server, closed-loop or open-loop, and when each token reached its client."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import time
from collections.abc import Callable, Coroutine, Iterable
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from pydantic import PositiveFloat, PositiveInt

from llmserve_env.errors import InputError, missing_package
from llmserve_env.hardware.profile import Record
from llmserve_env.live.servers.stream import RequestFailed, StreamReader
from llmserve_env.live.traffic import Prompts
from llmserve_env.net.http import JSON_HEADERS, bearer, open_session
from llmserve_env.net.urls import server_url, without_credentials

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    import aiohttp

    from llmserve_env.workloads.workload import Workload

MOST_FAILURES = 5
"""Requests in a row without an answer after which a run is given up."""


@dataclass
class Answer:
    """A request as its client saw it; times in seconds of one clock.

    Attributes:
        prompt_tokens: as sent.
        output_tokens: as asked.
        due_s: when it was to be sent.
        sent_s: when it was.
        token_s: when each piece of the answer came, one token each.
        error: why there is no whole answer; empty where there is one.
    """

    prompt_tokens: int
    output_tokens: int
    due_s: float
    sent_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    error: str = ""


@dataclass(frozen=True)
class Target:
    """The server under load.

    Attributes:
        url: with or without /v1.
        model: its name there.
        token_ids: prompts are random ids from [first, last).
        api_key: sent as a bearer token.
        timeout_s: timeout of an answer.
    """

    url: str
    model: str
    token_ids: tuple[int, int]
    api_key: str | None = None
    timeout_s: float = 120.0


class Load(Record):
    """A closed loop.

    Attributes:
        clients: clients at a time.
        prompt_tokens: shortest and longest, uniform between.
        output_tokens: the same.
        share: share of the time for several loads.
    """

    clients: PositiveInt
    prompt_tokens: tuple[PositiveInt, PositiveInt]
    output_tokens: tuple[PositiveInt, PositiveInt]
    share: PositiveFloat = 1.0


Send = Callable[[list[int], Answer], Coroutine[Any, Any, None]]


def closed_loop(target: Target, load: Load, seconds: float, seed: int) -> list[Answer]:
    """Clients each of whom sends the next request when the last one is answered.

    Args:
        target: the server.
        load: how many clients, and what they send.
        seconds: after which nobody sends any more; what is under way is awaited.
        seed: seed of lengths and prompts.

    Raises:
        InputError: the server cannot be reached, or answers nothing.
    """
    draw = random.Random(seed)

    async def client(send: Send, until_s: float) -> None:
        while time.monotonic() < until_s:
            ids = draw.choices(range(*target.token_ids), k=draw.randint(*load.prompt_tokens))
            answer = Answer(len(ids), draw.randint(*load.output_tokens), time.monotonic())
            answers.append(answer)
            await send(ids, answer)

    async def run() -> None:
        async with _sender(target) as send:
            until_s = time.monotonic() + seconds
            await asyncio.gather(*(client(send, until_s) for _ in range(load.clients)))

    answers: list[Answer] = []
    with _undisturbed():
        asyncio.run(run())
    return answers


def open_loop(target: Target, workload: Workload, seed: int = 0) -> list[Answer]:
    """Each request at its time, whatever became of those before; prompts share what the workload says.

    Args:
        target: the server.
        workload: one request or more.
        seed: seed of the prompts.

    Returns:
        In the workload's order.

    Raises:
        InputError: the server cannot be reached, or answers nothing.
    """
    prompts = Prompts(workload, seed, target.token_ids)
    drawn = [
        cast("list[int]", prompts.of(index)) for index in range(len(workload))
    ]  # takes time that a run has not
    lengths = zip(workload.prompt_tokens.tolist(), workload.output_tokens.tolist(), strict=True)
    answers = [Answer(prompt, output, 0.0) for prompt, output in lengths]

    async def run() -> None:
        tasks: list[asyncio.Task[None]] = []
        async with _sender(target) as send:
            begun_s = time.monotonic() + 0.1
            arrivals = workload.arrival_s - workload.arrival_s[0]
            for ids, answer, arrival_s in zip(drawn, answers, arrivals.tolist(), strict=True):
                answer.due_s = begun_s + arrival_s
                await asyncio.sleep(answer.due_s - time.monotonic())
                tasks.append(asyncio.create_task(send(ids, answer)))
            await asyncio.gather(*tasks)

    with _undisturbed():
        asyncio.run(run())
    return answers


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collection: it takes longer than a token."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@asynccontextmanager
async def _sender(target: Target) -> AsyncIterator[Send]:
    try:
        import aiohttp
    except ImportError as error:
        raise missing_package(error) from error
    url = f"{server_url(target.url)}/v1/completions"
    failed = 0

    async def send(ids: list[int], answer: Answer) -> None:
        nonlocal failed
        try:
            await _follow(session, url, _body(target.model, ids, answer.output_tokens), answer)
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            answer.error = f"{type(error).__name__}: {error}"
        except RequestFailed as failure:
            answer.error = failure.reason
        failed = failed + 1 if answer.error else 0
        if failed >= MOST_FAILURES:
            raise InputError(
                f"{without_credentials(target.url)} gave no answer to {failed} requests in a row; "
                f"the last: {answer.error}",
                field="url",
            )

    timeout = aiohttp.ClientTimeout(total=target.timeout_s)
    async with open_session(headers=bearer(url, target.api_key), timeout=timeout) as session:
        yield send


def _body(model: str, ids: Iterable[int], output_tokens: int) -> bytes:
    body = {
        "model": model,
        "prompt": list(ids),
        "max_tokens": output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    return json.dumps(body).encode()


async def _follow(session: aiohttp.ClientSession, url: str, body: bytes, answer: Answer) -> None:
    reader, ended_s = StreamReader(), 0.0
    answer.sent_s = time.monotonic()
    async with session.post(url, data=body, headers=JSON_HEADERS) as response:
        if response.status != 200:
            answer.error = f"HTTP {response.status}: {(await response.text())[:200]}"
            return
        chunk = None
        while chunk != b"":
            chunk = await response.content.readany()
            now_s = time.monotonic()
            answer.token_s += [now_s] * (reader.feed(chunk) if chunk else reader.finish())
            ended_s = now_s if reader.ended and not ended_s else ended_s
    if reader.error is not None:
        answer.error = str(reader.error.get("message", reader.error))[:200]
    elif not reader.ended or not answer.token_s:
        answer.error = "stream broken off"
    elif len(answer.token_s) < answer.output_tokens:
        answer.token_s.append(
            ended_s
        )  # a last token without text, such as half a character, comes with the end
