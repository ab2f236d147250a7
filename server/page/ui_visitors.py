"""Who is at the page, and what each of them plays. Without Gradio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from llmserve_env.actions import to_action
from llmserve_env.agents import load_agent
from server.messages.refusals import Conflict, NotFound
from server.page.ui_trace import Trace

if TYPE_CHECKING:
    from llmserve_env.agents import Agent
    from llmserve_env.schema import GradeResult, ServeAction
    from server.messages.requests import ResetRequest
    from server.service import Service
    from server.sessions import Session

_FRAME_S = 0.12
"""Least time between two pictures of an episode that is played on (s)."""
_AT_ONCE = 10
"""Simulated windows that a stretch plays at once."""


class Visitor:
    """What one visitor plays.

    Args:
        service: that plays.
        session: the visitor's own.

    Attributes:
        trace: of the episode; None before the first.
        playing: whether windows are being played: one thing at a time.
    """

    def __init__(self, service: Service, session: Session) -> None:
        self.session = session
        self.trace: Trace | None = None
        self.playing = False
        self._service = service
        self._agent: Agent | None = None  # which may play on where it was stopped
        self._agent_name = ""
        self._chosen: ResetRequest | None = None
        self._stopped = False

    def has_begun(self, chosen: ResetRequest) -> bool:
        """Whether the episode is the one that is asked for."""
        return self.trace is not None and self._chosen == chosen

    async def begin(self, chosen: ResetRequest) -> Trace:
        """Begin an episode.

        Raises:
            Conflict: another is being played on.
            Refusal, InputError: it cannot be begun.
        """
        self._check_free()
        await self._service.reset(self.session, chosen)
        state = self.session.state
        assert self.session.task is not None
        assert state.seed is not None
        self.trace = Trace(self.session.task, state.seed, live=self._service.live)
        self._chosen, self._agent = chosen, None
        return self.trace

    async def play(self, action: ServeAction, windows: int) -> AsyncIterator[Trace]:
        """Serve windows with one action, until the episode ends or `stop`; the episode every now and then.

        Raises:
            Conflict: the episode is over, or is being played on.
        """
        at_once = 1 if self._service.live else _AT_ONCE
        self._agent = None
        with self._busy() as trace:
            yield trace
            shown = time.monotonic()
            while windows > 0 and not self._stopped:
                count = min(windows, at_once)
                for observation in await self._service.step(self.session, [action] * count):
                    trace.add(observation)
                windows -= count
                if trace.done:
                    break
                if time.monotonic() - shown > _FRAME_S:
                    yield trace
                    shown = time.monotonic()
                await asyncio.sleep(0)
        yield trace

    async def play_agent(self, name: str, windows_per_s: float | None) -> AsyncIterator[Trace]:
        """Let an agent play on, until the episode ends or `stop`; the episode every now and then.

        Args:
            name: as `load_agent` takes it. One that was stopped plays on as if it had not been.
            windows_per_s: how fast (None: as fast as it goes).

        Raises:
            Conflict: the episode is over, or is being played on.
            InputError: the agent was not tuned to the task, or not trained on it.
        """
        with self._busy() as trace:
            agent = self._ready_agent(name)
            yield trace
            began = shown = time.monotonic()
            played = 0
            while not trace.done and not self._stopped:
                batch = self.session.batch
                if batch is None or self._service.live:
                    raise Conflict("real engines show no agent what it has to see")
                action = to_action(agent.act(batch.observations(), batch.windows)[0])
                trace.add((await self._service.step(self.session, [action]))[0])
                played += 1
                if time.monotonic() - shown > _FRAME_S:
                    yield trace
                    shown = time.monotonic()
                due_s = began + played / windows_per_s if windows_per_s else 0.0
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
        yield trace

    def stop(self) -> None:
        """Play no further window."""
        self._stopped = True

    async def grade(self) -> GradeResult:
        """The grade of the finished episode.

        Raises:
            Conflict: it is not over.
        """
        self._check_free()
        return await self._service.grade(self.session)

    def _check_free(self) -> None:
        if self.playing:
            raise Conflict("the episode is being played on: stop that first")

    @contextmanager
    def _busy(self) -> Iterator[Trace]:
        self._check_free()
        if self.trace is None:
            raise Conflict("no episode has begun")
        if self.trace.done:
            raise Conflict("the episode is over: begin another, or grade it")
        self.playing, self._stopped = True, False
        try:
            yield self.trace
        finally:
            self.playing = False

    def _ready_agent(self, name: str) -> Agent:
        task, seed = self.session.task, self.session.state.seed
        assert task is not None
        assert seed is not None
        if self._agent is None or self._agent_name != name:
            agent = load_agent(name, task)
            agent.reset(task, [seed])
            self._agent, self._agent_name = agent, name
        return self._agent


class Visitors:
    """The visitors who have a session. One is forgotten when the session ends, for whatever reason.

    Args:
        service: that plays.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._here: dict[str, Visitor] = {}

    def __len__(self) -> int:
        return len(self._here)

    def get(self, name: str) -> Visitor:
        """The visitor of a name.

        Raises:
            NotFound: has no session, any more.
        """
        if name not in self._here:
            timeout_s = self._service.settings.session_timeout_s
            raise NotFound(f"no episode has begun; one that nobody plays for {timeout_s:g} s is closed")
        return self._here[name]

    async def begin(self, name: str, chosen: ResetRequest) -> Visitor:
        """Begin an episode for a visitor, in a new session if there is none.

        Raises:
            Refusal, InputError: it cannot be begun, or there is no room.
        """
        visitor = self._here.get(name)
        if visitor is None:
            session = self._service.sessions.open()
            visitor = self._here[name] = Visitor(self._service, session)
            session.hang_up = partial(self._forget, name, visitor)
        try:
            await visitor.begin(chosen)
        except BaseException:
            if visitor.trace is None:
                self._service.sessions.close(visitor.session)
            raise
        return visitor

    def stop(self, name: str) -> None:
        """Stop what a visitor plays, if anything."""
        if name in self._here:
            self._here[name].stop()

    def leave(self, name: str) -> None:
        """A visitor has gone: end the session."""
        if name in self._here:
            self._service.sessions.close(self._here[name].session)

    def _forget(self, name: str, visitor: Visitor) -> None:
        visitor.stop()
        if self._here.get(name) is visitor:
            del self._here[name]
