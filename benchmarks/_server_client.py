"""Clients of the service for its benchmark: what is called here runs in a process of its own."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
from pydantic_core import from_json, to_json
from websockets.asyncio.client import ClientConnection, connect

from llmserve_env import list_tasks
from llmserve_env.controls import SPECS

try:
    from uvloop import run as _run_loop
except ImportError:  # not on Windows
    from asyncio import run as _run_loop

_TIERS = SPECS["quantization_tier"].options


def in_process(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a function of this module in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


@contextmanager
def beside(function: Callable[..., Any], *args: Any) -> Any:
    """A function of this module runs in a process of its own during the block."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=args, daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def random_actions(seed: int, count: int) -> list[dict[str, Any]]:
    """Any actions of the schema; precision and split change rarely."""
    draw = random.Random(seed)
    tier, split, found = "FP16", False, []
    for _ in range(count):
        if draw.random() < 0.05:
            tier, split = draw.choice(_TIERS), draw.random() < 0.3
        found.append(
            {
                "batch_cap": draw.randint(*_range("batch_cap")),
                "kv_budget_fraction": round(draw.uniform(*_range("kv_budget_fraction")), 3),
                "speculation_depth": draw.randint(*_range("speculation_depth")),
                "quantization_tier": tier,
                "prefill_decode_split": split,
                "priority_routing": draw.random() < 0.5,
            }
        )
    return found


def _range(control: str) -> tuple[Any, Any]:
    """Least and greatest value of a number."""
    return SPECS[control].low, SPECS[control].high


def message(kind: str, data: dict[str, Any] | None = None) -> str:
    """A message as text."""
    return to_json({"type": kind, "data": data or {}}).decode()


async def ask(ws: ClientConnection, text: str) -> dict[str, Any]:
    """The answer to a message."""
    await ws.send(text)
    answer: dict[str, Any] = from_json(await ws.recv())
    if answer["type"] == "error":
        raise RuntimeError(answer["data"])
    return answer["data"]  # type: ignore[no-any-return]


def connected(url: str) -> connect:
    """A connection as a fast client makes it."""
    return connect(url, compression=None, max_size=None, open_timeout=60, ping_interval=None)


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine."""
    return _run_loop(main)


def warm_up(url: str) -> None:
    """Have the server do everything once."""

    async def main() -> None:
        async with connected(url) as ws:
            await ask(ws, message("reset", {"seed": 0, "workload": "poisson://?rate=9", "horizon_s": 5.0}))
            for task in list_tasks():
                await ask(ws, message("reset", {"task_id": task, "seed": 0}))
                await ask(ws, message("step_n", {"actions": [{}] * 1000, "every": False}))
            await ask(ws, message("grade"))

    run(main())


# One client


def one(url: str, task: str, episodes: int, first_seed: int, together: int) -> dict[str, float]:
    """One connection plays episodes, one or several windows a message.

    Returns:
        Windows, seconds, and the seconds of CPU that the client took.
    """

    async def main() -> dict[str, float]:
        actions = random_actions(first_seed, 2000)
        texts = [message("step", action) for action in actions]
        begun, cpu, windows = time.perf_counter(), time.process_time(), 0
        async with connected(url) as ws:
            for episode in range(episodes):
                await ask(ws, message("reset", {"task_id": task, "seed": first_seed + episode}))
                done, index = False, 0
                while not done:
                    if together == 1:
                        done, played = (await ask(ws, texts[index]))["done"], 1
                    else:
                        data = await ask(
                            ws, message("step_n", {"actions": actions[index : index + together]})
                        )
                        done, played = data["steps"][-1]["done"], data["played"]
                    index += played
                windows += index
        return {
            "windows": windows,
            "seconds": time.perf_counter() - begun,
            "client_cpu_s": time.process_time() - cpu,
        }

    return run(main())  # type: ignore[no-any-return]


# Many clients


def many(url: str, connections: int, seconds: float, seed: int) -> dict[str, Any]:
    """Connections that play episodes of all tasks, one window a message, until the time is over.

    Each begins somewhere in its first episode: episodes of one length would else all end at once.

    Returns:
        Latencies of steps and resets (s), and what `one` returns.
    """

    async def play(number: int, until: float, steps: list[float], resets: list[float]) -> None:
        tasks, clock = list_tasks(), time.perf_counter
        texts = [message("step", action) for action in random_actions(seed + number, 400)]
        episode = number
        async with connected(url) as ws:
            while clock() < until:
                wanted = message("reset", {"task_id": tasks[episode % len(tasks)], "seed": seed + episode})
                sent = clock()
                await ask(ws, wanted)
                resets.append(clock() - sent)
                done, index = False, 0
                if episode == number:
                    skipped = {"actions": [{}] * random.Random(number).randint(1, 100), "every": False}
                    await ask(ws, message("step_n", skipped))
                while not done and clock() < until:
                    sent = clock()
                    done = (await ask(ws, texts[index]))["done"]
                    steps.append(clock() - sent)
                    index += 1
                episode += connections

    async def main() -> dict[str, Any]:
        steps: list[float] = []
        resets: list[float] = []
        begun, cpu = time.perf_counter(), time.process_time()
        until = begun + seconds
        await asyncio.gather(*(play(number, until, steps, resets) for number in range(connections)))
        return {
            "steps_s": steps,
            "resets_s": resets,
            "windows": len(steps),
            "seconds": time.perf_counter() - begun,
            "client_cpu_s": time.process_time() - cpu,
        }

    return run(main())  # type: ignore[no-any-return]


def probe(url: str, seconds: float) -> list[float]:
    """Latencies of the steps of one client that takes one every 5 ms (s)."""

    async def main() -> list[float]:
        found: list[float] = []
        async with connected(url) as ws:
            until = time.perf_counter() + seconds
            seed = 0
            while time.perf_counter() < until:
                await ask(ws, message("reset", {"task_id": "static_workload", "seed": seed}))
                seed, done = seed + 1, False
                while not done and time.perf_counter() < until:
                    sent = time.perf_counter()
                    done = (await ask(ws, message("step")))["done"]
                    found.append(time.perf_counter() - sent)
                    await asyncio.sleep(0.005)
        return found

    return run(main())  # type: ignore[no-any-return]


# Many sessions


def episode_of(number: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Reset and actions of session number so much: 40 windows of a task."""
    tasks = list_tasks()
    task = tasks[number % len(tasks)]
    window_s = {"static_workload": 1.0, "bursty_workload": 10.0}.get(task, 5.0)
    begun = {"task_id": task, "seed": 2**31 + number, "horizon_s": 40 * window_s}
    return begun, random_actions(number, 40)


def sessions(url: str, count: int, steps: Any, goes_on: Any) -> list[dict[str, Any]]:
    """Play `count` sessions at once, one in five over HTTP, the others each over a WebSocket of its own.

    Args:
        url: of the service, http://.
        count: how many.
        steps: queue, told when half of each episode is played and when all are graded.
        goes_on: event, waited for then.

    Returns:
        The grade of each.
    """

    async def main() -> list[dict[str, Any]]:
        ws_url = url.replace("http", "ws", 1) + "/ws"
        room = asyncio.Semaphore(32)  # messages under way
        limits = httpx.Limits(max_connections=32, max_keepalive_connections=32)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
            players = []
            for number in range(count):
                connection = await connected(ws_url) if number % 5 else None
                players.append((number, connection))
            names: dict[int, str] = {}

            async def send(number: int, connection: ClientConnection | None, kind: str, data: Any) -> Any:
                async with room:
                    if connection is not None:
                        return await ask(connection, message(kind, data))
                    headers = {"X-Session-Id": names[number]} if number in names else {}
                    path = "/grader" if kind == "grade" else f"/{kind}"
                    body = {"action": data} if kind == "step" else data
                    answer = await http.post(path, json=body, headers=headers)
                    answer.raise_for_status()
                    http.cookies.clear()
                    names[number] = answer.headers.get("X-Session-Id", names.get(number, ""))
                    return answer.json()

            async def first_half(number: int, connection: ClientConnection | None) -> None:
                begun, actions = episode_of(number)
                await send(number, connection, "reset", begun)
                for action in actions[:20]:
                    await send(number, connection, "step", action)

            async def second_half(number: int, connection: ClientConnection | None) -> Any:
                actions = episode_of(number)[1][20:]
                for action in actions[:10]:
                    await send(number, connection, "step", action)
                await send(number, connection, "step_n", {"actions": actions[10:]})
                return await send(number, connection, "grade", {})

            await asyncio.gather(*(first_half(*player) for player in players))
            steps.put("half")
            await asyncio.to_thread(goes_on.wait)
            goes_on.clear()
            grades = await asyncio.gather(*(second_half(*player) for player in players))
            steps.put("graded")
            await asyncio.to_thread(goes_on.wait)
            for _, connection in players:
                if connection is not None:
                    await connection.close()
            for name in names.values():
                await http.delete("/session", headers={"X-Session-Id": name})
            return list(grades)

    return run(main())  # type: ignore[no-any-return]


# Episodes without end


def soak(url: str, episodes: int, first_seed: int, reconnect: bool) -> None:
    """Play short episodes one after the other: 5 windows of every task in turn, the last graded."""

    async def main() -> None:
        tasks = list_tasks()
        window_s = {"static_workload": 1.0, "bursty_workload": 10.0}

        async def play(ws: ClientConnection, number: int) -> None:
            task = tasks[number % len(tasks)]
            begun = {"task_id": task, "seed": number, "horizon_s": 5 * window_s.get(task, 5.0)}
            await ask(ws, message("reset", begun))
            done = await ask(ws, message("step_n", {"actions": random_actions(number, 5), "every": False}))
            assert done["steps"][0]["done"]

        if reconnect:
            for number in range(first_seed, first_seed + episodes):
                async with connected(url) as ws:
                    await play(ws, number)
            return
        async with connected(url) as ws:
            for number in range(first_seed, first_seed + episodes):
                await play(ws, number)
                if number % 100 == 0:
                    await ask(ws, message("grade"))

    run(main())


def open_over_http(url: str, count: int) -> list[str]:
    """Open sessions over HTTP, halfway through an episode, and leave them; returns their names."""
    names = []
    with httpx.Client(base_url=url, timeout=60) as http:
        for number in range(count):
            answer = http.post("/reset", json={"task_id": list_tasks()[number % 4], "seed": number})
            answer.raise_for_status()
            http.cookies.clear()
            names.append(answer.headers["X-Session-Id"])
            http.post("/step_n", json={"actions": [{}] * 20, "every": False, "session_id": names[-1]})
    return names


def hold(url: str, connections: int, ready: Any) -> None:
    """Open connections halfway through an episode, with a message under way in each, and keep them."""

    async def main() -> None:
        players = []
        for number in range(connections):
            ws = await connected(url)
            await ask(ws, message("reset", {"task_id": "static_workload", "seed": number}))
            players.append(ws)
        for ws in players:
            await ws.send(message("step_n", {"actions": [{}] * 100}))
        ready.put(os.getpid())
        signal.pause()

    run(main())


def occupy(url: str, connections: int) -> float:
    """Seconds until so many connections have a session."""

    async def one_more() -> ClientConnection:
        while True:
            ws = await connected(url)
            try:
                await ask(ws, message("state"))
                return ws
            except RuntimeError:  # at capacity
                await ws.close()
                await asyncio.sleep(0.05)

    async def main() -> float:
        begun = time.perf_counter()
        held = [await one_more() for _ in range(connections)]
        seconds = time.perf_counter() - begun
        for ws in held:
            await ws.close()
        return seconds

    return run(main())  # type: ignore[no-any-return]
