"""An agent at the controls of a running service, and what stands between the two."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

import numpy as np

from llmserve_env.agents.shield import Shield, ShieldFilter, shield_settings
from llmserve_env.controls import CONTROLS, to_action, to_array
from llmserve_env.errors import InputError
from llmserve_env.live.pilot.change_limits import ChangeLimits, shipped_limits
from llmserve_env.live.pilot.decision_log import Beginning, DecisionLog, Made, Result, observed
from llmserve_env.live.pilot.decisions import Decision
from llmserve_env.net.loops import Failures
from llmserve_env.observation import Observer, feature_names
from llmserve_env.recording import record_values
from llmserve_env.schema import ServeAction

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmserve_env.agents.agent import Agent
    from llmserve_env.tasks import Task

_log = logging.getLogger(__name__)
_LONGEST = 300  # characters of a reason


class Pilot:
    """Asks an agent once a window, and answers for what comes into force.

    The agent's action goes through the shield, then through the limits on change. Where the agent cannot be
    relied on (it raised, it is late, or telemetry is stale) the safe configuration comes into force at once;
    the agent is asked again in the next window. One that is late is not asked before it is back, and what it
    then says is dropped. It thinks in a thread of its own.

    Fields that the task does not grant stay as they are at the start.

    Args:
        agent: decides; a `Shield` is taken off it, for the one that stands here.
        task: says what is observed, granted and promised.
        start: action in force now.
        safe: comes into force when the agent cannot be relied on (default: start).
        shield: whether one stands around the agent.
        limits: on change (default: data/limits.toml).
        decide_limit_s: time that the agent has for a decision (s).
        dry_run: decisions are only told; what is in force at the start stays.
        endless: whether the service has no end, see `decision_log.observed`.
        seed: the agent's.
        log: gets everything.
        reward: what the rewards are, for the log.
        capabilities: how each field is applied, for the log.

    Attributes:
        in_force: the configuration.
        window: index of the next decision's.
        capabilities: as given; may be set until the first decision.

    Raises:
        InputError: the agent cannot play the task.

    Example:
        >>> pilot = Pilot(agent, task, action)
        >>> decision = pilot.decide(record, stale=None)  # takes at most `decide_limit_s`
        >>> decision = pilot.applied(deployment.apply(decision.applied))
        >>> ...  # serve the window
        >>> pilot.result(record, reward)
    """

    def __init__(
        self,
        agent: Agent,
        task: Task,
        start: ServeAction,
        *,
        safe: ServeAction | None = None,
        shield: bool = True,
        limits: ChangeLimits | None = None,
        decide_limit_s: float = 1.0,
        dry_run: bool = False,
        endless: bool = False,
        seed: int = 0,
        log: DecisionLog | None = None,
        reward: str = "the task's",
        capabilities: Mapping[str, str] | None = None,
    ) -> None:
        if not decide_limit_s > 0:
            raise InputError(f"expected more than 0, found {decide_limit_s}", field="decide_limit_s")
        if isinstance(agent, Shield):
            agent, shield = agent.agent, True
        self.task = task
        self.start = self.in_force = start
        self.safe = start if safe is None else safe
        self.dry_run = dry_run
        self.window = 0
        self.capabilities: Mapping[str, str] = capabilities or {}
        self._agent = agent
        self._limits = shipped_limits() if limits is None else limits
        self._limit_s = decide_limit_s
        self._endless = endless
        self._log = log
        self._observer = Observer(task)
        self._granted = task.grid.granted
        self._changed: dict[str, int] = {}  # window in which a field last did
        self._thought: _Thought | None = None  # that came too late
        self._pending: Made | None = None
        self._fallen: str | None = None  # rule of the last decision, where it was a fallback
        self._failures = Failures("steering")
        agent.reset(task, [seed])
        self._shield = ShieldFilter(task, shield_settings()) if shield else None
        self._shield_state = None if self._shield is None else self._shield.begin(1)
        self._beginning: Beginning | None = Beginning(
            time_s=time.time(),
            task=task.model_dump(mode="json"),
            agent=agent.name,
            shielded=shield,
            dry_run=dry_run,
            endless=endless,
            start=start,
            safe=self.safe,
            limits=self._limits.model_dump(mode="json", exclude_none=True),
            decide_limit_s=decide_limit_s,
            reward=reward,
            features=feature_names(task),
        )
        self._run = self._beginning.run

    def decide(self, window: NDArray[np.void], stale: str | None = None, excused: int = 0) -> Decision:
        """What is to be in force in the next window.

        Args:
            window: WINDOW, what happened in the last one; zeros before the first.
            stale: why the last window's figures cannot be trusted, None if they can.
            excused: requests that ended outside of their SLO because an upstream had been silent: the shield
                does not hold them against what is in force now.

        Raises:
            OSError: the log cannot be written.
        """
        begun_s = time.perf_counter()
        self._begin()
        self._flush()
        row = np.asarray(window).reshape(1)
        seen: NDArray[np.float32] | None = None
        proposed: ServeAction | None = None
        cause: tuple[str, str] | None = None
        if stale is not None:
            cause = ("stale", stale)
        else:
            seen = observed(
                self._observer, self.task, row, self.in_force, step=self.window, endless=self._endless
            )
            proposed, cause = self._asked(seen.reshape(1, -1), row)
        by: Literal["agent", "shield", "limit", "fallback"] = "agent"
        rule = reason = None
        decided = self.safe if proposed is None else proposed
        if seen is not None and self._shield is not None:
            shielded = self._shielded(decided, row, excused)
            if shielded is not None and cause is None:
                decided, rule, reason = shielded
                by = "shield"
        if cause is not None:
            by, (rule, reason) = "fallback", cause
        else:
            asked_rate = float(row["arrived"][0]) / self.task.window_s
            age = {name: self.window - last for name, last in self._changed.items()}
            decided, held = self._limits.held(decided, self.in_force, age, asked_rate)
            if held:
                what = "; ".join(f"{name}: {words}" for name, words in held.items())
                reason = what if rule is None else f"{what} (after {rule}: {reason})"
                by, rule = "limit", ",".join(held)
        return self._made(
            proposed, decided, by, rule, reason, seen=seen, decision_s=time.perf_counter() - begun_s
        )

    def applied(self, not_applied: Mapping[str, str]) -> Decision:
        """Note which fields of the last decision have no effect, and write it down.

        Raises:
            InputError: nothing was decided.
            OSError: the log cannot be written.
        """
        if self._pending is None:
            raise InputError("call decide before applied")
        decision = self._pending.decision.model_copy(update={"not_applied": dict(not_applied)})
        self._pending = self._pending.model_copy(update={"decision": decision})
        self._flush()
        self._failures.end()
        return decision

    def result(self, window: NDArray[np.void], reward: float) -> None:
        """Write down what came of the last decision.

        Args:
            window: WINDOW, what happened under it.
            reward: reward of the window.

        Raises:
            OSError: the log cannot be written.
        """
        self._flush()
        if self._log is not None and self.window:
            record = record_values(np.asarray(window).reshape(()), len(self.task.tenants))
            self._write(Result(run=self._run, window=self.window - 1, reward=reward, record=record))

    def fall_back(self, error: BaseException) -> Decision:
        """The safe configuration, because something around the agent failed."""
        self._failures.tell(error)
        with suppress(Exception):  # the safe configuration comes first
            self._flush()
        return self._made(None, self.safe, "fallback", "exception", _line(error))

    def close(self) -> None:
        """Write down what is left, and close the log."""
        if self._log is not None:
            with suppress(OSError):
                self._flush()
            with suppress(OSError):
                self._log.close()

    def _asked(
        self, seen: NDArray[np.float32], row: NDArray[np.void]
    ) -> tuple[ServeAction | None, tuple[str, str] | None]:
        """The agent's action, or why there is none."""
        if self._thought is not None:
            if not self._thought.done.is_set():
                waited_s = time.monotonic() - self._thought.begun_s
                return None, ("slow", f"the agent has been thinking for {waited_s:.1f} s")
            self._thought = None
        thought = _Thought(lambda: self._agent.act(seen, row.copy()))
        if not thought.done.wait(self._limit_s):
            self._thought = thought
            return None, ("slow", f"no decision within {self._limit_s:g} s")
        error = thought.error
        if error is None:
            try:
                return self._with_granted(thought.answer), None
            except Exception as raised:
                error = raised
        if self._fallen != "exception":
            _log.error("the agent failed: %s", _line(error), exc_info=error)
        return None, ("exception", _line(error))

    def _with_granted(self, answer: NDArray[np.void] | None) -> ServeAction:
        """The agent's action with the start's fields where the task grants none."""
        if answer is None or answer.shape != (1,):
            raise InputError(f"expected ACTION[1], found {answer!r}", field="action")
        said = to_action(answer[0])
        return self.start.model_copy(update={name: getattr(said, name) for name in self._granted})

    def _shielded(
        self, proposed: ServeAction, row: NDArray[np.void], excused: int
    ) -> tuple[ServeAction, str, str] | None:
        """What the shield sets in place of it, rule and reason; None where it leaves it."""
        if excused:
            row = row.copy()
            for name in ("failed", "completed"):
                left_out = np.minimum(row[name], excused)
                row[name] -= left_out
                excused -= int(left_out[0])
        assert self._shield is not None
        assert self._shield_state is not None
        found = self._shield.filter(self._shield_state, to_array([proposed]), to_array([self.in_force]), row)
        self._shield_state = found.state
        rule, reason = found.rules[0], found.reasons[0]
        return None if rule is None or reason is None else (to_action(found.actions[0]), rule, reason)

    def _made(
        self,
        proposed: ServeAction | None,
        decided: ServeAction,
        by: Literal["agent", "shield", "limit", "fallback"],
        rule: str | None,
        reason: str | None,
        *,
        seen: NDArray[np.float32] | None = None,
        decision_s: float = 0.0,
    ) -> Decision:
        applied = self.start if self.dry_run else decided
        decision = Decision(
            window=self.window,
            time_s=time.time(),
            proposed=proposed,
            decided=decided,
            applied=applied,
            by=by,
            rule=rule,
            reason=reason,
            decision_s=decision_s,
            dry_run=self.dry_run,
        )
        self._tell(decision)
        for name in CONTROLS:
            if getattr(applied, name) != getattr(self.in_force, name):
                self._changed[name] = self.window
        self.in_force = applied
        self.window += 1
        floats = None if seen is None else [float(f"{each:.9g}") for each in seen]
        self._pending = Made(run=self._run, observation=floats, decision=decision)
        return decision

    def _tell(self, decision: Decision) -> None:
        """Say once that the safe configuration is in force and why, and when the agent decides again."""
        fallen = decision.rule if decision.by == "fallback" else None
        if fallen is not None and fallen != self._fallen:
            _log.warning("window %d: safe configuration: %s: %s", decision.window, fallen, decision.reason)
        elif fallen is None and self._fallen is not None:
            _log.warning("window %d: the agent decides again", decision.window)
        self._fallen = fallen

    def _begin(self) -> None:
        """Write down what the run is, if it was not."""
        if self._beginning is not None and self._log is not None:
            said = {"capabilities": dict(self.capabilities)}
            self._log.begin(self._beginning.model_copy(update=said))
            self._beginning = None

    def _flush(self) -> None:
        """Write the last decision down, if it was not."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._write(pending)

    def _write(self, line: Made | Result) -> None:
        """Write a line down, after what the run is: a full disk may have kept that from the log."""
        if self._log is not None:
            self._begin()
            self._log.write(line)


class _Thought:
    """A call in a thread of its own, which nobody has to wait for.

    Attributes:
        answer: what it returned.
        error: what it raised.
        done: set when it has ended.
        begun_s: when it began (s of the monotonic clock).
    """

    def __init__(self, call: Callable[[], NDArray[np.void]]) -> None:
        self.answer: NDArray[np.void] | None = None
        self.error: BaseException | None = None
        self.done = threading.Event()
        self.begun_s = time.monotonic()
        self._call = call
        # A daemon: an agent that never returns does not keep the process from its end.
        threading.Thread(target=self._run, name="agent", daemon=True).start()

    def _run(self) -> None:
        try:
            self.answer = self._call()
        except BaseException as error:  # an agent's SystemExit ends nothing here, either
            self.error = error
        finally:
            self.done.set()


def _line(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_LONGEST]
