"""Sessions: one player's episode each, how many there may be, and when one ends."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from llmserve_env.episode import Episode
from llmserve_env.grading import grade
from llmserve_env.recording import record_values
from server.messages.models import ServiceState
from server.messages.refusals import AtCapacity, Conflict, NotFound
from server.messages.requests import ResetRequest

if TYPE_CHECKING:
    from llmserve_env.episode import EpisodeBatch
    from llmserve_env.schema import EpisodeLog, GradeResult, ServeAction, ServeObservation
    from llmserve_env.tasks import Task
    from server.settings import Settings

_log = logging.getLogger(__name__)
_BEFORE_RESET = "no episode has begun: reset first"


MakeEpisode = Callable[["Task"], Episode]
"""Makes what plays a task: in the simulator, or before real engines."""


class Session:
    """One player's episode.

    Args:
        session_id: its name, which only its player knows.
        make_episode: what plays a task.
        clock: seconds, monotone.

    Attributes:
        lock: held while a request plays in it.
        connected: whether a WebSocket holds it: it ends with that.
        hang_up: called when the session is closed, for a connection to end too.
        last_used: when a request last touched it (s of the clock).
        begun: what the episode was begun with, its seed filled in; None before the first reset.
    """

    def __init__(
        self,
        session_id: str,
        make_episode: MakeEpisode = Episode,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.id = session_id
        self.lock = asyncio.Lock()
        self.connected = False
        self.hang_up: Callable[[], None] | None = None
        self.begun: ResetRequest | None = None
        self._make_episode = make_episode
        self._clock = clock
        self.last_used = clock()
        self._task: Task | None = None
        self._episode: Episode | None = None
        self._log: EpisodeLog | None = None
        self._last: ServeObservation | None = None

    def touch(self) -> None:
        """Note that it is used."""
        self.last_used = self._clock()

    def reset(self, task: Task, begun: ResetRequest) -> ServeObservation:
        """Begin an episode.

        Args:
            task: what `begun` asks for.
            begun: with a seed.
        """
        assert begun.seed is not None
        self.close()
        episode = self._make_episode(task)
        observation = episode.reset(begun.seed)
        self._task, self._episode, self._log, self.begun = task, episode, None, begun
        return self._seen(observation)

    def step(self, actions: list[ServeAction]) -> list[ServeObservation]:
        """Serve a window for each action, or fewer where the episode ends before.

        Raises:
            Conflict: no episode has begun, or it is over.
        """
        if self._last is None:
            raise Conflict(_BEFORE_RESET)
        if self._episode is None:
            raise Conflict("the episode is over: reset to begin another, or grade it")
        observations = []
        for action in actions:
            observations.append(self._seen(self._episode.step(action)))
            if self._episode.done:
                # What an idle session keeps of it is small: not the simulator, but the log.
                self._log = self._episode.log()
                self.close()
                break
        return observations

    def observation(self) -> ServeObservation:
        """What the player saw last.

        Raises:
            Conflict: no episode has begun.
        """
        if self._last is None:
            raise Conflict(_BEFORE_RESET)
        return self._last

    def log(self) -> EpisodeLog:
        """The log of the episode so far.

        Raises:
            Conflict: no episode has begun.
        """
        if self._log is not None:
            return self._log
        if self._episode is None:
            raise Conflict(_BEFORE_RESET)
        return self._episode.log()

    def grade(self) -> GradeResult:
        """The grade of the episode.

        Raises:
            Conflict: it is not over.
        """
        state = self.state
        if self._last is None:
            raise Conflict(_BEFORE_RESET)
        if not state.done:
            played = f"{state.step_count} of {state.windows} windows"
            raise Conflict(f"the episode is not over, {played} are played: /log has what can be graded")
        # The log is the service's own, so that its task may be of a file of this machine.
        return grade(self.log(), allow_files=True)

    def close(self) -> None:
        """Free the episode that is under way."""
        if self._episode is not None:
            self._episode.close()
            self._episode = None

    @property
    def task(self) -> Task | None:
        """What is played; None before the first reset."""
        return self._task

    @property
    def batch(self) -> EpisodeBatch | None:
        """The episode's batch while it is under way: for agents that read its records."""
        return None if self._episode is None else self._episode.batch

    @property
    def state(self) -> ServiceState:
        """Where the episode stands."""
        if self._last is None or self._task is None or self.begun is None:
            return ServiceState(session_id=self.id)
        return ServiceState(
            session_id=self.id,
            episode_id=self.begun.episode_id,
            step_count=self._last.step_index,
            task_id=self._last.task_id,
            seed=self.begun.seed,
            windows=self._task.windows,
            done=self._last.done,
            score=self._last.metadata["score"],
        )

    def _seen(self, observation: ServeObservation) -> ServeObservation:
        observation.metadata["session_id"] = self.id
        if self.begun is not None and self.begun.features:
            assert self._episode is not None
            vector = self._episode.batch.observed[0]
            observation.metadata["features"] = np.asarray(vector, float).tolist()
        if self.begun is not None and self.begun.records:
            assert self._episode is not None
            window, tenants = self._episode.batch.windows[0], len(self._episode.task.tenants)
            observation.metadata["record"] = record_values(window, tenants)
        self._last = observation
        return observation


class Sessions:
    """The open sessions.

    A session ends when its player closes it, when the WebSocket that opened it ends, and when nobody used it
    for `settings.session_timeout_s`. At capacity a new one takes the place of the one that no WebSocket holds
    and that was idle longest, if for `settings.reclaim_after_s` or more; otherwise it is refused.

    Args:
        settings: bounds.
        make_episode: what plays a task.
        clock: seconds, monotone.
    """

    def __init__(
        self,
        settings: Settings,
        make_episode: MakeEpisode = Episode,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._most = settings.max_live_sessions if settings.mode == "real" else settings.max_sessions
        self._make_episode = make_episode
        self._clock = clock
        self._open: dict[str, Session] = {}
        self.on_close: Callable[[Session], None] = lambda _: None

    def __len__(self) -> int:
        return len(self._open)

    def open(self) -> Session:
        """A new session, of a name that cannot be guessed.

        Raises:
            AtCapacity: there is no room.
        """
        if self.full:
            self._make_room()
        session = self.make(secrets.token_urlsafe(24))
        self.add(session)
        return session

    def make(self, session_id: str) -> Session:
        """A session of a name that is not open yet: one that is being restored."""
        return Session(session_id, self._make_episode, self._clock)

    def add(self, session: Session) -> None:
        """Open a session that was made."""
        self._open[session.id] = session

    @property
    def full(self) -> bool:
        """Whether there are as many as there may be."""
        return len(self._open) >= self._most

    def get(self, session_id: str) -> Session:
        """The session of a name.

        Raises:
            NotFound: there is none, any more.
        """
        session = self._open.get(session_id)
        if session is None:
            timeout_s = self._settings.session_timeout_s
            raise NotFound(
                f"no such session; one that nobody uses for {timeout_s:g} s is closed: reset to open another"
            )
        return session

    def close(self, session: Session) -> None:
        """End a session and free what it holds; one that has ended already stays so."""
        if self._open.pop(session.id, None) is None:
            return
        try:
            session.close()
        finally:
            self.on_close(session)
            if session.hang_up is not None:
                session.hang_up()

    def sweep(self) -> int:
        """Close the sessions that nobody used for too long; returns how many."""
        oldest = self._clock() - self._settings.session_timeout_s
        stale = [each for each in self._open.values() if each.last_used < oldest and not each.lock.locked()]
        for session in stale:
            try:
                self.close(session)
            except Exception:  # it is closed, and the others' time is over, too
                _log.exception("a session was closed, but not all of what it held was freed")
        return len(stale)

    def _make_room(self) -> None:
        free = [each for each in self._open.values() if not each.connected and not each.lock.locked()]
        idlest = min(free, key=lambda session: session.last_used, default=None)
        wait_s = self._settings.reclaim_after_s
        if idlest is not None:
            wait_s -= self._clock() - idlest.last_used
        if idlest is None or wait_s > 0:
            raise AtCapacity(f"{len(self._open)} sessions are open, as many as there may be", wait_s)
        self.close(idlest)
