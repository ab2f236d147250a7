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
from collections.abc import Coroutine
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeout  # another class before Python 3.11
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from llmserve_env.errors import InputError
from llmserve_env.live.sender import Sender
from llmserve_env.live.traffic import bounded
from llmserve_env.schema import ServeAction

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmserve_env.backend import WindowRecord
    from llmserve_env.live.settings import EndpointSettings
    from llmserve_env.workloads.workload import Workload

R = TypeVar("R")


class EndpointBackend:
    """An endpoint that serves an episode.

    Args:
        settings: which endpoint, and what may be asked of it.
        workload: requests of the episode.
        window_s: time between two actions (s), by which requests are bounded.
        engines: of the task's cell; a single server stands for all of them.
        seed: of the episode; draws the prompts.
        start: the action in force before the first.

    Attributes:
        workload: what is sent, within the settings' bounds.
        cuts: what they took.
        window: WINDOW, the last record; before the first, that of a cell that has done nothing.

    Raises:
        InputError: a control folder cannot be used; a package is missing.
    """

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
            import httpx  # noqa: F401 - refused here, not in the thread
            import prometheus_client  # noqa: F401
        except ImportError as error:
            raise InputError(f"the {error.name} package is missing: install llmserve-env[server]") from error
        self.settings = settings
        self.workload, self.cuts = bounded(workload, window_s, settings)
        self._sender = Sender(settings, self.workload, engines, seed, start)
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
        self.window: NDArray[np.void] = self._sender.deployment.row

    def serve(self, action: ServeAction, window_s: float) -> WindowRecord:
        """Apply an action and serve for `window_s` seconds of real time.

        Raises:
            InputError: it is closed, or a window is not positive.
        """
        if not window_s > 0:
            raise InputError(f"expected seconds > 0, found {window_s}", field="window_s")
        record = self._call(self._sender.serve(action, window_s))
        self.window = self._sender.deployment.row
        return record

    def close(self) -> None:
        """Cancel what is at the endpoint, bring back the settings that were found, and end the thread.

        Raises:
            InputError: settings cannot be brought back.
        """
        self._stop()

    def capabilities(self) -> dict[str, str]:
        """How each field of an action is applied here, as `Deployment.capabilities`."""
        return self._call(self._sender.capabilities())

    def cannot_apply(self, action: ServeAction) -> dict[str, str]:
        """Fields of an action that could not be applied now, as `Deployment.cannot_apply`."""
        return self._call(self._sender.cannot_apply(action))

    @property
    def stale(self) -> str | None:
        """Why the servers' metrics cannot be trusted now; None where they can, or where there are none."""
        return self._sender.deployment.stale

    @property
    def unmeasured(self) -> dict[str, str]:
        """Fields of an observation that the last record does not tell, or not quite: what they hold."""
        return dict(self._sender.deployment.unmeasured)

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
