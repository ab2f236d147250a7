"""Everything that the service does, for whoever asks: HTTP, WebSocket, the page, MCP."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from llmserve_env.episode import Episode
from llmserve_env.errors import InputError
from llmserve_env.live.episode import LiveEpisode
from llmserve_env.net.loops import forever
from llmserve_env.tasks import TRAINING_SEEDS, list_tasks, load_task
from server.baselines import Baselines
from server.guard import Guard
from server.hosted import check_request, grade_posted, is_shaped, requested_task
from server.journal import Entry, Journal
from server.messages.refusals import AtCapacity, Refusal, Unavailable
from server.messages.requests import ResetRequest
from server.sessions import MakeEpisode, Session, Sessions

if TYPE_CHECKING:
    from llmserve_env.live.settings import EndpointSettings
    from llmserve_env.schema import EpisodeLog, GradeResult, ServeAction, ServeObservation
    from llmserve_env.tasks import Task
    from server.settings import Settings

R = TypeVar("R")
AnswerMcp = Callable[[Any, Session], Awaitable[dict[str, Any]]]

_log = logging.getLogger(__name__)
_TRIM_AFTER_BYTES = 32 << 20
_SESSION_BYTES = 2 << 20


class Service:
    """Plays sessions.

    A simulated window takes a fraction of a millisecond: it is played where the request is read, so that
    nothing is locked and nothing waits for a thread. What takes longer goes to a thread, and what a client
    wrote itself to the guard's process first.

    Args:
        settings: bounds.

    Raises:
        InputError: the journal's folder cannot be written, or another server uses it.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.live = settings.mode == "real"
        self.sessions = Sessions(settings, _live_episodes(settings.endpoint) if self.live else Episode)
        self.guard = Guard(settings)
        # What real engines did cannot be done again, so nothing of it is recorded.
        self._journal = Journal(
            None if self.live else settings.journal, _most_actions(settings), _longest_line(settings)
        )
        self.baselines = Baselines(self.guard)
        self.stopping = False  # sessions that close then are those that a restart restores
        self.answer_mcp: AnswerMcp | None = None  # what MCP messages of a WebSocket are answered by
        self._freed_bytes = 0  # which have not been given back to the system
        self.answering = 0  # messages of WebSockets that are not answered yet
        self._graders = ThreadPoolExecutor(1, thread_name_prefix="grade")
        # A live window is waited for in a thread: one for each session, so that nobody waits for another's.
        self._live_threads = ThreadPoolExecutor(max(1, settings.max_live_sessions), thread_name_prefix="live")
        self.sessions.on_close = self._closed

    async def reset(self, session: Session, request: ResetRequest) -> ServeObservation:
        """Begin an episode in a session.

        Raises:
            NotFound: no such task.
            InputError: the workload or horizon cannot be; names the field.
            AtCapacity: too many shaped episodes wait to be looked through.
        """
        begun = _complete(request)
        async with session.lock:
            session.touch()
            shaped = is_shaped(begun)
            task = await self._allowed(begun, shaped)
            self.sessions.get(session.id)  # it may have been closed meanwhile, and must not come back
            self._journal.begin(session.id, begun)
            observation = await self._play(shaped, session.reset, task, begun)
            session.touch()
            return observation

    async def step(self, session: Session, actions: list[ServeAction]) -> list[ServeObservation]:
        """Serve a window for each action, or fewer where the episode ends before.

        Raises:
            Conflict: no episode has begun, or it is over.
            InputError: too many actions.
        """
        most = self.settings.max_actions
        if len(actions) > most:
            raise InputError(f"expected at most {most}, found {len(actions)}", field="actions")
        async with session.lock:
            self.sessions.get(session.id)  # it may have been closed while this waited
            session.touch()
            if not session.observation().done:
                self._journal.add(session.id, actions)
            if self.live:
                return await self._step_live(session, actions)
            observations = await self._play(len(actions) > 1, session.step, actions)
            session.touch()
            return observations

    async def _step_live(self, session: Session, actions: list[ServeAction]) -> list[ServeObservation]:
        """Serve windows one by one, so that no more are served once nobody waits for them."""
        observations: list[ServeObservation] = []
        for action in actions:
            self.sessions.get(session.id)
            observations += await self._play(True, session.step, [action])
            session.touch()
            if observations[-1].done:
                break
        return observations

    async def grade(self, session: Session) -> GradeResult:
        """The grade of a session's finished episode.

        Raises:
            Conflict: it is not over.
        """
        async with session.lock:
            session.touch()
            # One at a time: replays that take turns at the interpreter would only hold up each other.
            return await asyncio.get_running_loop().run_in_executor(self._graders, session.grade)

    async def grade_log(self, log: EpisodeLog) -> GradeResult:
        """The grade of a log that a client sent.

        Raises:
            InputError: it does not match its replay, or is too large; names the field.
            AtCapacity: too many wait to be looked through.
        """
        bounds = (self.settings.max_windows, self.settings.max_requests)
        return await self.guard.run(grade_posted, log, *bounds)

    async def drain(self, most_s: float) -> None:
        """Keep sessions for a restart from now on, and wait until every WebSocket has its answer."""
        self.stopping = True
        until = asyncio.get_running_loop().time() + most_s
        while self.answering and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.01)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Restores sessions at the start, closes those that time out, frees everything at the end."""
        background: list[asyncio.Task[None]] = []
        try:
            await self._restore()
            interval_s = min(self.settings.session_timeout_s / 4, 30.0)
            sweeping = forever(self._sweep, interval_s, "the sweep of idle sessions")
            background = [asyncio.create_task(each) for each in (sweeping, self._start_guard())]
            yield
        finally:
            for task in background:
                task.cancel()
            self.stopping = True
            self.guard.close()
            self.baselines.close()
            self._graders.shutdown()
            self._live_threads.shutdown(wait=False, cancel_futures=True)
            self._journal.close()

    async def _restore(self) -> None:
        """Open again the sessions that the journal has, by replay, as far as there is room for them."""
        count = self._journal.count()
        entries = tqdm(
            self._journal.entries(),
            desc="restoring sessions",
            unit="session",
            total=count,
            disable=not count,
        )
        left = 0
        for entry in entries:
            if self.sessions.full:
                left += 1
                continue
            try:
                await self._reopen(entry)
            except (AtCapacity, Unavailable) as error:
                _log.error("session %r stays in the journal: %s", entry.session_id, error)
            except Exception as error:  # whatever it holds, the service starts
                self._journal.set_aside(entry.session_id, error)
        if left:
            most = self.settings.max_sessions
            _log.warning("%d sessions stay in the journal: %d are open, as many as there may be", left, most)

    async def _reopen(self, entry: Entry) -> None:
        """Open a session again, within the bounds of any other."""
        begun = entry.begun
        shaped = is_shaped(begun)
        task = await self._allowed(begun, shaped)
        session = self.sessions.make(entry.session_id)
        try:
            await self._play(shaped, session.reset, task, begun)
            if entry.actions:
                await asyncio.to_thread(session.step, entry.actions)
            self._journal.resume(entry)
        except BaseException:
            session.close()
            raise
        session.touch()
        self.sessions.add(session)

    async def _allowed(self, begun: ResetRequest, shaped: bool) -> Task:
        """The task that is asked for, once it is known that its episode can be played."""
        if shaped:
            bounds = (self.settings.max_windows, self.settings.max_requests)
            await self.guard.run(check_request, begun, *bounds)
        return requested_task(begun)

    async def _start_guard(self) -> None:
        try:
            await self.guard.start()
        except Refusal as error:  # the next request that needs it tries again
            _log.error("%s", error)

    async def _sweep(self) -> None:
        """Close sessions that timed out, and give back what closed ones held."""
        self.sessions.sweep()
        self._journal.sweep()
        if self._freed_bytes >= _TRIM_AFTER_BYTES:
            self._freed_bytes = 0
            await asyncio.to_thread(return_memory)

    def note_freed(self, size: int) -> None:
        """Note that so many bytes were held, and are no more."""
        self._freed_bytes += size

    def _closed(self, session: Session) -> None:
        self.note_freed(_SESSION_BYTES)
        if not self.stopping:
            self._journal.end(session.id)

    async def _play(self, long: bool, function: Callable[..., R], *args: object) -> R:
        if self.live:
            playing = asyncio.get_running_loop().run_in_executor(self._live_threads, function, *args)
            try:
                return await asyncio.shield(playing)
            except asyncio.CancelledError:
                await asyncio.wait([playing])  # the session is not free before
                raise
        if long:
            return await asyncio.to_thread(function, *args)
        return function(*args)


def _live_episodes(endpoint: EndpointSettings) -> MakeEpisode:
    key = endpoint.api_key or os.environ.get("OPENAI_API_KEY")
    return partial(LiveEpisode, settings=replace(endpoint, api_key=key))


def return_memory() -> None:
    """Give the system back what closed sessions held: glibc keeps it, some 2 MB each, for the next ones."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _most_actions(settings: Settings) -> int:
    """Most actions recorded of a session: those of its windows, and what the last step_n had more."""
    longest = max(load_task(name).windows for name in list_tasks())
    return max(longest, settings.max_windows) + settings.max_actions


def _longest_line(settings: Settings) -> int:
    """Longest line of the journal (bytes): a body in which every 1e15 is written as 1000000000000000.0."""
    return 4 * settings.max_body_bytes + 4096


def _complete(request: ResetRequest) -> ResetRequest:
    """With a seed and a name for the episode."""
    seed = secrets.randbelow(TRAINING_SEEDS.stop) if request.seed is None else request.seed
    name = request.episode_id or secrets.token_hex(8)
    return request.model_copy(update={"seed": seed, "episode_id": name})
