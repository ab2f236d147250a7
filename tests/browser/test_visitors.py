"""The visitors of the page and the episode that is kept of each, without a browser."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from llmserve_env.agents import AGENTS, load_agent, play
from llmserve_env.errors import InputError
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import load_task
from server.messages.refusals import AtCapacity, Conflict, NotFound
from server.messages.requests import ResetRequest
from server.page import plots
from server.page.ui_trace import replay
from server.page.ui_visitors import Visitor, Visitors
from server.service import Service
from server.settings import Settings

_SHORT = ResetRequest(task_id="adversarial_multitenant", seed=3, horizon_s=100.0)


def _visiting(scenario: Callable[[Service, Visitors], Awaitable[Any]], **bounds: Any) -> Any:
    """What a scenario returns that is played in a service of its own."""

    async def run() -> Any:
        service = Service(Settings(**bounds))
        return await scenario(service, Visitors(service))

    return asyncio.run(run())


async def _agent(visitor: Visitor, name: str) -> None:
    async for _ in visitor.play_agent(name, None):
        pass


@pytest.mark.parametrize("name", AGENTS)
def test_every_agent_scores_what_it_scores_alone(name: str) -> None:
    async def scenario(_: Service, visitors: Visitors) -> float:
        visitor = await visitors.begin("a", _SHORT)
        await _agent(visitor, name)
        return (await visitor.grade()).score

    task = load_task("adversarial_multitenant", horizon_s=100.0)
    assert _visiting(scenario) == play(load_agent(name, task), task, [3]).scores[0]


def test_the_trained_policy_plays_where_there_are_weights(ship: Callable[..., None]) -> None:
    ship("adversarial_multitenant")

    async def scenario(_: Service, visitors: Visitors) -> float:
        visitor = await visitors.begin("a", _SHORT)
        await _agent(visitor, "ppo")
        return (await visitor.grade()).score

    task = load_task("adversarial_multitenant", horizon_s=100.0)
    assert _visiting(scenario) == play(load_agent("ppo", task), task, [3]).scores[0]


def test_an_agent_begins_afresh_after_windows_of_the_visitor() -> None:
    action = ServeAction(batch_cap=8)

    async def scenario(_: Service, visitors: Visitors) -> list[float]:
        visitor = await visitors.begin("a", _SHORT)
        async for _trace in visitor.play(action, 4):
            pass
        await _agent(visitor, "defaults")
        assert visitor.trace is not None
        return visitor.trace.columns["batch_cap"]

    assert _visiting(scenario) == [8.0] * 4 + [256.0] * 16


def test_what_is_drawn_is_what_a_replay_of_the_log_draws() -> None:
    async def scenario(_: Service, visitors: Visitors) -> tuple[str, str]:
        visitor = await visitors.begin("a", _SHORT)
        await _agent(visitor, "random")
        assert visitor.trace is not None
        again = replay(visitor.session.log().model_dump_json().encode())
        return plots.board(visitor.trace), plots.board(again)

    drawn, again = _visiting(scenario)
    assert drawn == again


def test_one_whose_session_has_timed_out_begins_anew() -> None:
    async def scenario(service: Service, visitors: Visitors) -> None:
        first = await visitors.begin("a", _SHORT)
        first.session.last_used -= 61
        assert service.sessions.sweep() == 1
        with pytest.raises(NotFound, match="60 s"):
            visitors.get("a")
        assert (await visitors.begin("a", _SHORT)) is not first
        assert len(service.sessions) == len(visitors) == 1

    _visiting(scenario, session_timeout_s=60.0)


def test_who_leaves_while_an_agent_plays_ends_the_play_and_the_session() -> None:
    async def scenario(service: Service, visitors: Visitors) -> int:
        visitor = await visitors.begin("a", _SHORT)
        async for _trace in visitor.play_agent("random", 1000.0):
            visitors.leave("a")
        assert len(service.sessions) == len(visitors) == 0
        assert visitor.trace is not None
        return len(visitor.trace)

    assert _visiting(scenario) < 20


def test_an_episode_that_cannot_be_begun_leaves_no_session_behind() -> None:
    async def scenario(service: Service, visitors: Visitors) -> None:
        with pytest.raises(InputError):
            await visitors.begin("a", ResetRequest(horizon_s=0.5))
        assert len(service.sessions) == len(visitors) == 0
        await visitors.begin("a", _SHORT)
        with pytest.raises(AtCapacity):
            await visitors.begin("b", _SHORT)
        assert len(service.sessions) == len(visitors) == 1

    _visiting(scenario, max_sessions=1)


def test_only_one_thing_is_played_at_a_time() -> None:
    async def scenario(_: Service, visitors: Visitors) -> None:
        visitor = await visitors.begin("a", _SHORT)
        playing = visitor.play_agent("random", None)
        await anext(playing)
        with pytest.raises(Conflict, match="being played"):
            await anext(visitor.play(ServeAction(), 1))
        with pytest.raises(Conflict, match="being played"):
            await visitors.begin("a", _SHORT)
        await playing.aclose()
        await visitors.begin("a", _SHORT)

    _visiting(scenario)


def test_a_long_episode_is_drawn_with_no_more_points_than_a_short_one() -> None:
    task = load_task("static_workload", horizon_s=3000.0)

    async def scenario(service: Service, visitors: Visitors) -> tuple[int, int]:
        sizes = []
        for horizon_s in (300.0, 3000.0):
            visitor = await visitors.begin("a", ResetRequest(seed=1, horizon_s=horizon_s))
            async for _trace in visitor.play(ServeAction(), 10_000):
                pass
            assert visitor.trace is not None
            sizes.append(len(plots.board(visitor.trace)))
        service.guard.close()
        return sizes[0], sizes[1]

    assert task.windows == 3000
    short, long = _visiting(scenario)
    assert long < 2 * short


@pytest.mark.parametrize("path", ["/web/reset", "/web/step", "/web/gradio_api/upload"])
def test_what_all_visitors_would_share_is_not_served(page_url: str, path: str) -> None:
    request = urllib.request.Request(
        page_url.removesuffix("/web/") + path, b"{}", {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code in (404, 405)
    refused.value.close()


def test_agents_are_offered_for_the_tasks_that_they_play(ship: Callable[..., None]) -> None:
    from server.page.ui_tab import PlayTab

    ship("bursty_workload")

    async def scenario(service: Service, visitors: Visitors) -> list[tuple[list[str], str]]:
        tab = PlayTab(service, visitors)
        chosen = [("bursty_workload", "ppo"), ("trace_replay", "ppo"), ("trace_replay", "random")]
        offered = [tab._on_task(task_id, agent)[0] for task_id, agent in chosen]
        return [(update["choices"], update["value"]) for update in offered]

    everybody = [*AGENTS]
    assert _visiting(scenario) == [
        ([*everybody, "ppo"], "ppo"),
        (everybody, "reactive"),
        (everybody, "random"),
    ]
