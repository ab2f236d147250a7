"""The live backend: an OpenAI-compatible endpoint serves a workload, and a client measures.

A window lasts as long as it says, in real time: its requests are sent when they are due, and what is
unfinished at its end goes on into the next. Between two windows the episode's clock stands still, the
endpoint's does not: answers go on, and latencies, patience and deadlines are real time.

A `Deployment` applies of an action what can be applied to the endpoint's servers, and adds to the clients'
figures what the servers tell; the rest is reported as not applied, and named as unmeasured.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeout  # another class before Python 3.11
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from llmserve_env.controls import to_action
from llmserve_env.errors import InputError, missing_package
from llmserve_env.live.gateway.ledger import UNMEASURED
from llmserve_env.live.sender import Sender
from llmserve_env.live.traffic import bounded
from llmserve_env.schema import ServeAction

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmserve_env.backend import WindowRecord
    from llmserve_env.live.settings import EndpointSettings
    from llmserve_env.tasks import Task
    from llmserve_env.workloads.workload import Workload

R = TypeVar("R")


class EndpointBackend:
    """An endpoint that serves an episode: a `backend.Backend` of one.

    Args:
        settings: which endpoint, and what may be asked of it.
        workload: requests of the episode.
        window_s: time between two actions (s), by which requests are bounded.
        engines: engines of the task's cell; a single server stands for all of them.
        seed: seed of the episode; draws the prompts.
        start: the action in force before the first.

    Attributes:
        workloads: what is sent, within the settings' bounds.
        cuts: what they took.
        record: the last window, with its histograms and what was not applied; None before the first.
        unmeasured: fields of an observation that the last window does not tell, or not quite: what they hold.
        stale: why the last window's figures could not be trusted at its end; None where they could.
        excused: requests of the last window that were late, or failed, because a server was silent.

    Raises:
        InputError: a control folder cannot be used; a package is missing.
    """

    replayable = False

    def __init__(
        self,
        settings: EndpointSettings,
        workload: Workload,
        *,
        window_s: float,
        engines: int = 1,
        seed: int = 0,
        start: ServeAction = ServeAction(),  # noqa: B008 - immutable
    ) -> None:
        try:
            import aiohttp  # noqa: F401 - refused here, not in the thread
            import prometheus_client  # noqa: F401
        except ImportError as error:
            raise missing_package(error) from error
        self.settings = settings
        self._window_s = window_s
        self._engines = engines
        self._start = start
        self._stop: Any = None
        self.reset(0, workload, seed)

    def reset(self, episode: int, workload: Workload, seed: int) -> None:
        """Begin anew with another workload; nothing is sent before the first window.

        Args:
            episode: 0, the only one.
            workload: requests of the episode.
            seed: seed of the episode; draws the prompts.

        Raises:
            InputError: a control folder cannot be used, or settings cannot be brought back.
        """
        self.close()
        sent, self.cuts = bounded(workload, self._window_s, self.settings)
        self.workloads = [sent]
        self._sender = Sender(self.settings, sent, self._engines, seed, self._start)
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="live endpoint", daemon=True)
        thread.start()
        # The thread and its tasks know the sender and not this object: it can be forgotten without a close.
        self._stop = weakref.finalize(self, _stop, self._loop, thread, self._sender)
        try:
            self._call(self._sender.begin())
        except BaseException:
            self._stop()
            raise
        self.windows: NDArray[np.void] = self._sender.deployment.row.reshape(1)
        self.record: WindowRecord | None = None
        self.unmeasured: Mapping[str, str] = dict(UNMEASURED)
        self.stale: str | None = None
        self.excused = 0

    def serve(
        self, actions: NDArray[np.void], window_s: float, which: NDArray[np.bool_] | None = None
    ) -> NDArray[np.void]:
        """Apply an action and serve for `window_s` seconds of real time.

        Args:
            actions: ACTION[1].
            window_s: length of the window (s).
            which: bool[1], whether to serve at all.

        Raises:
            InputError: it is closed, or a window is not positive.
        """
        if len(actions) != 1:
            raise InputError(f"expected 1, found {len(actions)}", field="actions")
        if not window_s > 0:
            raise InputError(f"expected seconds > 0, found {window_s}", field="window_s")
        if which is None or which[0]:
            self.record = self._call(self._sender.serve(to_action(actions[0]), window_s))
            deployment = self._sender.deployment
            self.windows = deployment.row.reshape(1)
            self.unmeasured, self.stale = dict(deployment.unmeasured), deployment.stale
            self.excused = deployment.excused
        return self.windows

    def not_applied(self, action: ServeAction) -> dict[str, str]:
        """Fields of an action that could not be applied now, as `Deployment.cannot_apply`."""
        return self._call(self._sender.cannot_apply(action))

    def ignored(self, episode: int, action: NDArray[np.void]) -> dict[str, str]:
        """Fields of the last action that had no effect, or not as they stand, with the reason."""
        return {} if self.record is None else dict(self.record.not_applied)

    def capabilities(self) -> dict[str, str]:
        """How each field of an action is applied here, as `Deployment.capabilities`."""
        return self._call(self._sender.capabilities())

    def notes(self) -> dict[str, Any]:
        """What there is to know beside the records, under `live`."""
        return {
            "live": {
                "endpoint": self.settings.shown_url,
                "model": self.settings.model,
                "cuts": asdict(self.cuts),
                **self.told(),
                "unmeasured": dict(self.unmeasured),
                "stale": self.stale,
            }
        }

    def snapshot(self) -> bytes:
        """Not here.

        Raises:
            InputError: always.
        """
        raise InputError("real engines have no state that could be kept and returned to", field="snapshot")

    def restore(self, snapshot: bytes) -> None:
        """Not here.

        Raises:
            InputError: always.
        """
        raise InputError("real engines cannot be brought back to a state", field="snapshot")

    def close(self) -> None:
        """Cancel what is at the endpoint, bring back the settings that were found, and end the thread.

        Raises:
            InputError: settings cannot be brought back.
        """
        if self._stop is not None:
            self._stop()

    def told(self) -> dict[str, Any]:
        """What there is to know beside the records, of the whole episode.

        Failures by reason; tokens of prompts as asked and as the endpoint counted them; whether it takes
        ignore_eos (if not, answers may end early).
        """
        sender = self._sender
        return {
            "failures": dict(sorted(sender.gateway.ledger.failures.items())),
            "prompt_tokens": {"asked": sender.prompt_asked, "counted": sender.prompt_counted},
            "ignore_eos": not sender.plain,
        }

    def _call(self, coroutine: Coroutine[Any, Any, R]) -> R:
        if not self._stop.alive:
            coroutine.close()
            raise InputError("the endpoint's episode is closed")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except CancelledError as error:
            raise InputError("the endpoint's episode was closed meanwhile") from error
        except BaseException:  # an interrupt: the window must not go on by itself
            future.cancel()
            raise


def open_backend(
    task: Task, workloads: Sequence[Workload], seeds: Sequence[int], *, settings: EndpointSettings
) -> EndpointBackend:
    """An endpoint for an episode of a task: an `episode.OpenBackend`.

    Raises:
        InputError: more than one episode is asked for; and as `EndpointBackend`.
    """
    if len(workloads) != 1:
        raise InputError(
            f"expected 1: an endpoint serves one at a time, found {len(workloads)}", field="seeds"
        )
    return EndpointBackend(
        settings,
        workloads[0],
        window_s=task.window_s,
        engines=task.cell.engines,
        seed=seeds[0],
        start=task.start,
    )


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread, sender: Sender) -> None:
    if threading.current_thread() is thread:  # the garbage collector runs where it likes
        loop.create_task(sender.close()).add_done_callback(lambda _: loop.stop())
        return
    try:
        with contextlib.suppress(FutureTimeout):
            asyncio.run_coroutine_threadsafe(sender.close(), loop).result(timeout=10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
